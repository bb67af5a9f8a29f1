"""The repeated part of a model gives what the whole model gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kedit_core.effects import ModuleSwap
from kedit_core.host import ModelHost
from kedit_core.numerics.tail import Tail
from kedit_core.testing.effects import Shift
from kedit_core.tokens import Row
from tests.core.families import BLOCKS, HIDDEN, build
from tests.numerics.tiny import DENSE, added, tiny_host, tiny_tokenizer

ROWS = (
    Row((5, 6, 7, 8, 9, 10), (11, 12), mark=3),
    Row((20, 21, 22, 23, 24, 25, 26, 27), (33,), mark=5),
    Row((40, 41, 42), (43, 44, 45), mark=2),
)
MARKS = [row.mark for row in ROWS]
FIXED = {"marks": MARKS, "nothing": [0, 0, 0], "uneven": [2, 0, 1]}


def logits_and_gradient(host: ModelHost, tail: Tail, layer: int, delta: Tensor) -> tuple:
    """Logits with a change at each row's mark, and the gradient of a loss by that change."""
    delta = delta.clone().requires_grad_(True)
    with added(host, host.mlp_out(layer).module, tail.places(MARKS), delta):
        logits = tail.logits()
    loss = torch.log_softmax(logits, -1).gather(1, tail.labels[:, None]).sum()
    (gradient,) = torch.autograd.grad(loss, delta)
    return logits.detach(), gradient


