"""Closed forms of rank-limited updates.  Solved in float64, returned in float32."""

from __future__ import annotations

import logging
from math import inf

import torch
from torch import Tensor

from kedit_core.errors import EditError

log = logging.getLogger(__name__)

_JITTER = (0.0, 1e-10, 1e-8, 1e-6)  # times the mean of the diagonal


def condition_of(matrix: Tensor) -> float:
    """Largest over smallest |eigenvalue| of a symmetric matrix.

    Infinite where it is singular or not finite.

    Args:
        matrix: (n, n).
    """
    if not bool(torch.isfinite(matrix).all()):
        return inf
    sizes = torch.linalg.eigvalsh(matrix).abs()
    smallest = float(sizes.min())
    return float(sizes.max()) / smallest if smallest else inf


def cholesky(moment: Tensor) -> Tensor:
    """Lower factor L with L Lᵀ = C, in float64.

    A singular C (from fewer samples than dimensions) gets the smallest ridge of 1e-10, 1e-8, 1e-6
    times its mean diagonal that makes it positive definite.

    Args:
        moment: C, (m, m), symmetric and positive semidefinite.

    Raises:
        EditError: C is not positive semidefinite, not finite, or zero; says its condition.
    """
    c = moment.double()
    scale = c.diagonal().mean()
    if bool(torch.isfinite(c).all()) and bool(scale > 0):
        for jitter in _JITTER:
            factor, failed = torch.linalg.cholesky_ex(
                c + jitter * scale * torch.eye(len(c), dtype=c.dtype, device=c.device)
            )
            if not bool(failed):
                if jitter:
                    log.info("A second moment is singular; a ridge of %.0e was added.", jitter)
                return factor
    raise EditError(
        f"The second moment is not positive definite (condition {condition_of(c):.0e}). Collect it "
        f"again from more tokens: `kedit prepare`."
    )


def rank_one_factors(change: Tensor, direction: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the update ΔW along a direction u that moves the output for key k by r.

        ΔW = r uᵀ / (k·u),   so that ΔW k = r

    With u = C⁻¹ k it is the update of all those with ΔW k = r that disturbs the stored
    associations least (eq. 2 of ROME, Meng et al. 2022, arXiv:2202.05262).

    Args:
        change: r, (d_out,).
        direction: u, (d_in,).
        key: k, (d_in,).

    Returns:
        left (d_out, 1) and right (1, d_in) in float32.

    Raises:
        EditError: k·u is zero, so no such update exists.
    """
    u, k = direction.double(), key.double()
    u = u / u.norm()
    overlap = k @ u
    if float(overlap.abs()) <= 1e-12 * float(k.norm()):
        raise EditError(
            "The key is orthogonal to the direction of the update, so it cannot be reached. Use "
            "r-rome, whose key is the same in both places."
        )
    return (change.double() / overlap)[:, None].float(), u[None, :].float()
