"""What holds the changes of facts as similar to each other as their keys are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRONGEST = 50
EPSILON = 1e-8


@dataclass(frozen=True)
class Alignment:
    """The further terms of EAMET's loss (arXiv:2505.11876v4), a `Penalty`.

    For fact i, with S_ij the cosine of keys and r_ij that of δ_i and δ_j,

        cosine_weight · Σ_j p_j log((p_j + ε) / (q_j + ε)),  p = softmax(S_i / τ), q of r_i
        + square_weight · Σ_j w_j (S_ij − r_ij)²,  w = softmax over the 50 largest of S_i / τ
        + norm_weight · (|δ_i| − M_i)²

    where j are all finished facts, and the others of the block as they are at the moment: each
    fact's terms change its own δ only.

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
        norm = self.norm_weight * (delta.norm(dim=1) - self.bounds).square()
        count = len(delta)
        if self.similar.shape[1] == 1:  # the first fact has none to compare with
            return norm
        others = directions(torch.cat([self.finished, delta.detach()]))
        cosines = directions(delta) @ others.mT  # r: (tasks, finished + tasks)
        itself = torch.eye(count, dtype=torch.bool, device=delta.device)
        itself = torch.cat([itself.new_zeros(count, len(self.finished)), itself], dim=1)
        expected = (self.similar / self.temperature).masked_fill(itself, -torch.inf)
        found = (cosines / self.temperature).masked_fill(itself, -torch.inf)
        p, q = expected.softmax(dim=1), found.softmax(dim=1)
        cosine = (p * ((p + EPSILON) / (q + EPSILON)).log()).sum(dim=1)
        weights, chosen = expected.topk(min(STRONGEST, expected.shape[1]), dim=1)
        differences = (self.similar - cosines).gather(1, chosen)
        square = (weights.softmax(dim=1) * differences.square()).sum(dim=1)
        return self.cosine_weight * cosine + self.square_weight * square + norm


def directions(vectors: Tensor) -> Tensor:
    """Rows of length one, (n, d); rows of zeros stay, without a gradient."""
    lengths = vectors.norm(dim=1, keepdim=True)
    return torch.where(lengths > 0, vectors / lengths.clamp(min=1e-12), 0.0)
