"""The middleware in force, applied to next-token logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kedit_core.effects import Middleware
from kedit_core.forward import unembed
from kedit_core.host import ModelHost

MAX_LOGITS = 1 << 27  # numbers in the logits of one batch


def depths_of(calls: Sequence[Middleware]) -> list[int]:
    """The blocks whose output the middleware reads, ascending."""
    return sorted({depth for call in calls for depth in call.depths})


def changed(
    host: ModelHost, calls: Sequence[Middleware], logits: Tensor, states: Mapping[int, Tensor]
) -> Tensor:
    """What the middleware, oldest first, makes of next-token logits.

    Args:
        host: the model.
        calls: the middleware.
        logits: (n, vocabulary).
        states: for each depth that the middleware wants the residual stream (n, d).
    """
    if not calls:
        return logits
    size = max(1, MAX_LOGITS // (logits.shape[1] * (1 + len(states))))  # rows at a time
    parts = []
    for start in range(0, len(logits), size):
        part, early = logits[start : start + size], {}
        if states:
            chunk = [s[start : start + size].to(logits.device) for s in states.values()]
            found = unembed(host, torch.cat(chunk)).to(logits)
            early = dict(zip(states, found.split(len(part)), strict=True))
        for call in calls:
            part = call.logits(part, early)
        parts.append(part)
    return torch.cat(parts)
