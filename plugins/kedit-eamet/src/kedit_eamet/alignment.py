"""What holds the changes of facts as similar to each other as their keys are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRONGEST = 50
EPSILON = 1e-8
NEVER = -1e9  # finite, so that a softmax over nothing else has a gradient


@dataclass(frozen=True)
class Alignment:
    """The further terms of EAMET's loss (arXiv:2505.11876v4), a `Penalty`.

    For fact i, with S_ij the cosine of keys and r_ij that of δ_i and δ_j,

        cosine_weight · Σ_j p_j log((p_j + ε) / (q_j + ε)),  p = softmax(S_i / τ), q of r_i
        + square_weight · Σ_j w_j (S_ij − r_ij)²,  w = softmax over the 50 largest of S_i / τ
        + norm_weight · (|δ_i| − M_i)²

    where j are the facts before i: those of earlier blocks, and those of its own block as they
    are at the moment.  Each fact's terms change its own δ only, so that a block comes to rest
    where its facts, one after the other, would.

    Attributes:
        similar: S, (tasks, finished + tasks).
        finished: δ of the facts before the block, (finished, d).
        bounds: M, (tasks,).
    """

    similar: Tensor
    finished: Tensor
    bounds: Tensor
    cosine_weight: float
    square_weight: float
    norm_weight: float
    temperature: float
    watch: Sequence[str] = ()

    def __call__(self, owner: Tensor, delta: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        """The terms of each task: (tasks,)."""
        count, done = len(delta), len(self.finished)
        others = directions(torch.cat([self.finished, delta.detach()]))
        cosines = directions(delta) @ others.mT  # r: (tasks, finished + tasks)
        later = torch.ones_like(cosines, dtype=torch.bool).triu(done)
        expected = (self.similar / self.temperature).masked_fill(later, NEVER)
        found = (cosines / self.temperature).masked_fill(later, NEVER)
        p, q = expected.softmax(dim=1), found.softmax(dim=1)
        cosine = (p * ((p + EPSILON) / (q + EPSILON)).log()).sum(dim=1)
        weights, chosen = expected.topk(min(STRONGEST, done + count), dim=1)
        differences = (self.similar - cosines).gather(1, chosen)
        square = (weights.softmax(dim=1) * differences.square()).sum(dim=1)
        aligned = self.cosine_weight * cosine + self.square_weight * square
        if not done:
            aligned = aligned * (torch.arange(count, device=delta.device) > 0)  # the first has none
        return aligned + self.norm_weight * (delta.norm(dim=1) - self.bounds).square()


def directions(vectors: Tensor) -> Tensor:
    """Rows of length one, (n, d); rows of zeros stay, without a gradient."""
    lengths = vectors.norm(dim=1, keepdim=True)
    return torch.where(lengths > 0, vectors / lengths.clamp(min=1e-12), 0.0)
