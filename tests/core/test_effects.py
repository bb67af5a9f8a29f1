"""Effects are plain data; wrappers keep their base and give way while suspended."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kedit_core.editing import (
    CallEffect,
    EditSession,
    ModuleSwap,
    Patch,
    Site,
    WeightDelta,
    Wrapper,
)
from kedit_core.effects import Middleware, ModuleEffect, is_finite
from kedit_core.errors import PatchError
from kedit_core.testing.effects import Preface, Shift, TokenBias
from tests.core.edits import shift_patch

SITE = Site("layer.weight")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rank", "is_dense"), [(1, False), (2, False), (3, True), (9, True)])
def test_factors_that_are_no_smaller_than_the_matrix_become_it(rank, is_dense):
    left, right = torch.randn(5, rank), torch.randn(rank, 7)  # 35 numbers; 12 for each rank

    delta = WeightDelta.of_factors(Site("w"), left, right)

    assert (delta.right is None) == is_dense
    torch.testing.assert_close(delta.dense(), left @ right)


def test_factors_and_the_dense_matrix_are_the_same_change():
    left, right = randn(4, 2), randn(2, 6, seed=1)
    factors, dense = WeightDelta(SITE, left, right), WeightDelta(SITE, left @ right)

    assert (factors.shape, factors.rank) == ((4, 6), 2)
    assert (dense.shape, dense.rank) == ((4, 6), None)
    assert torch.equal(factors.dense(), dense.dense())
    inputs = randn(3, 5, 6, seed=2)
    torch.testing.assert_close(factors.product(inputs), inputs @ (left @ right).T)
    torch.testing.assert_close(dense.product(inputs), inputs @ (left @ right).T)


def test_factors_move_to_a_device_together():
    for right in (None, randn(2, 6)):
        moved = WeightDelta(SITE, randn(4, 2), right).to(torch.device("meta"))
        assert {t.device.type for t in moved.tensors.values()} == {"meta"}
        assert moved.site is SITE
        assert (moved.right is None) == (right is None)


def test_effects_and_patches_are_shown_without_their_numbers():
    delta = WeightDelta(SITE, randn(40, 2), randn(2, 60))
    swap = ModuleSwap("layers.1", "shift", {"text": "long"}, {"by": randn(50)})
    call = CallEffect("preface", {}, {"by": randn(50)})
    patch = Patch("by-hand", (delta, swap, call), state={"moment": randn(9, 9)})

    assert repr(delta) == f"WeightDelta({SITE}, shape=(40, 60), rank=2)"
    assert repr(swap) == "ModuleSwap('layers.1', 'shift', shapes={'by': (50,)})"
    assert repr(call) == "CallEffect('preface', shapes={'by': (50,)})"
    assert repr(patch) == "Patch('by-hand', 3 effects, 0 facts)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_product_is_computed_wide_and_comes_in_the_inputs_type(dtype):
    delta = WeightDelta(SITE, randn(4, 2).to(dtype), randn(2, 6).to(dtype))
    inputs = randn(5, 6).to(torch.bfloat16)
    product = delta.product(inputs)
    expected = inputs.float() @ (delta.left.float() @ delta.right.float()).T
    assert product.dtype == torch.bfloat16
    assert delta.dense().dtype == torch.float32
    torch.testing.assert_close(product.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("left", "right"),
    [((4,), None), ((2, 4, 6), None), ((4, 2), (3, 6)), ((4, 2), (2,)), ((4, 2, 1), (2, 6))],
)
def test_shapes_that_make_no_matrix_are_refused(left, right):
    with pytest.raises(PatchError, match=r"layer\.weight"):
        WeightDelta(SITE, torch.ones(left), None if right is None else torch.ones(right))


def test_one_bad_number_anywhere_makes_an_effect_not_finite():
    good, bad = torch.ones(2, 2), torch.tensor([[1.0, float("nan")], [1.0, 1.0]])
    assert is_finite(WeightDelta(SITE, good, good))
    assert not is_finite(WeightDelta(SITE, good, bad))
    assert not is_finite(ModuleSwap("a", "shift", {}, {"x": good, "y": -bad.log()}))
    assert not is_finite(CallEffect("c", {}, {"x": torch.tensor(float("-inf"))}))
    assert is_finite(CallEffect("c", {}, {"count": torch.tensor(3)}))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("expert", [None, 1])
def test_a_site_views_the_matrix_as_d_out_by_d_in_and_shares_its_memory(transposed, expert):
    shape = (6, 4) if transposed else (4, 6)
    stored = torch.zeros(shape if expert is None else (3, *shape))
    matrix = Site("x.weight", transposed, expert).view(stored)
    assert matrix.shape == (4, 6)
    matrix[3, 5] = 7.0
    at = (5, 3) if transposed else (3, 5)
    assert stored[at if expert is None else (expert, *at)] == 7.0
    assert stored.count_nonzero() == 1
    assert Site("a.b.weight").module == "a.b"


def shifted(base: nn.Module, *vectors: torch.Tensor) -> Shift:
    return Shift.build(base, [ModuleSwap("", "shift", {}, {"vector": v}) for v in vectors])


def test_a_wrapper_adds_to_its_base_unless_it_passes_through():
    base, x = nn.Linear(3, 4), randn(2, 3)
    wrapper = shifted(base, torch.ones(4), torch.arange(4.0) - 1)
    assert wrapper.base is base
    torch.testing.assert_close(wrapper(x), base(x) + torch.arange(4.0))
    wrapper.passes_through = True
    assert torch.equal(wrapper(x), base(x))


def test_a_wrapper_changes_the_hidden_state_of_a_tuple_only():
    class Pair(nn.Module):
        def forward(self, x):
            return x, "cache"

    wrapper = shifted(Pair(), torch.ones(3))
    hidden, cache = wrapper(torch.zeros(2, 3))
    assert torch.equal(hidden, torch.ones(2, 3))
    assert cache == "cache"


def test_a_wrapper_answers_for_its_base_what_models_ask_of_it():
    base = nn.Linear(3, 4, dtype=torch.bfloat16)
    base.attention_type = "full"
    wrapper = shifted(shifted(base, torch.ones(4)), base.bias)
    assert wrapper.weight is base.weight
    assert wrapper.attention_type == "full"
    assert not hasattr(wrapper, "no_such_name")
    # An outer wrapper does not take an inner one's tensors for its own.
    assert wrapper.vector is not wrapper.base.vector


def test_a_wrapper_makes_what_takes_its_place_when_edits_come_and_go(toy_host, monkeypatch):
    host, asked = toy_host("llama"), []

    def rebuilt(wrapper, base, swaps):
        asked.append((wrapper, base, len(swaps)))
        return Shift.build(base, swaps)

    monkeypatch.setattr(Shift, "rebuilt", rebuilt)
    session, path = EditSession(host), host.mlp_out(1).module
    original, found = host.module(path), []
    for seed in range(2):
        session.apply(shift_patch(host, path, seed=seed))
        found.append(host.module(path))
    session.pop()

    assert asked == [(found[0], original, 2), (found[1], original, 1)]
    assert host.module(path).base is original


def test_a_base_class_wrapper_says_nothing_of_its_own():
    with pytest.raises(NotImplementedError):
        Wrapper(nn.Identity())(torch.ones(1))


def test_the_example_effects_follow_the_protocols():
    assert isinstance(Shift, ModuleEffect)
    said = [CallEffect("preface", {"text": text}) for text in ("a ", "b ")]
    assert Preface.build(said).prompts(["c", "d"]) == ["b a c", "b a d"]
    biases = [CallEffect("token-bias", {}, {"bias": torch.ones(2)})] * 2
    assert TokenBias.build(biases).logits(torch.zeros(1, 2), {}).tolist() == [[2.0, 2.0]]
    with pytest.raises(PatchError, match="no change of its weight matrix"):
        Shift.fold(nn.Linear(2, 2), ModuleSwap("", "shift", {}, {"vector": torch.ones(2)}))


def test_middleware_changes_nothing_of_itself():
    middleware, logits = Middleware(), torch.ones(1, 3)
    assert middleware.prompts(("a", "b")) == ["a", "b"]
    assert middleware.logits(logits, {}) is logits
