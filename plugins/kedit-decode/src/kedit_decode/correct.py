"""DeCo's arithmetic: logits of the layer that is surest of a candidate, added for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_core.editing import CallEffect, Middleware
from kedit_decode.contrast import OUT, rows_of


@dataclass(frozen=True, kw_only=True)
class DecoLogits(Middleware):
    """Adds the logits of an early layer.

    Attributes:
        depths: of the early layers.
        alpha: weight of their logits.
        top_p, top_k: which tokens are candidates.
    """

    depths: Sequence[int]
    alpha: float
    top_p: float
    top_k: int

    @classmethod
    def build(cls, calls: Sequence[CallEffect]) -> DecoLogits:
        config = calls[-1].config
        return cls(
            depths=tuple(map(int, config["depths"])),
            alpha=float(config["alpha"]),
            top_p=float(config["top_p"]),
            top_k=int(config["top_k"]),
        )

    def logits(self, logits: Tensor, early: Mapping[int, Tensor]) -> Tensor:
        """As `correct`, with `early` of the depths."""
        layers = [early[depth] for depth in self.depths]
        return correct(logits, layers, self.alpha, self.top_p, self.top_k)


def correct(
    final: Tensor, early: Sequence[Tensor], alpha: float, top_p: float, top_k: int
) -> Tensor:
    """logits_N + α m logits_ℓ* on the candidates C.

    C are the likeliest tokens of the last layer; (ℓ*, c*) is where max over layers and c ∈ C of
    q_ℓ(c) is reached, and m is that maximum.

    Args:
        final: logits of the last layer, (n, vocabulary).
        early: of each layer to choose from its logits (n, vocabulary).
        alpha: α.
        top_p: C is the smallest set of the likeliest tokens that has this probability,
        top_k: cut to this size.

    Returns:
        (n, vocabulary), in the type of `final`; each row depends on that row alone.
    """
    wide = final.float()
    best = wide.softmax(dim=-1).topk(min(top_k, wide.shape[-1]), dim=-1)
    is_candidate = best.values.cumsum(dim=-1) - best.values < top_p  # the first always is
    surest = torch.stack([_surest(layer, best.indices, is_candidate) for layer in early]).max(dim=0)
    corrected = wide + alpha * surest.values[:, None] * rows_of(early, surest.indices)
    allowed = torch.zeros_like(wide, dtype=torch.bool).scatter(1, best.indices, is_candidate)
    return torch.where(allowed, corrected, OUT).to(final.dtype)


def _surest(layer: Tensor, tokens: Tensor, is_candidate: Tensor) -> Tensor:
    """The highest probability that a layer gives to a candidate: (n,).

    Args:
        layer: its logits, (n, vocabulary).
        tokens: (n, k).
        is_candidate: (n, k) which of them are.
    """
    wide = layer.float()
    shares = (wide.gather(1, tokens) - wide.logsumexp(dim=-1, keepdim=True)).exp()
    return shares.masked_fill(~is_candidate, 0.0).amax(dim=-1)
