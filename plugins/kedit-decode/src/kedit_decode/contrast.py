"""DoLa's arithmetic: one distribution less another, chosen for each row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_core.editing import CallEffect, Middleware

OUT = -1000.0  # instead of -inf, so that scores stay numbers; its probability is 0 all the same


@dataclass(frozen=True, kw_only=True)
class DolaLogits(Middleware):
    """Contrasts the last layer with an early one.

    Attributes:
        depths: of the early layers.
        relative_top: least share of the highest probability that a token may have.
    """

    depths: Sequence[int]
    relative_top: float

    @classmethod
    def build(cls, calls: Sequence[CallEffect]) -> DolaLogits:
        config = calls[-1].config
        depths = tuple(map(int, config["depths"]))
        return cls(depths=depths, relative_top=float(config["relative_top"]))

    def logits(self, logits: Tensor, early: Mapping[int, Tensor]) -> Tensor:
        """As `contrast`, with `early` of the depths."""
        return contrast(logits, [early[depth] for depth in self.depths], self.relative_top)


def contrast(final: Tensor, early: Sequence[Tensor], relative_top: float) -> Tensor:
    """log q_N − log q_j* where q_N ≥ α max q_N, with j* the layer that differs most from the last.

    Args:
        final: logits of the last layer, (n, vocabulary).
        early: of each layer to choose from its logits (n, vocabulary).
        relative_top: α.

    Returns:
        (n, vocabulary), in the type of `final`; each row depends on that row alone.
    """
    last = final.float().log_softmax(dim=-1)
    if len(early) == 1:
        chosen = early[0].float().log_softmax(dim=-1)
    else:
        # One layer at a time: all of them at once would be many times the logits' memory.
        apart = [jensen_shannon(last, layer.float().log_softmax(dim=-1)) for layer in early]
        chosen = rows_of(early, torch.stack(apart).argmax(dim=0)).log_softmax(dim=-1)
    threshold = last.amax(dim=-1, keepdim=True) + math.log(relative_top)
    return torch.where(last >= threshold, last - chosen, OUT).to(final.dtype)


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """JSD(p, q) = ½ KL(p ‖ m) + ½ KL(q ‖ m), m = ½ (p + q), in nats.

    Args:
        first: log p, (n, vocabulary).
        second: log q, (n, vocabulary).

    Returns:
        (n,).
    """
    mean = torch.logaddexp(first, second) - math.log(2)
    return 0.5 * (_divergence(first, mean) + _divergence(second, mean))


def _divergence(log_p: Tensor, log_m: Tensor) -> Tensor:
    """KL(p ‖ m) of each row, in which what p excludes counts nothing."""
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_m), 0.0).sum(dim=-1)


def rows_of(early: Sequence[Tensor], layers: Tensor) -> Tensor:
    """For each row its own layer's logits, float32: (n, vocabulary).

    Args:
        early: of each layer (n, vocabulary).
        layers: (n,) number of a layer.
    """
    chosen = torch.zeros_like(early[0], dtype=torch.float32)
    for number, layer in enumerate(early):
        chosen = torch.where((layers == number)[:, None], layer.float(), chosen)
    return chosen
