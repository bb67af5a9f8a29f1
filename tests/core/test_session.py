"""`EditSession` puts patches in force and takes them back bit for bit."""

from __future__ import annotations

import logging
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from kedit_core import EffectSpec, HyperParams, MethodSpec, hookimpl
from kedit_core.changes import Changes
from kedit_core.editing import (
    CallEffect,
    EditJob,
    EditSession,
    Middleware,
    ModelHost,
    ModuleSwap,
    Patch,
    Site,
    WeightDelta,
    Wrapper,
)
from kedit_core.errors import (
    EditError,
    PatchError,
    RequestError,
    SettingError,
    SiteError,
    UnknownNameError,
)
from kedit_core.plugins import discover
from kedit_core.stack import read_stack
from kedit_core.testing.effects import Shift
from kedit_core.testing.toys import TOYS, toy_folder
from tests.core.edits import (
    PROMPTS,
    based,
    bias_patch,
    bits,
    fact,
    hooks,
    logits,
    preface_patch,
    random_delta,
    same,
    shift_patch,
    weight_patch,
)
from tests.core.families import FAMILIES

ROME = {"layer": 1, "contexts": [], "second_moment": False, "steps": 4}
FT = {"layers": [1, 2], "steps": 3, "lr": 5e-3}


# -- weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("toy", TOYS)
def test_rollback_gives_back_the_same_bits(toy_host, toy, dtype):
    host = toy_host(toy, dtype)
    session, before = EditSession(host), bits(host.model)

    for seed in range(4):
        session.apply(weight_patch(host, 1, 2, seed=seed))
    changed = {name for name, t in bits(host.model).items() if not torch.equal(t, before[name])}
    session.rollback()

    assert changed == {host.mlp_out(1).parameter, host.mlp_out(2).parameter}
    assert same(bits(host.model), before)
    assert not session.is_edited


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("toy", TOYS)
def test_changes_below_the_precision_of_the_weights_add_up(toy_host, toy, dtype):
    host = toy_host(toy, dtype)
    site, session, before = host.mlp_out(1), EditSession(host), bits(host.model)
    original = host.weight(site).float()
    tiny = original.abs().mean() * torch.finfo(dtype).eps / 8
    step = WeightDelta(site, torch.full(tuple(original.shape), float(tiny)))

    for _ in range(32):
        session.apply(Patch("by-hand", (step,)))
    mark = session.savepoint()
    edited = host.weight(site).clone()
    session.apply(Patch("by-hand", (step,)))
    session.rollback(mark)

    # Float32 rounds each of the sums; a cast of a value near the middle may fall either way.
    expected = original + 32 * tiny
    assert float((edited.float() - expected).abs().max()) <= float(
        torch.finfo(dtype).eps * expected.abs().max()
    )
    assert float((edited.float() - original).mean()) == pytest.approx(float(32 * tiny), rel=0.05)
    assert torch.equal(host.weight(site), edited)
    session.rollback()
    assert same(bits(host.model), before)


def test_an_applied_change_is_the_sum_in_the_weights_orientation(session):
    site = session.host.mlp_out(1)
    stored = session.host.parameter(site).detach().clone()
    delta = random_delta(session.host, site)

    session.apply(Patch("by-hand", (delta,)))

    change = delta.left @ delta.right
    expected = stored + (change.T if site.transposed else change)
    torch.testing.assert_close(session.host.parameter(site).detach(), expected)


def test_rollback_to_a_savepoint_keeps_what_came_before(session):
    session.apply(weight_patch(session.host, 1, seed=1))
    mark, at_mark = session.savepoint(), bits(session.model)
    session.apply(weight_patch(session.host, 1, 2, seed=5))
    session.apply(weight_patch(session.host, 1, seed=9))

    session.rollback(mark)

    assert same(bits(session.model), at_mark)
    assert len(session.stack) == 1


def test_pop_takes_back_the_latest_patch_only(session):
    first, second = (weight_patch(session.host, 1, seed=s) for s in (1, 2))
    session.apply(first)
    between = bits(session.model)
    session.apply(second)

    assert session.pop().effects is second.effects
    assert same(bits(session.model), between)
    (left,) = session.stack
    assert left.effects is first.effects


def test_pop_without_an_edit_is_refused(session):
    with pytest.raises(EditError, match="No edit is in force"):
        session.pop()


def test_a_savepoint_that_was_rolled_back_is_refused(session):
    session.apply(weight_patch(session.host, 1, seed=1))
    mark = session.savepoint()
    session.rollback()
    with pytest.raises(EditError, match="rolled back already"):
        session.rollback(mark)

    session.apply(weight_patch(session.host, 1, seed=2))
    kept = bits(session.model)
    with pytest.raises(EditError, match="rolled back already"):
        session.rollback(mark)
    assert same(bits(session.model), kept)


def test_names_that_share_one_tensor_are_restored_together(toy_host):
    host = toy_host("gpt2")
    session, before = EditSession(host), bits(host.model)
    embedding, head = Site("transformer.wte.weight"), Site("lm_head.weight")
    assert host.stored(embedding) is host.stored(head)

    session.apply(Patch("by-hand", (random_delta(host, embedding, seed=1),)))
    after_one = bits(host.model)
    session.apply(Patch("by-hand", (random_delta(host, head, seed=2),)))
    after_two = bits(host.model)

    with session.suspended():
        assert same(bits(host.model), before)
    assert same(bits(host.model), after_two)
    session.pop()
    assert same(bits(host.model), after_one)
    session.apply(Patch("by-hand", (random_delta(host, head, seed=2),)))
    session.rollback()
    assert same(bits(host.model), before)


def test_changes_of_single_experts_are_taken_back(toy_host):
    model = FAMILIES["mixtral"]()
    _, tokenizer = toy_host("llama").model, toy_host("llama").tokenizer
    host = ModelHost(model, tokenizer, "experts")
    session, before = EditSession(host), bits(model)
    stacked = host.blocks[0].experts[0]
    sites = [Site(stacked.parameter, stacked.transposed, expert=n) for n in (0, 2)]

    session.apply(Patch("by-hand", tuple(random_delta(host, site) for site in sites)))
    changed = host.parameter(sites[0]).detach() != before[stacked.parameter].view(torch.float32)
    session.rollback()

    assert changed.flatten(1).any(1).tolist() == [True, False, True, False]
    assert same(bits(model), before)


