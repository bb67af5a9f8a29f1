"""States at marked positions, and at all tokens, are those of a full forward pass."""

from __future__ import annotations

import pytest
import torch

from kedit_core.numerics.states import states_at_marks, watch_tokens
from kedit_core.tokens import Row
from tests.numerics.tiny import plain_output, tiny_host

ROWS = (
    Row((5, 6, 7, 8, 9, 10), (11, 12), mark=3),
    Row((20, 21, 22), (33,), mark=0),
    Row((40, 41, 42, 43, 44, 45, 46, 47), (48,), mark=7),
    Row((5, 6), mark=1),
)


@pytest.mark.parametrize("max_tokens", [4096, 8, 1], ids=["one batch", "some", "row by row"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "falcon", "opt", "gpt_neox"])
def test_states_are_those_of_the_full_forward_pass(family, max_tokens, monkeypatch):
    monkeypatch.setattr("kedit_core.numerics.states.MAX_TOKENS", max_tokens)
    host = tiny_host(family)
    down, block = host.mlp_out(1).module, host.blocks[0].path
    points = {"key": (down, "input"), "value": (down, "output"), "stream": (block, "output")}

    states = states_at_marks(host, ROWS, points)

    assert set(states) == set(points)
    for name, (path, side) in points.items():
        assert states[name].shape[0] == len(ROWS)
        for found, row in zip(states[name], ROWS, strict=True):
            expected = plain_output(host, path, row.ids, side)[row.mark]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_states_at_all_tokens_are_those_of_each_row_alone(family):
    host = tiny_host(family)
    down = host.mlp_out(1).module
    points = {"key": (down, "input"), "value": (down, "output")}
    found: dict[str, torch.Tensor] = {}

    watch_tokens(host, ROWS, points, found.__setitem__)

    for name, (path, side) in points.items():
        alone = torch.cat([plain_output(host, path, row.ids, side) for row in ROWS])
        torch.testing.assert_close(found[name], alone, rtol=1e-3, atol=1e-4)


def test_what_stands_after_the_mark_is_not_read():
    host = tiny_host("llama")
    lengths = []
    host.module(host.blocks[0].path).register_forward_hook(
        lambda m, args, out: lengths.append(args[0].shape[:2])
    )

    states_at_marks(host, [ROWS[0]], {"key": (host.mlp_out(1).module, "input")})

    assert lengths == [(1, ROWS[0].mark + 1)]


def test_pass_ends_at_the_last_module_that_is_wanted():
    host = tiny_host("llama")
    runs = [0, 0, 0]

    def count(layer: int):
        def add(*_: object) -> None:
            runs[layer] += 1

        return add

    for layer in range(3):
        host.module(host.blocks[layer].path).register_forward_pre_hook(count(layer))
    head = []
    host.module(host.anatomy.head).register_forward_pre_hook(lambda m, a: head.append(1))

    states_at_marks(host, ROWS, {"key": (host.mlp_out(1).module, "input")})

    assert runs == [1, 1, 0]
    assert not head


def test_hooks_are_gone_afterwards():
    host = tiny_host("gpt2")

    states_at_marks(host, ROWS, {"key": (host.mlp_out(2).module, "input")})

    for module in host.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
