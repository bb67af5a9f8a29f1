"""The wrapper: what it stores, which memory a row gets, and when that is decided."""

from __future__ import annotations

import pytest
import torch
from kedit_wise.memory import Indicator, Memories, Shard, SideMemory, pack_mask, unpack_mask
from torch import nn
from torch.nn.functional import silu

from kedit_core import PatchError
from kedit_core.editing import ModuleSwap
from kedit_core.reading import Reading

D_OUT, D_IN = 4, 6
CONFIG = {
    "shard": 0,
    "stirred": 2.0,
    "kept": 1.0,
    "transposed": False,
    "activation": "",
    "retrieve": True,
    "threshold_ratio": 0.5,
    "choice": "largest",
    "max_change": 10.0,
    "edits_per_shard": 2,
    "shards_per_memory": 2,
    "merge": "ties",
    "density": 1.0,
}


def swap(change: torch.Tensor, mask: torch.Tensor | None = None, **config: object) -> ModuleSwap:
    mask = torch.ones(change.shape, dtype=torch.bool) if mask is None else mask
    state = {"mask": pack_mask(mask), "values": change[mask]}
    return ModuleSwap("m", "wise", CONFIG | config, state)


def entry(row: int, column: int, value: float) -> torch.Tensor:
    change = torch.zeros(D_OUT, D_IN)
    change[row, column] = value
    return change


def linear() -> nn.Linear:
    base = nn.Linear(D_IN, D_OUT, bias=False)
    nn.init.constant_(base.weight, 0.25)
    return base


def read(wrapper, tokens, mask=None, ends=None, cached=0) -> torch.Tensor:
    """One pass: tokens (rows, columns) say which input of the layer is 1."""
    tokens = torch.tensor(tokens)
    rows, width = tokens.shape
    reading = wrapper.reading
    reading.start, reading.width = cached, width
    reading.mask = torch.ones(rows, cached + width).bool() if mask is None else torch.tensor(mask)
    if ends is not None:
        reading.ends = torch.tensor(ends)
    return wrapper(torch.eye(D_IN)[tokens])


def memory(*swaps: ModuleSwap, base: nn.Module | None = None) -> SideMemory:
    wrapper = SideMemory.build(base or linear(), swaps)
    wrapper.reading = Reading()
    return wrapper


