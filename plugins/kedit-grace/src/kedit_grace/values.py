"""Learning what a layer should write, so that a target follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kedit_core.errors import EditError
from kedit_core.numerics.tail import Tail
from kedit_core.probing import hidden_of, with_hidden

ADAM_EPS = 1e-5


@dataclass(frozen=True)
class Trained:
    """A value and how it was found.

    Attributes:
        value: (d_out,) float32, on the CPU.
        losses: mean loss of the target's tokens before each step, and after the last, in nats.
        is_right: whether each token of the target is the most likely one.
    """

    value: Tensor
    losses: tuple[float, ...]
    is_right: bool


def train_values(
    tail: Tail,
    module: nn.Module,
    spans: Sequence[range],
    start: Tensor,
    *,
    steps: int,
    lr: float,
    stop_loss: float,
) -> list[Trained]:
    """For each row of a tail the output of a module that makes the row's target likely.

    Minimises the mean negative log-likelihood of each row's target over a value of its own, with
    Adam.  Rows do not touch each other, so that they may as well be trained one by one.  A row
    stops when no token of its target has a loss above `stop_loss`.  Adam's ε is larger than usual:
    a gradient of the size of rounding would otherwise make a whole step, in either direction.

    Args:
        tail: what is repeated; its first block holds the module.
        module: the module whose output is replaced.
        spans: for each row the positions of its tokens at which it is.
        start: (rows, d_out) where the values start.
        steps: at most so many of Adam.
        lr: its learning rate.
        stop_loss: in nats.

    Raises:
        EditError: a loss is not finite.
    """
    values = start.detach().clone().float().requires_grad_(True)  # (rows, d_out)
    places, owner = _places(tail, spans)
    adam = torch.optim.Adam([values], lr=lr, eps=ADAM_EPS)
    done = torch.zeros(len(spans), dtype=torch.bool, device=values.device)
    taken = torch.zeros(len(spans), dtype=torch.long, device=values.device)
    history: list[Tensor] = []

    def write(layer: nn.Module, args: Any, output: Any) -> Any:
        shape = hidden_of(output).shape
        hidden = hidden_of(output).reshape(-1, shape[-1])
        written = values[owner.to(values.device)].to(hidden)
        changed = hidden.index_put((places.to(hidden.device),), written)
        return with_hidden(output, changed.reshape(shape))

    handle = module.register_forward_hook(write)
    try:
        for step in range(steps + 1):
            mean, worst, is_right = _losses(tail, len(spans))
            if not bool(torch.isfinite(mean).all()):
                raise EditError(
                    f"The loss became {mean.detach().tolist()} in step {step}. Lower the learning "
                    f"rate, or load the model in float32."
                )
            history.append(mean.detach())
            done |= (worst <= stop_loss).to(done.device)
            if step == steps or bool(done.all()):
                break
            adam.zero_grad()
            mean.sum().backward()
            kept = values.detach().clone()
            adam.step()
            with torch.no_grad():
                values[done] = kept[done]
            taken += (~done).long()
    finally:
        handle.remove()
    losses = torch.stack(history).cpu()
    found = values.detach().cpu()
    return [
        Trained(found[n], tuple(losses[: int(taken[n]) + 1, n].tolist()), bool(is_right[n]))
        for n in range(len(spans))
    ]


def _losses(tail: Tail, n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: mean and largest loss of the target's tokens, and whether all are predicted."""
    logits = tail.logits().float()
    loss = -torch.log_softmax(logits, dim=-1).gather(1, tail.labels[:, None])[:, 0]
    zeros = torch.zeros(n_rows, device=loss.device)
    rows = tail.label_rows
    counts = zeros.index_add(0, rows, torch.ones_like(loss))
    mean = zeros.index_add(0, rows, loss) / counts
    worst = zeros.scatter_reduce(0, rows, loss.detach(), "amax")
    return mean, worst, are_right(tail, logits.detach(), n_rows)


def are_right(tail: Tail, logits: Tensor, n_rows: int) -> Tensor:
    """Whether every token of each row's target is the most likely one: (rows,)."""
    wrong = (logits.argmax(dim=-1) != tail.labels).float()
    return torch.zeros(n_rows, device=wrong.device).index_add(0, tail.label_rows, wrong) == 0


def _places(tail: Tail, spans: Sequence[range]) -> tuple[Tensor, Tensor]:
    """Where the positions stand in the tail, and the row of each: two (positions,)."""
    places, owner = [], []
    for n in range(max(map(len, spans))):
        at = tail.places([span[min(n, len(span) - 1)] for span in spans])
        rows = torch.tensor([row for row, span in enumerate(spans) if n < len(span)])
        places.append(at[rows.to(at.device)])
        owner.append(rows)
    return torch.cat(places), torch.cat(owner)
