"""Merging several changes of one matrix into one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WAYS = ("ties", "magnitude", "sign", "linear")


def merged(changes: Sequence[Tensor], weights: Sequence[float], how: str, density: float) -> Tensor:
    """The weighted mean of changes τ_i with weights w_i, entry by entry.

    `linear` takes all entries.  `magnitude` takes of each change the share `density` of its entries
    that are largest.  `sign` takes those whose sign is that of Σ w_i τ_i.  `ties` takes what is
    left after both, in this order (Yadav et al. 2023, arXiv:2306.01708).  With the latter three an
    entry's mean is over the changes that are taken there, so what one alone changes stays whole.

    Args:
        changes: at least one, all of one shape; not modified.
        weights: one of each, positive.
        how: one of `WAYS`.
        density: of `magnitude` and `ties`; the share of all entries, zeros among them.
    """
    stacked = torch.stack(list(changes))
    scale = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)
    scale = scale.reshape(-1, *[1] * (stacked.ndim - 1))
    if how == "linear":
        return (scale * stacked).sum(0) / scale.sum()
    if how in ("magnitude", "ties"):
        stacked = torch.stack([_largest(change, density) for change in stacked])
    taken = stacked != 0
    if how in ("sign", "ties"):
        taken &= stacked.sign() == (scale * stacked).sum(0).sign()
    total = (scale * taken).sum(0)
    return (scale * stacked * taken).sum(0) / torch.where(total == 0, 1.0, total)


def _largest(change: Tensor, density: float) -> Tensor:
    """A copy in which only the given share of entries is not zero, the largest ones."""
    flat = change.flatten()
    kept = flat.abs().topk(int(density * flat.numel()), sorted=False).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).reshape(change.shape)