@pytest.mark.parametrize("shape", [(3, 5), (8, 8), (7, 9)])
def test_masks_survive_packing(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-mask.numel() // 8)
    assert torch.equal(unpack_mask(packed, shape), mask)


def test_rows_of_a_batch_are_decided_one_by_one():
    wrapper = memory(swap(entry(1, 2, 4.0)))  # input 2 stirs it by 4, the threshold is 1
    out = read(wrapper, [[2, 2], [3, 3], [3, 2]], ends=[1, 1, 1])
    assert wrapper.chosen.tolist() == [0, -1, 0]
    added = out - 0.25
    assert added[0, :, 1].tolist() == [4.0, 4.0]
    assert added[1].abs().max() == 0
    assert added[2, :, 1].tolist() == [0.0, 4.0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side):
    wrapper = memory(swap(entry(1, 2, 4.0)))
    # The row's one token stirs by 0.8 · 4; among six of padding the mean would be below 1.
    pads = [[3] * 6 + [2], [0] * 6 + [1]] if side == "left" else [[2] + [3] * 6, [1] + [0] * 6]
    read(wrapper, [pads[0]], mask=[[bool(x) for x in pads[1]]], ends=[6 if side == "left" else 0])
    assert wrapper.chosen.tolist() == [0]
    # And padding that would stir it does not.
    pads[0] = [2 if x == 3 else 3 for x in pads[0]]
    read(wrapper, [pads[0]], mask=[[bool(x) for x in pads[1]]], ends=[6 if side == "left" else 0])
    assert wrapper.chosen.tolist() == [-1]


def test_answers_that_are_read_with_their_prompt_decide_nothing():
    wrapper = memory(swap(entry(1, 2, 4.0)))
    read(wrapper, [[3, 3, 2, 2, 2]], ends=[1])
    assert wrapper.chosen.tolist() == [-1]
    read(wrapper, [[2, 3, 3, 3, 3, 3, 3, 3]], ends=[0])
    assert wrapper.chosen.tolist() == [0]


def test_choice_stands_while_a_text_is_written():
    wrapper = memory(swap(entry(1, 2, 4.0)))
    read(wrapper, [[2, 2], [3, 3]], ends=[1, 1])
    for _ in range(3):
        out = read(wrapper, [[3], [2]], cached=2)  # tokens that would have it the other way
        assert wrapper.chosen.tolist() == [0, -1]
        assert out[1, 0, 1] == 0.25


def test_prompt_read_in_pieces_is_decided_as_a_whole():
    whole, pieces = memory(swap(entry(1, 2, 4.0))), memory(swap(entry(1, 2, 4.0)))
    read(whole, [[2, 3, 3, 3, 3]], ends=[4])
    read(pieces, [[2, 3]], ends=[4])
    assert pieces.chosen.tolist() == [0]
    read(pieces, [[3, 3, 3]], ends=[4], cached=2)
    assert whole.chosen.tolist() == pieces.chosen.tolist() == [-1]


def test_prompt_whose_end_is_read_again_and_again_is_decided_alike():
    """As where an optimisation repeats a suffix against a cache."""
    wrapper = memory(swap(entry(1, 2, 4.0)))  # the threshold is 1
    read(wrapper, [[2, 2, 3, 3]], ends=[3])
    for _ in range(20):
        read(wrapper, [[3, 3]], ends=[3], cached=2)
        assert wrapper.chosen.tolist() == [0]  # (4 + 4 + 0 + 0) / 4
    read(wrapper, [[3, 3, 3, 3, 3, 3]], ends=[7], cached=2)
    assert wrapper.chosen.tolist() == [-1]  # of eight tokens
    read(wrapper, [[3, 3]], ends=[3], cached=2)
    assert wrapper.chosen.tolist() == [0]


def test_what_was_written_between_two_questions_counts_for_nothing():
    wrapper = memory(swap(entry(1, 2, 4.0)))
    read(wrapper, [[2, 2]], ends=[1])
    for column in range(2, 12):
        read(wrapper, [[3]], ends=[1], cached=column)
    read(wrapper, [[3, 3]], ends=[13], cached=12)
    assert wrapper.chosen.tolist() == [0]  # 2 on average over the four tokens that were asked


def test_long_prompts_are_decided_by_their_mean():
    """Not by their largest token, as the authors' code does beyond 100 tokens."""
    wrapper = memory(swap(entry(1, 2, 50.0)))
    read(wrapper, [[2, *[3] * 149]], ends=[149])
    assert wrapper.chosen.tolist() == [-1]  # 50 / 150 is less than 1


def test_largest_indicator_above_its_own_threshold_wins():
    weak = swap(entry(0, 2, 3.0), stirred=2.0)
    strong = swap(entry(1, 2, 5.0), shard=2, stirred=20.0)  # its threshold is 10
    wrapper = memory(weak, strong)
    read(wrapper, [[2, 2]], ends=[1])
    assert wrapper.chosen.tolist() == [0]
    lower = swap(entry(1, 2, 5.0), shard=2, stirred=2.0)
    wrapper = memory(weak, lower)
    out = read(wrapper, [[2, 2], [4, 4]], ends=[1, 1])
    assert wrapper.chosen.tolist() == [1, -1]
    assert (out[0, 0] - 0.25).tolist() == [0.0, 5.0, 0.0, 0.0]


def test_a_memory_that_everything_stirs_much_does_not_win_for_that():
    strong = swap(entry(0, 2, 5.0), stirred=8.0, choice="relative")  # 5 of a threshold of 4
    weak = swap(entry(1, 2, 3.0), shard=2, stirred=2.0, choice="relative")  # 3 of 1
    wrapper = memory(strong, weak)
    read(wrapper, [[2, 2], [4, 4]], ends=[1, 1])
    assert wrapper.chosen.tolist() == [1, -1]


def test_a_memory_without_change_answers_nothing():
    nothing = swap(entry(0, 0, 0.0), stirred=0.0, choice="relative")
    wrapper = memory(nothing)
    read(wrapper, [[2, 2]], ends=[1])
    assert wrapper.chosen.tolist() == [-1]


def test_flattened_rows_are_taken_apart():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = linear().weight

        def forward(self, x):
            return nn.functional.linear(x.reshape(-1, D_IN), self.weight)

    wrapper = memory(swap(entry(1, 2, 4.0)), base=Flat())
    out = read(wrapper, [[3, 3], [2, 2]], ends=[1, 1])
    assert out.shape == (4, D_OUT)
    assert (out - 0.25)[:, 1].tolist() == [0, 0, 4, 4]


def test_outputs_are_not_changed_in_place_and_gradients_flow():
    class Same(nn.Module):
        weight = linear().weight
        kept = torch.zeros(1, 2, D_OUT)

        def forward(self, x):
            return self.kept

    wrapper = memory(swap(entry(1, 2, 4.0)), base=Same())
    out = read(wrapper, [[2, 2]], ends=[1])
    assert out.abs().sum() > 0
    assert Same.kept.abs().sum() == 0


def test_reading_changes_nothing_that_is_stored():
    """The authors' code merges, and keeps what it merged, whenever the model is asked."""
    shards = [swap(entry(n, 2, 4.0), shard=n, retrieve=False) for n in range(3)]
    wrapper = memory(*shards)
    before, state = wrapper.changes[0].clone(), [s.state["values"].clone() for s in shards]
    for _ in range(5):
        read(wrapper, [[2, 2]], ends=[1])
    assert torch.equal(wrapper.changes[0], before)
    assert all(torch.equal(s.state["values"], old) for s, old in zip(shards, state, strict=True))
    assert torch.equal(memory(*shards).changes[0], before)


# -- edits to memories ---------------------------------------------------------------------------


def test_shard_is_the_sum_of_its_edits_inside_its_mask():
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(D_OUT, D_IN, generator=g) < 0.5
    changes = [torch.randn(D_OUT, D_IN, generator=g) * mask for _ in range(3)]
    shard = Shard.of(linear().weight, [swap(change, mask) for change in changes])
    torch.testing.assert_close(shard.change, sum(changes))
    assert (shard.change[~mask] == 0).all()


def test_sum_without_an_edit_keeps_to_the_bound():
    up, down = swap(entry(0, 0, 9.0), max_change=1.0), swap(entry(0, 0, -8.5), max_change=1.0)
    weight = linear().weight
    assert Shard.of(weight, [up, down]).change[0, 0] == 0.5
    assert Shard.of(weight, [up]).change[0, 0] == 1.0


def test_least_stirring_edit_sets_the_threshold_and_leaves_it_when_taken_back():
    swaps = [swap(entry(0, 0, 1.0), stirred=s) for s in (4.0, 2.0, 6.0)]
    (found,) = Memories(linear().weight, swaps).found
    assert found.threshold == 1.0
    (found,) = Memories(linear().weight, [swaps[0], swaps[2]]).found
    assert found.threshold == 2.0


def test_full_groups_are_merged_and_others_stand_alone():
    first, second, third = (entry(n, n, 1.0 + n) for n in range(3))
    swaps = [swap(first), swap(first), swap(second, shard=1, stirred=8.0)]
    assert len(Memories(linear().weight, swaps).found) == 2  # the second shard has room
    swaps.append(swap(second, shard=1, stirred=8.0))
    (merged,) = Memories(linear().weight, swaps).found
    torch.testing.assert_close(merged.change, 2 * first + 2 * second)  # TIES: both whole
    assert merged.threshold == 1.0
    found = Memories(linear().weight, [*swaps, swap(third, shard=2, stirred=6.0)]).found
    assert [m.threshold for m in found] == [1.0, 3.0]
    torch.testing.assert_close(found[1].change, third)


def test_one_memory_accumulates_with_its_weights():
    shared = [entry(0, 0, value) for value in (1.0, 3.0, 10.0)]
    swaps = [swap(c, shard=n, retrieve=False) for n, c in enumerate(shared)]
    (found,) = Memories(linear().weight, swaps).found
    # The first two: 2. Then 0.6 of it and 0.4 of the newest.
    assert float(found.change[0, 0]) == pytest.approx(0.6 * 2 + 0.4 * 10)


def random_swaps(count: int, **config: object) -> list[ModuleSwap]:
    """Two edits in each shard, two shards in each group."""
    g = torch.Generator().manual_seed(0)
    changes = [torch.randn(D_OUT, D_IN, generator=g) for _ in range(count)]
    return [
        swap(c, shard=n // 2, stirred=1.0 + n, density=0.6, max_change=1.0, **config)
        for n, c in enumerate(changes)
    ]


@pytest.mark.parametrize("config", [{}, {"retrieve": False}, {"kept": 0.9}])
def test_memories_that_grow_and_shrink_are_those_that_are_made_at_once(config):
    swaps = random_swaps(11, **config)
    stacks = [swaps[:n] for n in range(1, 12)]  # one after the other
    stacks += [swaps[:4] + swaps[5:], swaps[1:], swaps[:3], swaps]  # some go, some come back
    wrapper, base = memory(swaps[0]), linear()
    for stack in stacks:
        wrapper, fresh = wrapper.rebuilt(base, stack), SideMemory.build(base, stack)
        assert torch.equal(wrapper.thresholds, fresh.thresholds)
        assert all(torch.equal(a, b) for a, b in zip(wrapper.changes, fresh.changes, strict=True))


def test_memories_that_depend_on_the_weight_follow_it():
    swaps, base = random_swaps(3, kept=0.9), linear()
    wrapper = SideMemory.build(base, swaps[:2])
    nn.init.constant_(base.weight, 4.0)
    after = wrapper.rebuilt(base, swaps)
    assert torch.equal(after.changes[0], SideMemory.build(base, swaps).changes[0])


def test_an_edit_makes_only_the_shard_that_it_is_in(monkeypatch):
    swaps, made = random_swaps(23), list[int]()
    whole = Shard.of
    monkeypatch.setattr(
        Shard,
        "of",
        lambda weight, swaps, begun=None: (
            made.append(len(swaps) - (begun.count if begun else 0)) or whole(weight, swaps, begun)
        ),
    )
    wrapper, base = memory(*swaps[:21]), linear()
    made.clear()
    wrapper = wrapper.rebuilt(base, swaps[:22])
    assert made == [1]  # the shard's other edit is in the sum already
    after = wrapper.rebuilt(base, swaps)
    assert made == [1, 1]
    assert after.changes[0] is wrapper.changes[0]  # nor is a group merged again


def test_decay_outside_the_mask_is_one_number():
    weight = linear().weight.detach()
    mask = torch.zeros(D_OUT, D_IN).bool()
    mask[0] = True
    swaps = [swap(entry(0, 0, 1.0), mask, kept=0.9) for _ in range(2)]
    shard = Shard.of(weight, swaps)
    torch.testing.assert_close(shard.change[1:], (0.81 - 1) * weight[1:])
    torch.testing.assert_close(shard.change[0], entry(0, 0, 2.0)[0])


def test_transposed_weights_are_turned():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.arange(24.0).reshape(D_IN, D_OUT))

        def forward(self, x):
            return x @ self.weight

    mask = torch.zeros(D_OUT, D_IN).bool()
    wrapper = memory(swap(entry(0, 0, 0.0), mask, kept=0.5, transposed=True), base=Turned())
    torch.testing.assert_close(wrapper.changes[0], -0.5 * Turned().weight.T)


def test_indicators():
    outputs, added = torch.randn(5, 3), torch.randn(5, 3)
    paper, legacy = Indicator()(outputs, added), Indicator("silu")(outputs, added)
    torch.testing.assert_close(paper, added.square().sum(-1).sqrt())
    torch.testing.assert_close(legacy, (silu(outputs + added) - silu(outputs)).norm(dim=-1))


@pytest.mark.parametrize(
    "config", [{"activation": "no-such"}, {"merge": "no-such"}, {"choice": "no-such"}]
)
def test_unknown_settings_of_a_file_are_refused_before_the_model_is_asked(config):
    with pytest.raises(PatchError, match="'no-such'"):
        memory(swap(entry(0, 0, 1.0)), swap(entry(0, 0, 1.0), **config), swap(entry(0, 0, 1.0)))


def test_folding_is_refused_with_a_reason():
    with pytest.raises(PatchError, match="Which prompts"):
        SideMemory.fold(linear(), swap(entry(0, 0, 1.0)))