@pytest.mark.parametrize("expert", [7, -1])
def test_an_expert_that_does_not_exist_is_refused(toy_host, expert):
    host = ModelHost(FAMILIES["mixtral"](), toy_host("llama").tokenizer, "experts")
    stacked = host.blocks[0].experts[0]
    delta = random_delta(host, Site(stacked.parameter, stacked.transposed, expert=0))
    site = Site(stacked.parameter, stacked.transposed, expert=expert)
    session, before = EditSession(host), bits(host.model)

    with pytest.raises(SiteError, match="4 experts"):
        session.apply(Patch("by-hand", (WeightDelta(site, delta.left, delta.right),)))
    assert same(bits(host.model), before)


# -- refusals ---------------------------------------------------------------------------------


def bad_effects(host: ModelHost) -> dict[str, tuple[object, type[Exception]]]:
    site = host.mlp_out(1)
    good = random_delta(host, site)
    return {
        "not-finite": (WeightDelta(site, good.left * float("nan"), good.right), PatchError),
        "infinite-state": (
            ModuleSwap(site.module, "shift", {}, {"vector": torch.tensor([float("inf")])}),
            PatchError,
        ),
        "wrong-shape": (WeightDelta(site, good.left[:-1], good.right), PatchError),
        "unknown-type": (ModuleSwap(site.module, "no-such-effect"), UnknownNameError),
        "wrong-kind": (ModuleSwap(site.module, "preface", {"text": ""}), PatchError),
        "no-module": (ModuleSwap("no.such.module", "shift"), SiteError),
        "whole-model": (ModuleSwap("", "shift", {}, {"vector": torch.ones(1)}), PatchError),
        "no-parameter": (WeightDelta(Site("no.such.weight"), good.left, good.right), SiteError),
        "vector": (WeightDelta(Site(_norm(host)), good.left, good.right), SiteError),
        "state-missing": (ModuleSwap(site.module, "shift"), PatchError),
        "config-missing": (CallEffect("preface"), PatchError),
    }


def _norm(host: ModelHost) -> str:
    return f"{host.anatomy.final_norm}.weight"


@pytest.mark.parametrize(
    "flaw",
    [
        "not-finite",
        "infinite-state",
        "wrong-shape",
        "unknown-type",
        "wrong-kind",
        "no-module",
        "whole-model",
        "no-parameter",
        "vector",
        "state-missing",
        "config-missing",
    ],
)
def test_a_patch_with_one_bad_effect_changes_nothing(session, flaw):
    host = session.host
    effect, error = bad_effects(host)[flaw]
    session.apply(weight_patch(host, 1, seed=3))
    before, modules = bits(host.model), list(map(id, host.model.modules()))
    good = random_delta(host, host.mlp_out(2))
    overlaid = shift_patch(host, host.blocks[2].attention).effects[0]

    with pytest.raises(error):
        session.apply(Patch("by-hand", (good, overlaid, effect, good)))

    assert same(bits(host.model), before)
    assert list(map(id, host.model.modules())) == modules
    assert len(session.stack) == 1


def test_factors_that_do_not_fit_each_other_are_refused():
    with pytest.raises(PatchError, match=r"shapes \(4, 2\) and \(3, 5\)"):
        WeightDelta(Site("x.weight"), torch.ones(4, 2), torch.ones(3, 5))


def test_an_overflow_of_16_bit_weights_is_refused(toy_host):
    host = toy_host("llama", torch.float16)
    session, before = EditSession(host), bits(host.model)
    session.apply(weight_patch(host, 1))
    kept = bits(host.model)
    site = host.mlp_out(1)
    d_out, d_in = host.weight(site).shape
    huge = WeightDelta(site, torch.full((d_out, 1), 300.0), torch.full((1, d_in), 300.0))

    with pytest.raises(EditError, match="overflow"):
        session.apply(Patch("by-hand", (random_delta(host, host.mlp_out(2)), huge)))

    assert same(bits(host.model), kept)
    session.rollback()
    assert same(bits(host.model), before)


# -- overlays ---------------------------------------------------------------------------------


def test_an_overlay_answers_as_the_edit_in_place_does(session):
    patch = weight_patch(session.host, 1, 2)
    plain, before = logits(session.host), bits(session.model)
    session.apply(patch)
    in_place = logits(session.host)
    session.rollback()

    session.apply(patch, overlay=True)

    assert same(bits(session.model), before)
    assert (in_place - plain).abs().max() > 0.01
    # Both are float32; only the order of the additions differs.
    torch.testing.assert_close(logits(session.host), in_place, rtol=1e-4, atol=1e-4)
    with session.suspended():
        assert torch.equal(logits(session.host), plain)
    session.rollback()
    assert torch.equal(logits(session.host), plain)
    assert hooks(session.model) == 0


@pytest.mark.parametrize("site", ["expert", "embedding"])
def test_what_cannot_be_overlaid_is_refused(toy_host, site):
    if site == "expert":
        host = ModelHost(FAMILIES["mixtral"](), toy_host("llama").tokenizer, "experts")
        stacked = host.blocks[0].experts[0]
        delta = random_delta(host, Site(stacked.parameter, stacked.transposed, expert=1))
    else:
        host = toy_host("llama")
        delta = random_delta(host, Site("model.embed_tokens.weight"))
    session = EditSession(host)
    with pytest.raises(PatchError, match="overlaid"):
        session.apply(Patch("by-hand", (delta,)), overlay=True)
    assert hooks(host.model) == 0


# -- modules and calls ------------------------------------------------------------------------


def test_a_swapped_module_comes_back_as_the_same_object(session):
    path = session.host.mlp_out(1).module
    original, plain = session.host.module(path), logits(session.host)

    session.apply(shift_patch(session.host, path))
    wrapper = session.host.module(path)
    assert isinstance(wrapper, Wrapper)
    assert wrapper.base is original
    assert not torch.equal(logits(session.host), plain)
    with session.suspended():
        assert torch.equal(logits(session.host), plain)
    session.rollback()

    assert session.host.module(path) is original
    assert torch.equal(logits(session.host), plain)


