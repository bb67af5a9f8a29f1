"""Optimising what a module should write at one position, so that a target becomes likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kedit_core.errors import EditError
from kedit_core.host import ModelHost
from kedit_core.numerics.losses import kl_divergence, mean_nll
from kedit_core.numerics.tail import Tail
from kedit_core.numerics.trace import Side, states_at_marks
from kedit_core.probing import hidden_of, with_hidden
from kedit_core.tokens import Row


@dataclass(frozen=True)
class ValueTask:
    """What one request optimises.

    Attributes:
        rows: prompts with their targets, marked where the change is added; the one without
            context comes first.
        anchor: a prompt whose next-token distribution at its mark should stay as it is.
    """

    rows: tuple[Row, ...]
    anchor: Row


@dataclass(frozen=True)
class ValueSettings:
    """Settings of the optimisation; see `optimise_values`."""

    steps: int
    lr: float
    weight_decay: float
    max_norm_ratio: float
    kl_weight: float
    stop_loss: float = 5e-2


@dataclass(frozen=True)
class Value:
    """Result of one task.

    Attributes:
        initial: (d,) what the module wrote at the mark of the first row, float32.
        delta: (d,) what to add to it, float32.
        losses: total loss at each step.
        nll: the target's mean negative log-likelihood over all rows at the last step.
    """

    initial: Tensor
    delta: Tensor
    losses: tuple[float, ...]
    nll: float

    @property
    def target(self) -> Tensor:
        """(d,) what the module should write."""
        return self.initial + self.delta


def optimise_values(
    host: ModelHost,
    module: str,
    layer: int,
    tasks: Sequence[ValueTask],
    settings: ValueSettings,
    *,
    plain: bool = False,
) -> list[Value]:
    """For each task the change δ of a module's output that makes its target likely.

    Minimises, with Adam from δ = 0 (Meng et al. 2022, arXiv:2202.05262, eq. 4, with the weight
    decay of its authors' code, which divides a norm by a squared one),

        mean over rows of NLL + kl_weight · KL(p₀ ‖ p_δ) + weight_decay · |δ| / |v₀|²

    where v₀ is the module's own output.  After each step |δ| is cut to max_norm_ratio · |v₀|.
    The last of the steps only measures.  A task stops when its loss is below `stop_loss`.

    Args:
        host: a causal model with frozen weights.
        module: path of the module whose output is changed; inside block `layer`.
        layer: its block.
        tasks: all optimised side by side, each with its own δ.
        settings: of the optimisation.
        plain: run the whole model in every step; the oracle of the fast way.

    Raises:
        EditError: the loss is not finite.
    """
    rows, owner = _rows_of(tasks)
    first = [task.rows[0] for task in tasks]
    initial = states_at_marks(host, first, {"own": (module, "output")})["own"].float()
    is_above = not plain and _adds_to_stream(host, module, layer, first[0])
    tail = Tail(host, rows, layer + is_above, [row.mark for row in rows], plain=plain)
    places = tail.places([row.mark for row in rows], entering=is_above)
    objective = _Objective(tail, owner, places, initial)
    changed = host.module(host.blocks[layer].path) if is_above else host.base_module(module)
    handle = changed.register_forward_hook(objective.inject)
    try:
        return objective.optimise(settings)
    finally:
        handle.remove()


def _adds_to_stream(host: ModelHost, module: str, layer: int, row: Row) -> bool:
    """Whether a change of the module's output changes its block's output by just that.

    Then the block needs no repeating.  It does not hold where the output is normalised or scaled
    before it is added, and the last block has none above it.
    """
    if layer + 1 == len(host.blocks):
        return False
    points: dict[str, tuple[str, Side]] = {"stream": (host.blocks[layer].path, "output")}
    stream = states_at_marks(host, [row], points)["stream"]
    handle = host.base_module(module).register_forward_hook(
        lambda m, args, out: with_hidden(out, hidden_of(out) + stream[0].to(hidden_of(out)))
    )
    try:
        changed = states_at_marks(host, [row], points)["stream"]
    finally:
        handle.remove()
    return bool(((changed - 2 * stream).abs() <= 1e-2 * stream.abs().max()).all())


def _rows_of(tasks: Sequence[ValueTask]) -> tuple[list[Row], list[int]]:
    """All rows, task by task, the anchor last in each; and the task of each."""
    rows: list[Row] = []
    owner: list[int] = []
    for number, task in enumerate(tasks):
        rows += [*task.rows, replace(task.anchor.until_mark, targets=(0,))]
        owner += [number] * (len(task.rows) + 1)
    return rows, owner


class _Objective:
    """The loss of all tasks as a function of their δ, and its minimisation."""

    def __init__(self, tail: Tail, owner: Sequence[int], places: Tensor, initial: Tensor) -> None:
        device = initial.device
        self.tail, self.places, self.initial = tail, places, initial
        self.n_rows, self.n_tasks = len(owner), len(initial)
        self.owner = torch.tensor(owner, device=device)
        last = [n for n in range(self.n_rows) if owner[n : n + 1] != owner[n + 1 : n + 2]]
        self.is_anchor = torch.zeros(self.n_rows, dtype=torch.bool, device=device)
        self.is_anchor[last] = True
        self.delta = torch.zeros_like(initial, requires_grad=True)

    def inject(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook: add each row's δ at its mark."""
        shape = hidden_of(output).shape
        hidden = hidden_of(output).reshape(-1, shape[-1])
        places = self.places.to(hidden.device)
        added = self.delta[self.owner].to(hidden)
        changed = hidden.index_put((places,), added, accumulate=True)
        return with_hidden(output, changed.reshape(shape))

    def optimise(self, settings: ValueSettings) -> list[Value]:
        unchanged = self.tail.unchanged[self._anchor_labels()]
        reference = torch.log_softmax(unchanged.float(), dim=-1)
        norms = self.initial.norm(dim=1)
        optimiser = torch.optim.Adam([self.delta], lr=settings.lr)
        done = torch.zeros(self.n_tasks, dtype=torch.bool, device=norms.device)
        history: list[Tensor] = []
        nll = torch.zeros(self.n_tasks)
        for step in range(settings.steps):
            optimiser.zero_grad()
            nll, loss = self._losses(reference, norms, settings)
            if not bool(torch.isfinite(loss).all()):
                raise EditError(
                    f"The loss became {loss.detach().tolist()} in step {step}. Lower the learning "
                    f"rate, or load the model in float32."
                )
            history.append(loss.detach())
            done |= loss.detach() < settings.stop_loss
            if step == settings.steps - 1 or bool(done.all()):
                break
            loss.sum().backward()
            kept = self.delta.detach().clone()
            optimiser.step()
            with torch.no_grad():
                limit = settings.max_norm_ratio * norms
                scale = (limit / self.delta.norm(dim=1).clamp(min=1e-12)).clamp(max=1)
                self.delta.mul_(scale[:, None])
                self.delta[done] = kept[done]
        losses = torch.stack(history).cpu()
        return [
            Value(
                self.initial[n].cpu(),
                self.delta.detach()[n].cpu(),
                tuple(losses[:, n].tolist()),
                float(nll[n]),
            )
            for n in range(self.n_tasks)
        ]

    def _anchor_labels(self) -> Tensor:
        return self.is_anchor[self.tail.label_rows]

    def _losses(
        self, reference: Tensor, norms: Tensor, settings: ValueSettings
    ) -> tuple[Tensor, Tensor]:
        """Per task: the mean NLL, and the whole loss."""
        logits = self.tail.logits()
        anchors = self._anchor_labels()
        labels, rows = self.tail.labels[~anchors], self.tail.label_rows[~anchors]
        per_row = mean_nll(logits[~anchors], labels, rows, self.n_rows)
        zeros = torch.zeros(self.n_tasks, device=per_row.device)
        counts = zeros.index_add(0, self.owner, (~self.is_anchor).float())
        nll = zeros.index_add(0, self.owner, per_row) / counts
        kl = kl_divergence(reference, logits[anchors])
        decay = self.delta.norm(dim=1) / norms.square()
        return nll.detach(), nll + settings.kl_weight * kl + settings.weight_decay * decay