@pytest.mark.parametrize("family", DENSE)
def test_fast_way_equals_the_plain_one(family):
    host = tiny_host(family)
    delta = torch.randn(len(ROWS), HIDDEN, generator=torch.Generator().manual_seed(0))
    for layer in range(BLOCKS):
        plain = Tail(host, ROWS, layer, MARKS, plain=True)
        expected = logits_and_gradient(host, plain, layer, delta)
        unchanged = plain.logits()
        assert not torch.allclose(expected[0], unchanged, atol=1e-2)  # the change is felt
        for fixed in FIXED.values():
            tail = Tail(host, ROWS, layer, fixed)
            assert tail.is_fast
            found = logits_and_gradient(host, tail, layer, delta)
            # Float32 sums in another order.
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(tail.logits(), unchanged, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "opt"])  # others are float32 inside in any model
def test_in_float64_the_fast_way_is_the_plain_one_to_its_rounding(family):
    host = tiny_host(family, torch.float64)
    delta = torch.randn(
        len(ROWS), HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    for layer in range(BLOCKS):
        plain = Tail(host, ROWS, layer, MARKS, plain=True)
        expected = logits_and_gradient(host, plain, layer, delta)

        found = logits_and_gradient(host, Tail(host, ROWS, layer, MARKS), layer, delta)

        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_labels_are_those_of_the_rows():
    tail = Tail(tiny_host("llama"), ROWS, 1, MARKS)

    assert tail.labels.tolist() == [11, 12, 33, 43, 44, 45]
    assert tail.label_rows.tolist() == [0, 0, 1, 2, 2, 2]
    assert tail.logits().shape == (6, 100)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_are_those_of_each_row_alone(family):
    host = tiny_host(family)

    together = Tail(host, ROWS, 1, MARKS).logits()

    alone = [host.model(torch.tensor([row.ids])).logits[0, len(row.prompt) - 1 :] for row in ROWS]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_repeated_blocks_see_suffixes_without_padding_and_lower_ones_are_not_run(family):
    host = tiny_host(family)
    tail = Tail(host, ROWS, 1, MARKS)
    widths: dict[int, list[int]] = {n: [] for n in range(BLOCKS)}
    for n, calls in widths.items():
        mlp = host.base_module(host.mlp_out(n).module)
        mlp.register_forward_hook(lambda m, a, out, calls=calls: calls.append(out.shape[1]))

    tail.logits()

    # From its mark to its last label's position a row has 4, 3 and 3 tokens; it has 2, 1 and 3
    # labels, and only those are wanted of the last MLP.
    assert widths == {0: [], 1: [4 + 3 + 3], 2: [2 + 1 + 3]}


def test_wrapper_that_passes_through_needs_no_rows():
    host = tiny_host("llama")
    block = host.module(host.blocks[1].path)
    block.mlp.down_proj = Shift.build(
        block.mlp.down_proj, [ModuleSwap("", "", state={"vector": torch.ones(HIDDEN)})]
    )
    widths = []
    base = host.base_module(host.mlp_out(1).module)
    base.register_forward_hook(lambda m, a, out: widths.append(out.shape[1]))

    for passes_through in (False, True):
        block.mlp.down_proj.passes_through = passes_through
        tail = Tail(host, ROWS, 1, MARKS)
        widths.clear()
        tail.logits()
        # As above; with padding each of the three rows has four tokens.
        assert widths == [10 if passes_through else 4]


def passes_of(host: ModelHost, start: int = 1, rows=ROWS) -> int:
    """How often the model runs while a tail is made."""
    passes = []
    handle = host.model.register_forward_pre_hook(lambda m, args: passes.append(m))
    Tail(host, rows, start, [row.mark for row in rows])
    handle.remove()
    return len(passes)


def test_fast_way_is_compared_with_the_plain_one_once_for_each_structure():
    host = tiny_host("llama")
    even = [Row(row.ids[:3], row.targets[:1], mark=1) for row in ROWS]

    assert [passes_of(host) for _ in range(3)] == [2, 1, 1]
    assert [passes_of(host, start=2) for _ in range(2)] == [2, 1]
    assert [passes_of(host, rows=even) for _ in range(2)] == [2, 1]  # without padding
    block = host.module(host.blocks[2].path)
    swap = ModuleSwap("", "", state={"vector": torch.ones(HIDDEN)})
    block.mlp.down_proj = Shift.build(block.mlp.down_proj, [swap])
    assert [passes_of(host) for _ in range(2)] == [2, 1]
    host.model.bfloat16()
    assert [passes_of(host) for _ in range(2)] == [2, 1]


def test_short_suffixes_and_few_labels_are_filled_up_to_four_positions():
    host = tiny_host("llama")
    row = Row((5, 6, 7, 8, 9), (11, 12), mark=4)
    tail = Tail(host, [row], 1, [4])
    widths = []
    for path in (host.mlp_out(1).module, host.anatomy.head):
        module = host.base_module(path)
        module.register_forward_hook(lambda m, a, out: widths.append(out.shape[:2].numel()))

    logits = tail.logits()

    assert widths == [4, 4]
    expected = Tail(host, [row], 1, [4], plain=True).logits()
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    assert tail.places([4]).tolist() == [2]  # columns 2 to 5 are repeated


def test_head_sees_label_positions_only():
    host = tiny_host("llama")
    tail = Tail(host, ROWS, 0, MARKS)
    seen = []
    host.module(host.anatomy.head).register_forward_hook(
        lambda m, args, out: seen.append(out.shape)
    )

    tail.logits()

    assert seen == [(1, 6, 100)]


def test_calls_do_not_wear_out_the_cache():
    host = tiny_host("mistral")
    tail = Tail(host, ROWS, 1, MARKS)

    first = tail.logits()

    for _ in range(3):
        assert torch.equal(tail.logits(), first)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_model_is_left_without_hooks_and_replaced_forwards(family):
    host = tiny_host(family)

    Tail(host, ROWS, 2, MARKS).logits()

    for module in host.model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_sliding_window_shorter_than_the_rows_gives_the_same():
    model = build("mistral").requires_grad_(False)
    model.config.sliding_window = model.model.config.sliding_window = 4
    for block in model.model.layers:
        block.self_attn.sliding_window = 4
    host = ModelHost(model, tiny_tokenizer())
    plain = Tail(host, ROWS, 1, MARKS, plain=True).logits()
    assert not torch.allclose(plain, Tail(tiny_host("mistral"), ROWS, 1, MARKS).logits())

    torch.testing.assert_close(Tail(host, ROWS, 1, MARKS).logits(), plain, rtol=1e-3, atol=1e-4)


def test_model_that_cannot_skip_blocks_is_run_whole(caplog):
    host = tiny_host("llama")
    inner = host.model.model
    forward = inner.forward

    def counts_blocks(*args, **kwargs):
        # Reads a weight's own output of block 0 beside the residual stream, as skipping breaks.
        seen = []
        handle = inner.layers[0].mlp.register_forward_hook(lambda m, a, out: seen.append(out))
        try:
            output = forward(*args, **kwargs)
        finally:
            handle.remove()
        output.last_hidden_state = output.last_hidden_state + seen[0].mean()
        return output

    inner.forward = counts_blocks
    with caplog.at_level("INFO"):
        tail = Tail(host, ROWS, 1, MARKS)

    assert not tail.is_fast
    assert "full forward passes" in caplog.text
    assert not Tail(host, ROWS, 1, MARKS).is_fast
    plain = Tail(host, ROWS, 1, MARKS, plain=True)
    torch.testing.assert_close(tail.logits(), plain.logits())
    assert torch.equal(tail.places(MARKS), plain.places(MARKS))