class OtherShift(Shift):
    """As `Shift`, under another name."""


class WhereItEnds(Wrapper):
    """Changes nothing; takes down what `reading` says at each pass."""

    @classmethod
    def build(cls, base, swaps):
        wrapper = cls(base)
        wrapper.seen = []
        return wrapper

    def change(self, output, *args, **kwargs):
        now = self.reading
        rows, columns = now.end_columns()
        ends = {int(r): int(c) for r, c in zip(rows, columns, strict=True)}
        self.seen.append((now.start, now.width, now.prompt_mask().sum(1).tolist(), ends))
        return output


def with_effect(name, built, kind="module"):
    """The installed plugins, and an effect type."""

    @hookimpl
    def kedit_register_effects():
        return [EffectSpec(name, f"{__name__}:{built.__name__}", "For a test.", kind=kind)]

    module = types.ModuleType("more")
    module.kedit_register_effects = kedit_register_effects
    return discover([("more", module)])


def test_a_wrapper_knows_where_prompts_end(toy_host):
    host = toy_host("llama")
    session = EditSession(host, catalog=with_effect("where-it-ends", WhereItEnds))
    path = host.mlp_out(1).module
    session.apply(Patch("by-hand", (ModuleSwap(path, "where-it-ends"),)))
    seen = host.module(path).seen
    prompts = ["Mira Voss", "They say that Tamsin speaks"]
    short, long = (len(host.tokenizer(p)["input_ids"]) for p in prompts)

    # Read after each prompt: padding is on the right, and targets follow.
    session.view().score(prompts, ["lives in Port Sable", "well"])
    (read,) = seen
    assert (read[0], sorted(read[2])) == (0, [short, long])
    assert sorted(read[3].values()) == [short - 1, long - 1]

    # Written after each prompt: padding is on the left, and each new token is a pass.
    seen.clear()
    session.view().greedy(prompts, max_new_tokens=3)
    assert [start for start, *_ in seen] == [0, long, long + 1][: len(seen)]
    assert seen[0][2:] == ([short, long], {0: long - 1, 1: long - 1})
    assert all(entry[1:] == (1, [short, long], {}) for entry in seen[1:])

    # The model itself: a prompt ends at its last token.
    seen.clear()
    ids = host.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="right")
    host.model(**ids)
    assert seen[0][3] == {0: short - 1, 1: long - 1}

    session.rollback()
    assert hooks(host.model) == 0


def test_a_wrapper_of_an_encoder_decoder_knows_what_the_decoder_reads(toy_host):
    model = FAMILIES["t5"]()
    host = ModelHost(model, toy_host("llama").tokenizer, "t5")
    session = EditSession(host, catalog=with_effect("where-it-ends", WhereItEnds))
    path = host.mlp_out(1).module
    session.apply(Patch("by-hand", (ModuleSwap(path, "where-it-ends"),)))
    seen = host.module(path).seen
    ids, answer = torch.tensor([[5, 6, 7, 1]]), torch.tensor([[0, 8, 9]])
    mask = torch.tensor([[1, 1, 0]])
    encoded = model.get_encoder()(ids)
    ways = [
        {"input_ids": ids, "decoder_input_ids": answer},
        {"encoder_outputs": encoded, "decoder_input_ids": answer},
        {"encoder_outputs": encoded, "decoder_inputs_embeds": model.shared(answer)},
        {"encoder_outputs": encoded, "labels": answer},
    ]

    for way in ways:
        model(**way)
    model(**ways[0], attention_mask=torch.ones_like(ids), decoder_attention_mask=mask)
    assert seen == [(0, 3, [3], {0: 2})] * 4 + [(0, 3, [2], {0: 1})]
    with pytest.raises(ValueError, match="must specify"):  # the model's own words
        model()


def test_effects_of_one_type_on_a_module_share_a_wrapper(session):
    path = session.host.mlp_out(1).module
    original = session.host.module(path)
    session.apply(shift_patch(session.host, path, seed=1))
    one = logits(session.host)
    session.apply(shift_patch(session.host, path, seed=2))
    both = logits(session.host)

    assert session.host.module(path).base is original
    session.apply(shift_patch(session.host, path, seed=3))
    session.pop()
    assert torch.equal(logits(session.host), both)
    session.pop()
    assert torch.equal(logits(session.host), one)
    session.pop()
    assert session.host.module(path) is original


def test_wrappers_of_different_types_stand_in_the_order_of_edits(session):
    session = EditSession(session.host, catalog=with_effect("other-shift", OtherShift))
    path = session.host.mlp_out(1).module
    original = session.host.module(path)
    answers = []
    for seed, kind in enumerate(("shift", "other-shift", "shift")):
        patch = shift_patch(session.host, path, seed=seed)
        session.apply(replace(patch, effects=(replace(patch.effects[0], type=kind),)))
        answers.append(logits(session.host))

    outer = session.host.module(path)
    assert outer.base.base.base is original
    assert type(outer.base) is not type(outer)
    for expected in answers[-2::-1]:
        session.pop()
        assert torch.equal(logits(session.host), expected)
    session.pop()
    assert session.host.module(path) is original


class Exhausted(Shift):
    """Cannot be built while there is no memory."""

    no_memory = False

    @classmethod
    def build(cls, base, swaps):
        if cls.no_memory:
            raise torch.OutOfMemoryError("no memory")
        return super().build(base, swaps)


