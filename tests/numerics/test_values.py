"""The optimised change of a module's output, against a plain second implementation."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from kedit_core.errors import EditError
from kedit_core.host import ModelHost
from kedit_core.numerics.values import (
    Value,
    ValueSettings,
    ValueTask,
    memory_chunks,
    optimise_values,
    target_values,
)
from kedit_core.tokens import Row
from tests.core.families import VOCABULARY
from tests.numerics.tiny import job_on, plain_output, tiny_host

SETTINGS = ValueSettings(
    steps=6, lr=0.3, weight_decay=0.5, max_norm_ratio=4.0, kl_weight=0.0625, stop_loss=0.0
)
TASKS = (
    ValueTask(
        (
            Row((5, 6, 7, 8, 9), (11, 12), mark=2),
            Row((50, 51, 52, 5, 6, 7, 8, 9), (11, 12), mark=5),
        ),
        anchor=Row((5, 6, 7, 30, 31), mark=2),
    ),
    ValueTask((Row((20, 21, 22, 23), (33,), mark=3),), anchor=Row((23, 30, 31), mark=0)),
    ValueTask(
        (
            Row((40, 41, 42, 43, 44, 45), (46, 47, 48), mark=0),
            Row((60, 40, 41, 42, 43, 44, 45), (46, 47, 48), mark=1),
            Row((61, 62, 40, 41, 42, 43, 44, 45), (46, 47, 48), mark=2),
        ),
        anchor=Row((40, 30, 31), mark=0),
    ),
)
LEADING = (  # whose targets become the most likely ones within a few steps
    ValueTask((Row((5, 6, 7, 8, 9), (25, 10), mark=2),), TASKS[0].anchor),
    ValueTask((Row((5, 6, 7), (19,), mark=2), Row((50, 5, 6, 7), (19,), mark=3)), TASKS[0].anchor),
    TASKS[1],
)
LAYER = 1


def optimise(host: ModelHost, tasks, settings=SETTINGS, **options) -> list[Value]:
    module = host.mlp_out(LAYER).module
    return optimise_values(host, module, LAYER, tasks, settings, **options)


@dataclass(frozen=True)
class Slow:
    """One task's loss in float64: row by row, without padding, by torch's own losses."""

    # From δ (modules, d): total, NLL, KL, and whether all target tokens are the most likely ones.
    loss: Callable[..., tuple[Tensor, Tensor, Tensor, bool]]
    initial: Tensor


def slow_objective(
    host: ModelHost, task: ValueTask, settings: ValueSettings, companions: Sequence[str] = ()
) -> Slow:
    model = copy.deepcopy(host.model).double()
    paths = [host.mlp_out(LAYER).module, *companions]

    def logits(ids: tuple[int, ...], mark: int, delta: Tensor) -> Tensor:
        place = torch.zeros(len(ids), 1, dtype=torch.float64)
        place[mark] = 1.0
        handles = [
            model.get_submodule(path).register_forward_hook(
                lambda m, a, out, own=own: out + place * own
            )
            for path, own in zip(paths, delta.reshape(len(paths), -1), strict=True)
        ]
        try:
            return model(torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()

    def anchor(delta: Tensor) -> Tensor:
        ids, mark = task.anchor.prompt[: task.anchor.mark + 1], task.anchor.mark
        return log_softmax(logits(ids, mark, delta)[mark], dim=-1)

    first = task.rows[0]
    states = [plain_output(host, path, first.ids)[first.mark] for path in paths]
    initial = torch.stack(states).double()
    before = anchor(torch.zeros_like(initial)).detach()

    def loss(delta: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor, bool]:
        said = [logits(row.ids, row.mark, delta)[len(row.prompt) - 1 :] for row in task.rows]
        labels = [torch.tensor(row.targets) for row in task.rows]
        nll = torch.stack([cross_entropy(*pair) for pair in zip(said, labels, strict=True)]).mean()
        reached = all(bool((a.argmax(-1) == b).all()) for a, b in zip(said, labels, strict=True))
        kl = kl_div(anchor(delta), before, reduction="sum", log_target=True)
        norms = delta.reshape(initial.shape).norm(dim=1)
        decay = (norms / initial.norm(dim=1) ** 2).sum()
        total = factor * nll + settings.kl_weight * kl + settings.weight_decay * decay
        return total, nll, kl, reached

    return Slow(loss, initial)


def slow_optimise(
    host: ModelHost, task: ValueTask, settings: ValueSettings, companions: Sequence[str] = ()
) -> Value:
    slow = slow_objective(host, task, settings, companions)
    delta = torch.zeros_like(slow.initial, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.lr)
    losses, factor = [], 1.0
    for step in range(settings.steps):
        total, nll, kl, reached = slow.loss(delta, factor)
        losses.append(float(total.detach()))
        is_held = settings.kl_weight * float(kl.detach()) <= settings.reached_kl
        if losses[-1] < settings.stop_loss or (reached and settings.reached_kl and is_held):
            break
        if step == settings.steps - 1:
            break
        factor = settings.reached_factor if reached else 1.0
        adam.zero_grad()
        total.backward()
        adam.step()
        with torch.no_grad():
            for own, start in zip(delta, slow.initial, strict=True):
                limit = settings.max_norm_ratio * start.norm()
                if own.norm() > limit:
                    own.mul_(limit / own.norm())
    return Value(slow.initial[0], delta.detach()[0], tuple(losses), float(nll.detach()))


def assert_same(found: Value, expected: Value, tolerance: float = 1e-3) -> None:
    # Float32 sums in another order; Adam's first steps, ±lr each, amplify that.
    assert len(found.losses) == len(expected.losses)
    torch.testing.assert_close(found.initial.double(), expected.initial.double(), rtol=0, atol=1e-4)
    difference = (found.delta.double() - expected.delta.double()).norm()
    assert float(difference) <= tolerance * float(expected.delta.norm())
    assert found.losses == pytest.approx(expected.losses, rel=1e-3)
    assert found.nll == pytest.approx(expected.nll, rel=1e-3)


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_equals_the_slow_way(family, plain):
    host = tiny_host(family)

    found = optimise(host, TASKS, plain=plain)

    for value, task in zip(found, TASKS, strict=True):
        assert_same(value, slow_optimise(host, task, SETTINGS))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_companion_in_the_attention_has_a_change_of_its_own(family):
    """Fault: it is added where rows would stand without the padding that attention keeps."""
    host = tiny_host(family)
    companions = (host.block(LAYER).attention_out.module,)
    settings = replace(SETTINGS, max_norm_ratio=0.5)

    found = optimise(host, TASKS, settings, companions=companions)

    for value, task in zip(found, TASKS, strict=True):
        assert_same(value, slow_optimise(host, task, settings, companions))


@pytest.mark.parametrize("factor", [0.1, 1.0])
def test_target_that_leads_counts_less_and_is_done_when_the_anchor_is_held(factor):
    host = tiny_host("gpt2")
    leads = replace(SETTINGS, steps=14, kl_weight=1.0, reached_factor=factor)
    held = replace(leads, reached_kl=0.1)

    found = {own: optimise(host, LEADING, own) for own in (leads, held)}

    for own, values in found.items():
        for value, task in zip(values, LEADING, strict=True):
            assert_same(value, slow_optimise(host, task, own), 5e-3)
    first = optimise(host, LEADING, replace(leads, stop="most-probable"))
    lengths, firsts = ([len(value.losses) for value in values] for values in (found[held], first))
    assert any(n > m for n, m in zip(lengths, firsts, strict=True))  # the anchor had moved
    assert min(lengths) < 14


def test_most_probable_stops_at_the_first_step_in_which_all_tokens_lead():
    host = tiny_host("gpt2")
    settings = replace(SETTINGS, steps=30, stop="most-probable")

    for value, task in zip(optimise(host, LEADING, settings), LEADING, strict=True):
        count = len(value.losses)
        assert 1 < count < 30
        slow, one = slow_objective(host, task, settings), replace(settings, stop="loss")
        for steps in range(1, count + 1):
            (upto,) = optimise(host, [task], replace(one, steps=steps))
            assert slow.loss(upto.delta.double())[3] == (steps == count)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_loss_and_gradient_agree_with_finite_differences(family):
    host = tiny_host(family)
    slow = slow_objective(host, TASKS[0], SETTINGS)
    delta = 0.1 * torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    delta.requires_grad_(True)
    total, _, kl, _ = slow.loss(delta)
    (gradient,) = torch.autograd.grad(total, delta)
    scale = float(gradient.abs().max())

    assert float(kl.detach()) > 0
    for n in range(0, 32, 7):
        step = torch.zeros_like(delta)
        step[n] = 1e-2  # Llama computes its norms in float32: smaller steps drown in rounding
        with torch.no_grad():
            slope = (slow.loss(delta + step)[0] - slow.loss(delta - step)[0]) / 2e-2
        assert float(slope) == pytest.approx(float(gradient[n]), abs=1e-2 * scale)


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon"])
def test_tasks_side_by_side_give_what_each_gives_alone(family):
    host = tiny_host(family)

    together = optimise(host, TASKS)

    for value, task in zip(together, TASKS, strict=True):
        (alone,) = optimise(host, [task])
        assert_same(value, alone)


@pytest.mark.parametrize("family", ["gpt2", "opt"])  # Llama's norms are float32 in any model
def test_in_float64_all_ways_agree_to_its_rounding(family):
    host = tiny_host(family, torch.float64)

    together, plain = optimise(host, TASKS), optimise(host, TASKS, plain=True)

    for value, other, task in zip(together, plain, TASKS, strict=True):
        (alone,) = optimise(host, [task])
        for same in (alone, other):
            assert value.delta.dtype == torch.float64
            torch.testing.assert_close(value.delta, same.delta, rtol=1e-8, atol=1e-10)
            assert value.losses == pytest.approx(same.losses, rel=1e-10)


def test_tasks_that_stop_or_are_cut_do_not_disturb_the_others():
    host = tiny_host("llama")
    alone = [optimise(host, [task], replace(SETTINGS, steps=30))[0] for task in TASKS]
    # A bound at which one task stops early and another goes on to the end.
    by_end = sorted(min(value.losses) for value in alone)
    stop = (by_end[0] + by_end[-1]) / 2
    settings = replace(SETTINGS, steps=30, stop_loss=stop, max_norm_ratio=1.0)
    alone = [optimise(host, [task], settings)[0] for task in TASKS]
    lengths = {len(value.losses) for value in alone}
    assert len(lengths) > 1  # somebody stopped earlier

    together = optimise(host, TASKS, settings)

    for found, expected in zip(together, alone, strict=True):
        difference = (found.delta - expected.delta).norm()
        assert float(difference) <= 5e-3 * float(expected.delta.norm())
        assert found.losses == pytest.approx(expected.losses, rel=5e-3, abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_fast_way_equals_the_plain_one(family):
    host = tiny_host(family)

    fast, plain = optimise(host, TASKS), optimise(host, TASKS, plain=True)

    for a, b in zip(fast, plain, strict=True):
        assert_same(a, b)


def test_change_makes_the_target_likely():
    (value,) = optimise(tiny_host("llama"), TASKS[1:2], replace(SETTINGS, steps=25, lr=0.5))

    assert value.losses[-1] < 0.2 * value.losses[0]
    assert value.nll < value.losses[-1]


@pytest.mark.parametrize("ratio", [0.05, 0.5])
def test_change_is_held_below_its_bound(ratio):
    host = tiny_host("gpt2")

    for value in optimise(host, TASKS, replace(SETTINGS, max_norm_ratio=ratio)):
        bound = ratio * float(value.initial.norm())
        assert float(value.delta.norm()) == pytest.approx(bound, rel=1e-5)


def test_last_step_only_measures():
    host = tiny_host("llama")
    one, two = (replace(SETTINGS, steps=n, lr=0.25, max_norm_ratio=1e6) for n in (1, 2))

    (first,), (second,) = optimise(host, TASKS[:1], one), optimise(host, TASKS[:1], two)

    assert len(first.losses) == 1
    assert float(first.delta.norm()) == 0.0
    assert len(second.losses) == 2
    # Adam's first update is the learning rate in each coordinate.
    torch.testing.assert_close(second.delta.abs(), torch.full((32,), 0.25), rtol=1e-3, atol=0)


def test_stops_as_soon_as_the_loss_is_small():
    host = tiny_host("llama")
    (free,) = optimise(host, TASKS[:1], replace(SETTINGS, steps=20))
    bound = (free.losses[4] + free.losses[5]) / 2
    assert min(free.losses[:5]) > bound > free.losses[5]

    (value,) = optimise(host, TASKS[:1], replace(SETTINGS, steps=20, stop_loss=bound))

    assert value.losses == free.losses[:6]
    (shorter,) = optimise(host, TASKS[:1], replace(SETTINGS, steps=6))
    assert torch.equal(value.delta, shorter.delta)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_initial_is_what_the_module_writes_for_the_first_row(family):
    host = tiny_host(family)

    values = optimise(host, TASKS, replace(SETTINGS, steps=2))

    for value, task in zip(values, TASKS, strict=True):
        row = task.rows[0]
        written = plain_output(host, host.mlp_out(LAYER).module, row.ids)[row.mark]
        torch.testing.assert_close(value.initial, written, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(value.target, written + value.delta, rtol=1e-4, atol=1e-4)


def test_anchor_costs_nothing_at_the_start_and_something_after_a_step():
    host = tiny_host("llama")
    free, held = (replace(SETTINGS, steps=2, kl_weight=w, weight_decay=0.0) for w in (0.0, 100.0))

    (without,), (with_anchor,) = optimise(host, TASKS[:1], free), optimise(host, TASKS[:1], held)

    assert with_anchor.losses[0] == pytest.approx(without.losses[0], abs=1e-4)
    kl = slow_objective(host, TASKS[0], held).loss(with_anchor.delta.double())[2]
    assert float(kl) > 1e-3
    assert with_anchor.losses[1] - with_anchor.nll == pytest.approx(100 * float(kl), rel=1e-3)


def test_anchor_holds_its_distribution_in_place():
    host = tiny_host("llama")
    moved = []
    for weight in (0.0, 10.0):
        settings = replace(SETTINGS, steps=20, kl_weight=weight)
        (value,) = optimise(host, TASKS[:1], settings)
        slow = slow_objective(host, TASKS[0], settings)
        moved.append(float(slow.loss(value.delta.double())[2].detach()))

    assert moved[1] < 0.2 * moved[0]


def test_loss_that_is_no_number_is_an_error_and_leaves_no_hook():
    host = tiny_host("llama")
    host.model.lm_head.weight[7, 3] = torch.nan

    text = host.tokenizer.decode(TASKS[0].rows[0].prompt)
    with pytest.raises(EditError, match=re.escape(f"after {text!r} became nan in step 0")):
        optimise(host, TASKS)

    assert not any(module._forward_hooks for module in host.model.modules())


def test_weights_and_gradients_are_left_alone():
    host = tiny_host("gpt2")
    before = {name: p.clone() for name, p in host.model.named_parameters()}

    optimise(host, TASKS)

    for name, parameter in host.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_same_tasks_give_the_same_bits():
    first, second = (optimise(tiny_host("llama"), TASKS) for _ in range(2))

    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.delta, b.delta)
        assert a.losses == b.losses


def test_own_decay_of_a_task_replaces_the_general_one():
    host = tiny_host("llama")
    (plain,) = optimise(host, TASKS[:1])
    weight = SETTINGS.weight_decay / float(plain.initial.norm()) ** 2

    same, other = optimise(host, [replace(TASKS[0], decay=d) for d in (weight, 100 * weight)])

    assert_same(same, plain)
    assert other.delta.norm() < 0.9 * same.delta.norm()


def test_kept_values_of_other_decays_are_not_taken(tmp_path):
    host = tiny_host("llama")
    job, module = job_on(host, tmp_path), host.mlp_out(LAYER).module
    tasks = [[replace(TASKS[0], decay=decay)] for decay in (0.1, 10.0, 0.1)]

    found = [target_values(job, module, LAYER, own, SETTINGS)[0].delta for own in tasks]

    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1])
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_kept_values_serve_other_batches(tmp_path, monkeypatch):
    host = tiny_host("llama")
    job, module = job_on(host, tmp_path), host.mlp_out(LAYER).module
    first = target_values(job, module, LAYER, TASKS[:2], SETTINGS)
    asked = []
    real = optimise_values

    def counted(host, module, layer, tasks, settings, **others):
        asked.append(list(tasks))
        return real(host, module, layer, tasks, settings, **others)

    monkeypatch.setattr("kedit_core.numerics.values.optimise_values", counted)
    found = target_values(job, module, LAYER, [TASKS[2], TASKS[1], TASKS[0]], SETTINGS)

    assert asked == [[TASKS[2]]]
    for kept, value in zip(first, (found[2], found[1]), strict=True):
        assert torch.equal(kept.delta, value.delta)
        assert torch.equal(kept.initial, value.initial)
        assert (kept.losses, kept.nll) == (value.losses, value.nll)


def test_memory_counts_positions_and_the_logits_of_labels(monkeypatch):
    host = tiny_host("llama")
    task = ValueTask((Row((5, 6, 7), (8, 9), mark=2),), anchor=Row((5, 6), mark=1))
    site = host.mlp_out(LAYER)
    numbers = 16 * host.anatomy.hidden_size + 6 * host.weight(site).shape[1]
    # The last two tokens read, in float32; two labels and the anchor's.
    needed = 2 * numbers * 4 * (len(host.blocks) - LAYER) + 3 * 16 * VOCABULARY

    for room, sizes in ((2 * needed, [2, 1]), (2 * needed - 1, [1, 1, 1])):
        monkeypatch.setattr("kedit_core.numerics.values.free_bytes", lambda device, room=room: room)
        assert [len(chunk) for chunk in memory_chunks(host, LAYER, [task] * 3)] == sizes


def test_kept_values_with_a_companion_are_not_taken_without_it(tmp_path):
    host = tiny_host("llama")
    job, module = job_on(host, tmp_path), host.mlp_out(LAYER).module
    companions = (host.block(LAYER).attention_out.module,)

    (alone,) = target_values(job, module, LAYER, TASKS[1:2], SETTINGS)
    (beside,) = target_values(job, module, LAYER, TASKS[1:2], SETTINGS, companions=companions)

    assert not torch.allclose(alone.delta, beside.delta)


def test_penalty_sees_tasks_that_it_relates_together(monkeypatch):
    host = tiny_host("llama")
    seen = []

    class Apart:
        watch = ()

        def __call__(self, owner, delta, states):
            seen.append(len(delta))
            return delta.new_zeros(len(delta))

    monkeypatch.setattr("kedit_core.numerics.values.free_bytes", lambda device: 1)  # no room

    optimise(host, TASKS, penalty=Apart())
    assert set(seen) == {1}
    seen.clear()
    optimise(host, TASKS, penalty=Apart(), together=True)
    assert set(seen) == {len(TASKS)}
