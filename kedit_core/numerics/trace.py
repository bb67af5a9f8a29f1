"""What flows through a model at chosen positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kedit_core.forward import run_until
from kedit_core.host import ModelHost
from kedit_core.probing import hidden_of
from kedit_core.tokens import Row, buckets, pad

Side = Literal["input", "output"]


@torch.no_grad()
def states_at_marks(
    host: ModelHost,
    rows: Sequence[Row],
    points: Mapping[str, tuple[str, Side]],
    max_tokens: int = 4096,
) -> dict[str, Tensor]:
    """Inputs or outputs of modules at each row's mark.

    What stands after a mark cannot change it in a causal model, so rows are cut there; the pass
    ends at the last module that is wanted.

    Args:
        host: a causal model.
        rows: each with its mark in the prompt.
        points: for each name a module's path and side.
        max_tokens: of one padded batch.

    Returns:
        For each name (rows, width) in the model's type.
    """
    cut = [row.until_mark for row in rows]
    found: dict[str, list[Tensor | None]] = {name: [None] * len(rows) for name in points}
    for group in buckets([len(row.ids) for row in cut], max_tokens):
        batch = pad(host, [cut[n] for n in group])
        at = torch.tensor([cut[n].mark for n in group], device=host.device)

        def take(name: str, value: Any, group: list[int] = group, at: Tensor = at) -> None:
            hidden = hidden_of(value)
            hidden = hidden.reshape(len(group), -1, hidden.shape[-1])  # OPT flattens rows
            picked = hidden[torch.arange(len(group), device=hidden.device), at.to(hidden.device)]
            for n, state in zip(group, picked, strict=True):
                found[name][n] = state

        run_until(host, batch, points, take)
    return {
        name: torch.stack([state for state in states if state is not None])
        for name, states in found.items()
    }