@pytest.mark.parametrize("fails", ["wrapper", "weights"])
def test_what_cannot_be_replayed_still_ends_at_the_original(session, monkeypatch, fails):
    host = session.host
    session = EditSession(host, catalog=with_effect("exhausted", Exhausted))
    path, before, modules = host.mlp_out(1).module, bits(host.model), list(host.model.modules())
    answers = session.view().logits(PROMPTS)
    swap = replace(shift_patch(host, path).effects[0], type="exhausted")
    for seed in range(3):
        deltas = weight_patch(host, 1, 2, seed=seed).effects
        session.apply(Patch("by-hand", (*deltas, swap, *bias_patch(host, seed).effects)))

    def refuse(*args):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(Exhausted, "no_memory", fails == "wrapper")
        if fails == "weights":
            patched.setattr(Changes, "_add", refuse)
        with pytest.raises(torch.OutOfMemoryError if fails == "weights" else PatchError):
            session.pop()
        assert len(session.stack) == 2
        assert host.module(path) in modules
        session.rollback()

    assert same(bits(host.model), before)
    assert list(host.model.modules()) == modules
    assert torch.equal(session.view().logits(PROMPTS), answers)
    assert hooks(host.model) == 0
    session.apply(weight_patch(host, 2))
    session.rollback()
    assert same(bits(host.model), before)


def test_a_wrapper_that_cannot_be_built_leaves_the_edits_before_it(session, monkeypatch):
    host = session.host
    session = EditSession(host, catalog=with_effect("exhausted", Exhausted))
    swaps = [
        replace(shift_patch(host, path).effects[0], type="exhausted")
        for path in (host.blocks[1].mlp, host.mlp_out(1).module)
    ]
    session.apply(Patch("by-hand", (*weight_patch(host, 1).effects, *swaps)))
    kept, answers = bits(host.model), logits(host)
    monkeypatch.setattr(Exhausted, "no_memory", True)

    with pytest.raises(PatchError, match="no memory"):
        session.apply(Patch("by-hand", (*weight_patch(host, 1, seed=2).effects, *swaps)))

    assert same(bits(host.model), kept)
    assert torch.equal(logits(host), answers)


def test_a_swap_inside_a_wrapped_module_reaches_what_it_names(session):
    block = session.host.blocks[1]
    inner = session.host.mlp_out(1).module
    original = session.host.module(inner)
    session.apply(shift_patch(session.host, block.mlp, seed=1))
    one = logits(session.host)

    session.apply(shift_patch(session.host, inner, seed=2))

    assert session.host.module(inner).base is original
    assert not torch.equal(logits(session.host), one)
    session.pop()
    assert session.host.module(inner) is original
    assert torch.equal(logits(session.host), one)


@pytest.mark.parametrize("overlay", [False, True])
def test_a_weight_change_reaches_a_wrapped_module(session, overlay):
    host = session.host
    patch = weight_patch(host, 1)
    session.apply(patch, overlay=overlay)
    session.apply(shift_patch(host, host.mlp_out(1).module))
    one_way = logits(host)
    session.rollback()

    session.apply(shift_patch(host, host.mlp_out(1).module))
    session.apply(patch, overlay=overlay)

    torch.testing.assert_close(logits(host), one_way, rtol=1e-5, atol=1e-5)


def test_rome_edits_a_wrapped_projection(session):
    host, request = session.host, fact()
    session.apply(shift_patch(host, host.mlp_out(1).module, scale=0.1))
    kept, before = host.module(host.mlp_out(1).module), bits(host.model)

    with session.suspended():
        plain = session.view().score([request.text], [request.target_new])[0]
    session.edit("rome", request, hparams={**ROME, "steps": 20})

    assert host.module(host.mlp_out(1).module) is kept
    after = session.view().score([request.text], [request.target_new])[0]
    assert after.mean_logprob > plain.mean_logprob + 1
    session.pop()
    assert same(bits(host.model), before)


@pytest.mark.parametrize("family", ["t5", "t5-gated", "gpt2", "qwen2", "gemma2", "opt", "bloom"])
def test_every_block_and_projection_can_be_wrapped(family, toy_host):
    model = FAMILIES[family]()
    host = ModelHost(model, toy_host("llama").tokenizer, family)
    session = EditSession(host)
    ids = torch.tensor([[5, 6, 7]])
    extra = {"decoder_input_ids": ids} if host.is_encoder_decoder else {}
    with torch.no_grad():
        plain = model(input_ids=ids, **extra).logits
    for path in (host.mlp_out(1).module, host.blocks[1].mlp, host.blocks[1].path):
        if path is None:
            continue
        session.apply(shift_patch(host, path))
        with torch.no_grad():
            assert not torch.equal(model(input_ids=ids, **extra).logits, plain)
    session.rollback()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, **extra).logits, plain)


def test_call_effects_act_in_the_order_in_which_they_came(session):
    session.apply(preface_patch("A. "))
    session.apply(preface_patch("B. "))
    asked = session.view().logits(["Mira Voss lives in"])
    session.rollback()

    plain = session.view().logits(["B. A. Mira Voss lives in"])
    assert torch.equal(asked, plain)


def test_effects_of_all_kinds_compose(session):
    host = session.host
    session.apply(weight_patch(host, 1))
    session.apply(shift_patch(host, host.blocks[2].attention))
    inner = session.view().logits(["Lo! " + p for p in PROMPTS])
    session.apply(preface_patch("Lo! "))
    bias = bias_patch(host, token=7)
    session.apply(bias)

    expected = inner + bias.effects[0].state["bias"]
    torch.testing.assert_close(session.view().logits(PROMPTS), expected, rtol=1e-5, atol=1e-5)


def test_suspended_is_the_unedited_model_and_may_be_nested(session):
    host, before = session.host, bits(session.model)
    plain = session.view().logits(PROMPTS)
    session.apply(weight_patch(host, 1, 2))
    session.apply(weight_patch(host, 1, seed=4), overlay=True)
    session.apply(shift_patch(host, host.mlp_out(2).module))
    session.apply(preface_patch("Lo! "))
    edited, edited_bits = session.view().logits(PROMPTS), bits(host.model)

    with session.suspended():
        with session.suspended():
            assert same(bits(host.model), before)
        assert same(bits(host.model), before)
        assert torch.equal(session.view().logits(PROMPTS), plain)
    assert same(bits(host.model), edited_bits)
    assert torch.equal(session.view().logits(PROMPTS), edited)


def test_suspended_puts_the_edits_back_after_an_error(session):
    session.apply(weight_patch(session.host, 1))
    edited = bits(session.model)
    with pytest.raises(KeyboardInterrupt), session.suspended():
        raise KeyboardInterrupt
    assert same(bits(session.model), edited)
    session.pop()


