"""The optimised change of a module's output, against a plain second implementation."""

from __future__ import annotations

import copy
from collections.abc import Callable
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
    optimise_values,
    target_values,
)
from kedit_core.tokens import Row
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
LAYER = 1


def optimise(host: ModelHost, tasks, settings=SETTINGS, **options) -> list[Value]:
    module = host.mlp_out(LAYER).module
    return optimise_values(host, module, LAYER, tasks, settings, **options)


@dataclass(frozen=True)
class Slow:
    """One task's loss in float64: row by row, without padding, by torch's own losses."""

    loss: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # total, NLL and KL at δ
    initial: Tensor


def slow_objective(host: ModelHost, task: ValueTask, settings: ValueSettings) -> Slow:
    model = copy.deepcopy(host.model).double()
    module = model.get_submodule(host.mlp_out(LAYER).module)

    def logits(ids: tuple[int, ...], mark: int, delta: Tensor) -> Tensor:
        place = torch.zeros(len(ids), 1, dtype=torch.float64)
        place[mark] = 1.0
        handle = module.register_forward_hook(lambda m, a, out: out + place * delta)
        try:
            return model(torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            handle.remove()

    def anchor(delta: Tensor) -> Tensor:
        ids, mark = task.anchor.prompt[: task.anchor.mark + 1], task.anchor.mark
        return log_softmax(logits(ids, mark, delta)[mark], dim=-1)

    first = task.rows[0]
    initial = plain_output(host, host.mlp_out(LAYER).module, first.ids)[first.mark].double()
    before = anchor(torch.zeros_like(initial)).detach()

    def loss(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nll = torch.stack(
            [
                cross_entropy(
                    logits(row.ids, row.mark, delta)[len(row.prompt) - 1 :],
                    torch.tensor(row.targets),
                )
                for row in task.rows
            ]
        ).mean()
        kl = kl_div(anchor(delta), before, reduction="sum", log_target=True)
        decay = delta.norm() / initial.norm() ** 2
        return nll + settings.kl_weight * kl + settings.weight_decay * decay, nll, kl

    return Slow(loss, initial)


def slow_optimise(host: ModelHost, task: ValueTask, settings: ValueSettings) -> Value:
    slow = slow_objective(host, task, settings)
    delta = torch.zeros_like(slow.initial, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.lr)
    losses = []
    for step in range(settings.steps):
        total, nll, _ = slow.loss(delta)
        losses.append(float(total.detach()))
        if step == settings.steps - 1 or losses[-1] < settings.stop_loss:
            break
        adam.zero_grad()
        total.backward()
        adam.step()
        limit = settings.max_norm_ratio * slow.initial.norm()
        with torch.no_grad():
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())
    return Value(slow.initial, delta.detach(), tuple(losses), float(nll.detach()))


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


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_loss_and_gradient_agree_with_finite_differences(family):
    host = tiny_host(family)
    slow = slow_objective(host, TASKS[0], SETTINGS)
    delta = 0.1 * torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    delta.requires_grad_(True)
    total, _, kl = slow.loss(delta)
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

    with pytest.raises(EditError, match="loss of target 0 became nan in step 0"):
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