def test_nothing_is_edited_or_taken_back_while_suspended(session, tmp_path):
    session.apply(weight_patch(session.host, 1))
    edited = bits(session.model)
    with session.suspended():
        for call in (
            lambda: session.apply(weight_patch(session.host, 2)),
            lambda: session.edit("ft-m", fact(), hparams=FT),
            session.rollback,
            session.pop,
            lambda: session.save(tmp_path / "edits"),
            lambda: session.load(tmp_path / "edits"),
        ):
            with pytest.raises(EditError, match="suspended"):
                call()
    assert same(bits(session.model), edited)
    assert len(session.stack) == 1


# -- editing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "hparams"), [("rome", ROME), ("ft-m", FT)])
def test_an_edit_raises_the_target_and_can_be_taken_back(session, method, hparams):
    request, before = fact(), bits(session.model)
    plain = session.view().score([request.text], [request.target_new])[0]

    outcome = session.edit(method, request, hparams={**hparams, "steps": 15})

    edited = session.view().score([request.text], [request.target_new])[0]
    assert edited.mean_logprob > plain.mean_logprob + 1
    (patch,) = outcome.patches
    assert session.stack == (patch,)
    assert (patch.method, patch.requests) == (method, (request,))
    assert patch.plugin.startswith("kedit-")
    assert patch.hparams["steps"] == 15
    assert outcome.settings.origin["steps"] == "set"
    assert outcome.seconds > 0
    assert patch.base.fingerprint == session.fingerprint
    session.rollback()
    assert same(bits(session.model), before)
    assert patch.base.checksums == {
        d.site.parameter: session.host.checksum(d.site) for d in patch.deltas
    }


def test_a_trial_is_in_force_inside_its_block_only(session):
    session.apply(weight_patch(session.host, 2))
    before = bits(session.model)
    with session.trial("ft-m", fact(), hparams=FT) as outcome:
        assert session.stack[-1] is outcome.patches[0]
        assert not same(bits(session.model), before)
    assert same(bits(session.model), before)

    with pytest.raises(ZeroDivisionError), session.trial("ft-m", fact(), hparams=FT):
        1 / 0  # noqa: B018
    assert same(bits(session.model), before)
    assert len(session.stack) == 1


def test_an_edit_can_be_laid_beside_the_weights(session):
    before = bits(session.model)
    session.edit("ft-m", fact(), hparams=FT, overlay=True)
    assert session.is_overlay(0)
    assert same(bits(session.model), before)
    assert hooks(session.model) == len(FT["layers"])


def test_compare_shows_answers_without_and_with_the_edits(session):
    plain = session.view().greedy(PROMPTS, max_new_tokens=3)
    word = session.host.tokenizer(" Bern", add_special_tokens=False)["input_ids"][0]
    session.apply(bias_patch(session.host, word))

    found = session.compare(PROMPTS, max_new_tokens=3)

    assert [c.prompt for c in found] == PROMPTS
    assert [c.before for c in found] == plain
    assert {c.after for c in found} == {" Bern Bern Bern"}
    assert session.compare(PROMPTS[0], max_new_tokens=3) == found[:1]


class Settings(HyperParams):
    """How the methods of these tests behave."""

    fail_at: str = ""


class Random:
    """A method that draws its change, and counts its calls in its state."""

    def __init__(self, hparams: Settings) -> None:
        self.hparams = hparams

    def edit(self, job: EditJob) -> Patch:
        if any(r.id == self.hparams.fail_at for r in job.requests):
            raise EditError("This fact cannot be written.")
        site = job.host.mlp_out(1)
        d_out, d_in = job.host.weight(site).shape
        change = torch.randn(d_out, d_in, generator=job.generator()) * 0.01
        calls = job.state.get("calls", torch.zeros(()))
        return Patch("?", (WeightDelta(site, change),), state={"calls": calls + 1})


def random_method(max_batch: int | None = 1) -> MethodSpec:
    return MethodSpec(
        "random",
        f"{__name__}:Random",
        "Draws its change.",
        hparams=f"{__name__}:Settings",
        max_batch=max_batch,
        needs=frozenset({"subject", "ground-truth"}),
    )


@pytest.mark.parametrize(("size", "batches"), [(1, [1, 1, 1]), (2, [2, 1]), (None, [3])])
def test_requests_go_to_the_method_in_its_batches(session, size, batches):
    outcome = session.edit(random_method(size), [fact(n) for n in range(3)])
    assert [len(p.requests) for p in outcome.patches] == batches
    assert [r for p in outcome.patches for r in p.requests] == [fact(n) for n in range(3)]


def test_several_requests_are_written_all_or_none(session):
    session.edit(random_method(), fact(0))
    before, events = bits(session.model), session.stack
    with pytest.raises(EditError, match="cannot be written"):
        session.edit(random_method(), [fact(n) for n in range(3)], hparams={"fail_at": fact(2).id})
    assert same(bits(session.model), before)
    assert session.stack == events


def test_the_seed_decides_what_a_method_draws(toy_host):
    def change(session: EditSession, seed: int | None) -> torch.Tensor:
        patch = session.edit(random_method(), fact(), seed=seed).patches[0]
        assert patch.seed == (session.seed if seed is None else seed)
        session.rollback()
        return patch.deltas[0].left

    one, two = EditSession(toy_host("gpt2"), seed=3), EditSession(toy_host("gpt2"), seed=4)
    assert torch.equal(change(one, None), change(two, 3))
    assert torch.equal(change(two, None), change(one, 4))
    assert not torch.equal(change(one, 3), change(one, 4))


def test_a_methods_state_is_rolled_back_with_its_patches(session):
    def calls() -> float:
        return session.stack[-1].state["calls"].item()

    session.edit(random_method(), [fact(0), fact(1)])
    mark = session.savepoint()
    session.edit(random_method(), fact(2))
    assert calls() == 3
    session.rollback(mark)
    session.edit(random_method(), fact(2))
    assert calls() == 3
    session.rollback()
    session.edit(random_method(), fact(2))
    assert calls() == 1


def test_requests_that_lack_what_a_method_needs_are_refused_before_it_runs(session):
    bare = fact().model_copy(update={"ground_truth": ()})
    no_subject = type(bare)(prompt="Snow is", target_new="warm", ground_truth="cold")
    for request, word in ((bare, "former answer"), (no_subject, "subject")):
        with pytest.raises(RequestError, match=word):
            session.edit(random_method(), [fact(1), request])
    with pytest.raises(RequestError, match="nothing to edit"):
        session.edit(random_method(), [])
    assert not session.is_edited


@pytest.mark.parametrize("given", ["Snow is", {"prompt": "Snow is"}, ["Snow is"], [None]])
def test_what_is_no_request_is_refused_with_what_to_give(session, given):
    shown = given[0] if isinstance(given, list) else given
    with pytest.raises(RequestError) as caught:
        session.edit("ft-m", given, hparams=FT)
    assert str(caught.value).startswith(f"{shown!r} is no edit request. Give EditRequest(prompt=")


def test_a_misspelt_keyword_is_not_swallowed(session):
    with pytest.raises(TypeError, match="hparms"):
        session.edit("ft-m", fact(), hparms=FT)
    with pytest.raises(TypeError, match="overlays"), session.trial("ft-m", fact(), overlays=True):
        pass


def noisy_plugin(seen: list, fail: bool) -> types.ModuleType:
    @hookimpl
    def kedit_edit_finished(event) -> None:
        seen.append((event.method, event.patch, event.seconds))
        if fail:
            raise RuntimeError("observers may fail")

    module = types.ModuleType("noisy")
    module.kedit_edit_finished = kedit_edit_finished
    return module


def test_an_observer_that_fails_is_logged_and_does_not_stop_the_edit(toy_host, caplog):
    bad, good = [], []
    catalog = discover([("bad", noisy_plugin(bad, True)), ("good", noisy_plugin(good, False))])
    session = EditSession(toy_host("llama"), catalog=catalog)

    with caplog.at_level(logging.ERROR):
        session.edit(random_method(), [fact(0), fact(1)])

    assert [patch for _, patch, _ in bad] == [patch for _, patch, _ in good] == list(session.stack)
    assert "plugin bad failed in kedit_edit_finished" in caplog.text
    assert "observers may fail" in caplog.text


# -- files ------------------------------------------------------------------------------------


def edited(host: ModelHost) -> EditSession:
    """A session with an edit of every kind in force."""
    session = EditSession(host)
    session.edit("rome", fact(), hparams=ROME)
    session.apply(based(session, weight_patch(host, 1, 2)))
    session.apply(based(session, weight_patch(host, 2, seed=7)), overlay=True)
    session.apply(based(session, shift_patch(host, host.mlp_out(1).module)))
    session.apply(based(session, preface_patch("Lo! ")))
    session.apply(based(session, bias_patch(host, token=9, amount=0.5)))
    return session


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from kedit_core.editing import EditSession, ModelHost

torch.set_num_threads(1)
for toy, edits, out in zip(*[iter(sys.argv[1:])] * 3):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(toy)
    model = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32)
    session = EditSession(ModelHost(model, tokenizer, "again"))
    session.load(edits)
    prompts = ["Mira Voss lives in", "The country of Port Sable", "They say that Tamsin speaks"]
    torch.save(session.view().logits(prompts), out)
"""


def test_saved_edits_answer_alike_in_a_fresh_process(toy_host, tmp_path):
    arguments, expected = [], {}
    for toy in TOYS:
        session = edited(toy_host(toy))
        session.save(tmp_path / toy)
        expected[toy] = session.view().logits(PROMPTS)
        arguments += [toy_folder(toy), tmp_path / toy, tmp_path / f"{toy}.pt"]

    subprocess.run([sys.executable, "-c", LOAD, *map(str, arguments)], check=True, timeout=300)

    for toy in TOYS:
        assert torch.equal(torch.load(tmp_path / f"{toy}.pt"), expected[toy])


def test_loading_gives_back_stack_and_bits(host, tmp_path):
    session = edited(host)
    session.save(tmp_path / "edits")
    stack, after = session.stack, bits(host.model)
    session.rollback()

    session.load(tmp_path / "edits")

    assert same(bits(host.model), after)
    assert [session.is_overlay(n) for n in range(6)] == [n == 2 for n in range(6)]
    for ours, theirs in zip(session.stack, stack, strict=True):
        assert ours.requests == theirs.requests
        assert ours.hparams == theirs.hparams
        assert ours.base == theirs.base
        assert (ours.method, ours.plugin, ours.seed) == (theirs.method, theirs.plugin, theirs.seed)


@pytest.mark.parametrize("overlay", [True, False])
def test_saved_edits_can_be_loaded_the_other_way(host, tmp_path, overlay):
    session = EditSession(host)
    for seed in (1, 2):
        session.apply(based(session, weight_patch(host, 1, seed=seed)), overlay=not overlay)
    session.save(tmp_path / "edits")
    expected = logits(host)
    session.rollback()

    session.load(tmp_path / "edits", overlay=overlay)

    assert [session.is_overlay(n) for n in range(2)] == [overlay, overlay]
    torch.testing.assert_close(logits(host), expected, rtol=1e-4, atol=1e-4)


def test_edits_of_other_weights_are_refused_unless_forced(toy_host, tmp_path):
    session = EditSession(toy_host("llama"))
    session.apply(based(session, weight_patch(session.host, 1)))
    session.apply(based(session, weight_patch(session.host, 2)))
    session.save(tmp_path / "edits")
    other = EditSession(toy_host("llama", torch.bfloat16))
    before = bits(other.model)

    with pytest.raises(PatchError, match=r"other weights .* give --force, in Python force=True"):
        other.load(tmp_path / "edits")
    assert same(bits(other.model), before)
    assert not other.is_edited

    other.load(tmp_path / "edits", force=True)
    assert len(other.stack) == 2
    assert not same(bits(other.model), before)


def test_edits_of_a_matrix_that_was_edited_since_are_refused(host, tmp_path):
    session = EditSession(host)
    session.apply(based(session, weight_patch(host, 1)))
    session.save(tmp_path / "edits")
    session.rollback()
    session.apply(based(session, weight_patch(host, 1, seed=5)))
    kept = bits(host.model)

    with pytest.raises(PatchError, match="changed since"):
        session.load(tmp_path / "edits")
    assert same(bits(host.model), kept)
    session.load(tmp_path / "edits", force=True)
    assert len(session.stack) == 2


def test_edits_of_one_matrix_are_loaded_where_products_round_otherwise(
    toy_host, tmp_path, monkeypatch
):
    session = EditSession(toy_host("gpt2"))
    embedding, head = Site("transformer.wte.weight"), Site("lm_head.weight")  # one tensor
    mlp = session.host.mlp_out(1)
    for seed, site in enumerate((embedding, head, mlp, mlp)):
        patch = Patch("by-hand", (random_delta(session.host, site, seed=seed, scale=0.01),))
        session.apply(based(session, patch))
    session.save(tmp_path / "edits")
    expected = logits(session.host)
    dense = WeightDelta.dense
    monkeypatch.setattr(WeightDelta, "dense", lambda delta: dense(delta) * (1 + 1e-6))

    other = EditSession(toy_host("gpt2"))
    other.load(tmp_path / "edits")

    torch.testing.assert_close(logits(other.host), expected, rtol=1e-3, atol=1e-3)
    assert not torch.equal(logits(other.host), expected)


def test_edits_are_loaded_all_or_none(host, tmp_path):
    session = EditSession(host)
    session.apply(based(session, weight_patch(host, 1)))
    last = based(session, shift_patch(host, host.mlp_out(1).module))
    session.apply(last)
    session.save(tmp_path / "edits")
    session.rollback()
    before = bits(host.model)
    text = (tmp_path / "edits/0001/patch.json").read_text("utf-8")
    (tmp_path / "edits/0001/patch.json").write_text(text.replace('"shift"', '"shove"'), "utf-8")

    with pytest.raises(UnknownNameError, match="shove"):
        session.load(tmp_path / "edits")

    assert same(bits(host.model), before)
    assert not session.is_edited


def test_a_patch_that_was_saved_alone_is_loaded(host, tmp_path):
    session = EditSession(host)
    session.edit("ft-m", fact(), hparams=FT)
    session.stack[0].save(tmp_path / "patch")
    after = bits(host.model)
    session.rollback()
    session.load(tmp_path / "patch")
    assert same(bits(host.model), after)


def test_the_tokenizer_is_never_changed(host):
    assert isinstance(host.tokenizer, PreTrainedTokenizerFast)
    before = host.tokenizer.backend_tokenizer.to_str()
    settings = (host.tokenizer.pad_token, host.tokenizer.padding_side)
    edited(host).view().greedy(PROMPTS, max_new_tokens=2)
    assert host.tokenizer.backend_tokenizer.to_str() == before
    assert (host.tokenizer.pad_token, host.tokenizer.padding_side) == settings


# -- streams, and edits among others ----------------------------------------------------------


class Remembered(HyperParams):
    amount: float = 1.0


class RememberedShift:
    """Shifts an output by a vector drawn for the request; edits do not build on each other."""

    def __init__(self, hparams):
        self.hparams = hparams

    def edit(self, job):
        (request,) = job.requests
        seed = sum(map(ord, request.text))
        width = job.host.model.config.hidden_size
        vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
        path = job.host.mlp_out(1).module
        return Patch("remembered", (ModuleSwap(path, "shift", {}, {"vector": vector}),))


def remembering(removable=True):
    return MethodSpec(
        name="remembered",
        target=f"{__name__}:RememberedShift",
        summary="For tests.",
        hparams=f"{__name__}:Remembered",
        effect="modules",
        removable=removable,
    )


def with_method(spec):
    @hookimpl
    def kedit_register_methods():
        return [spec]

    module = types.ModuleType("remembered")
    module.kedit_register_methods = kedit_register_methods
    return discover([("remembered", module)])


def test_one_edit_is_taken_back_from_among_later_ones(toy_host):
    host = toy_host("llama")
    session = EditSession(host, catalog=with_method(remembering()))
    facts = [fact(n) for n in range(4)]
    for request in [facts[0], *facts[2:]]:
        session.edit("remembered", request)
    without = logits(host)
    session.rollback()
    for request in facts:
        session.edit("remembered", request)

    assert not torch.equal(logits(host), without)
    assert session.remove(1).requests == (facts[1],)
    assert torch.equal(logits(host), without)
    assert [patch.requests[0] for patch in session.stack] == [facts[0], *facts[2:]]


@pytest.mark.parametrize("index", [0, 1])
def test_a_trial_ends_after_an_earlier_edit_was_taken_out(toy_host, index):
    host = toy_host("llama")
    session = EditSession(host, catalog=with_method(remembering()))
    for number in range(2):
        session.edit("remembered", fact(number))
    first = session.stack[1 - index]

    with session.trial("remembered", fact(2)):
        session.edit("remembered", fact(3))
        session.remove(index)

    assert session.stack == (first,)


def test_a_savepoint_is_good_after_an_edit_below_it_was_taken_out(toy_host):
    session = EditSession(toy_host("llama"), catalog=with_method(remembering()))
    for number in range(2):
        session.edit("remembered", fact(number))
    mark, kept = session.savepoint(), session.stack[1]
    session.edit("remembered", fact(2))
    session.remove(0)

    session.rollback(mark)

    assert session.stack == (kept,)


def test_an_edit_on_which_later_ones_may_build_is_not_taken_back_alone(toy_host):
    host = toy_host("llama")
    session = EditSession(host, catalog=with_method(remembering(removable=False)))
    for number in range(2):
        session.edit("remembered", fact(number))
    edited = logits(host)

    with pytest.raises(EditError, match="may build on edit 0"):
        session.remove(0)
    with pytest.raises(EditError, match="There is no edit 2"):
        session.remove(2)

    assert torch.equal(logits(host), edited)
    assert session.remove(1).requests == (fact(1),)


def test_a_stream_is_on_disk_step_by_step_and_goes_on_in_a_new_session(toy_host, tmp_path):
    facts = [fact(n) for n in range(5)]
    whole = EditSession(toy_host("llama"), seed=0)
    for _ in whole.stream("ft-m", facts, batch=2, hparams=FT):
        pass

    folder = tmp_path / "edits"
    first = EditSession(toy_host("llama"))
    stopped = first.stream("ft-m", facts, batch=2, hparams=FT, folder=folder)
    next(stopped)
    stopped.close()
    assert [p.requests for p, _ in read_stack(folder).entries] == [tuple(facts[:2])]
    (folder / "0001").mkdir()  # a writer was stopped before it listed what it wrote
    (folder / "0001" / "patch.json").write_text("{", "utf-8")

    second = EditSession(toy_host("llama"))
    steps = list(second.stream("ft-m", facts, batch=2, hparams=FT, folder=folder))
    assert [step.patches[0].requests for step in steps] == [tuple(facts[2:4]), tuple(facts[4:])]
    assert same(bits(second.host.model), bits(whole.host.model))

    third = EditSession(toy_host("llama"))
    third.load(folder)
    assert same(bits(third.host.model), bits(whole.host.model))
    assert not list(EditSession(toy_host("llama")).stream("ft-m", facts, hparams=FT, folder=folder))


def test_a_stream_asks_for_requests_when_it_needs_them(toy_host):
    session = EditSession(toy_host("llama"))
    asked = []

    def coming():
        for number in range(4):
            asked.append(number)
            yield fact(number)

    stream = session.stream("ft-m", coming(), hparams=FT)
    next(stream)
    next(stream)

    assert asked == [0, 1]
    assert len(session.stack) == 2


def test_a_stream_refuses_the_folder_of_another(toy_host, tmp_path):
    session = EditSession(toy_host("llama"))
    list(session.stream("ft-m", [fact(0), fact(1)], hparams=FT, folder=tmp_path / "edits"))

    with pytest.raises(EditError, match="so does this session"):
        next(session.stream("ft-m", [fact(0)], hparams=FT, folder=tmp_path / "edits"))
    session.rollback()
    with pytest.raises(RequestError, match="not the first of these requests"):
        next(session.stream("ft-m", [fact(2), fact(3)], hparams=FT, folder=tmp_path / "edits"))


class OfAll(Middleware):
    """Says before each prompt how many effects it is built of."""

    def __init__(self, count):
        self.count = count

    @classmethod
    def build(cls, calls):
        return cls(len(calls))

    def prompts(self, prompts):
        return [f"{self.count} {prompt}" for prompt in prompts]


def test_call_effects_of_one_type_are_one_whatever_lies_between_them(session):
    session = EditSession(session.host, catalog=with_effect("of-all", OfAll, "call"))
    for patch in (Patch("by-hand", (CallEffect("of-all"),)), preface_patch("A. ")) * 2:
        session.apply(patch)

    assert session.view().worded(["x"]) == ["A. A. 2 x"]
    session.pop()
    assert session.view().worded(["x"]) == ["A. 2 x"]
    session.pop()
    assert session.view().worded(["x"]) == ["A. 1 x"]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"hparams": {**FT, "lr": 1e-3}}, "another lr than"),
        ({"seed": 1}, "another seed"),
        ({"overlay": True}, "another `overlay` than"),
    ],
)
def test_a_stream_does_not_go_on_with_other_settings(toy_host, tmp_path, other, named):
    folder, session = tmp_path / "edits", EditSession(toy_host("llama"))
    list(session.stream("ft-m", [fact(0)], hparams=FT, folder=folder))
    session.rollback()

    with pytest.raises(SettingError, match=named):
        next(session.stream("ft-m", [fact(0), fact(1)], folder=folder, **{"hparams": FT, **other}))

    assert not session.is_edited
    assert len(read_stack(folder).entries) == 1


def test_a_stream_may_follow_edits_of_another_kind(toy_host, tmp_path):
    folder, session = tmp_path / "edits", EditSession(toy_host("llama"))
    session.apply(weight_patch(session.host, 1))
    session.save(folder)
    session.rollback()

    list(session.stream("ft-m", [fact(0)], hparams=FT, folder=folder, overlay=True))

    assert [overlay for _, overlay in read_stack(folder).entries] == [False, True]


def test_a_stream_takes_a_single_request_and_a_folder_by_its_name(session, tmp_path):
    folder = tmp_path / "edits"
    (step,) = session.stream("ft-m", fact(0), hparams=FT, folder=str(folder))

    assert [patch.requests for patch in step.patches] == [(fact(0),)]
    assert len(read_stack(folder).entries) == 1
    with pytest.raises(RequestError, match=r"'Snow is' is no edit request"):
        next(session.stream("ft-m", "Snow is", hparams=FT))


@pytest.mark.parametrize("batch", [0, -1])
def test_a_stream_of_empty_batches_is_refused(session, batch):
    with pytest.raises(SettingError, match=f"Batches of {batch} edits"):
        next(session.stream("ft-m", [fact(0)], batch=batch, hparams=FT))


def test_a_stream_stops_where_its_session_was_rolled_back(toy_host, tmp_path):
    folder, session = tmp_path / "edits", EditSession(toy_host("llama"))
    stream = session.stream("ft-m", [fact(n) for n in range(3)], hparams=FT, folder=folder)
    next(stream)
    next(stream)
    session.pop()

    with pytest.raises(EditError, match="2 patches and this session 1"):
        next(stream)

    session.rollback()
    session.load(folder)
    assert len(session.stack) == 2


def test_a_stream_goes_on_with_other_weights_when_forced(toy_host, tmp_path):
    folder, facts = tmp_path / "edits", [fact(0), fact(1)]
    list(EditSession(toy_host("llama")).stream("ft-m", facts[:1], hparams=FT, folder=folder))
    other = EditSession(toy_host("llama", torch.bfloat16))

    with pytest.raises(PatchError, match="other weights"):
        next(other.stream("ft-m", facts, hparams=FT, folder=folder))
    next(other.stream("ft-m", facts, hparams=FT, folder=folder, force=True))

    assert len(other.stack) == 2


def test_what_the_model_alone_does_not_show_is_named(session):
    session.apply(weight_patch(session.host, 1))
    assert session.unseen_effects() == ()

    session.apply(preface_patch("x y "))

    assert [effect.type for effect in session.unseen_effects()] == ["preface"]
