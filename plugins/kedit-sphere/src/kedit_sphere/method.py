"""SPHERE: a solution inside the null space, less what lies in the weight's own directions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kedit_core.editing import EditJob, Patch
from kedit_core.numerics.nullspace import edit_in_null_space, prepare_null_spaces
from kedit_core.numerics.ridge import Update
from kedit_core.sites import Site
from kedit_sphere.hparams import SphereHyperParams


class Sphere:
    """Editing that keeps a matrix's rows spread over the sphere (Liu et al. 2026,
    arXiv:2510.01172), on top of AlphaEdit (Fang et al. 2025, arXiv:2410.02355).

    The change without its principal part is what is put in force, so later layers make up for
    what was taken out, and the keys that count in later edits are those of the edited model.
    """

    def __init__(self, hparams: SphereHyperParams) -> None:
        self.hparams = hparams

    def prepare(self, job: EditJob) -> None:
        """Collect the second moments and decompose them, and sample the contexts."""
        prepare_null_spaces(job, self.hparams)

    def edit(self, job: EditJob) -> Patch:
        """Compute the changes that write all facts of the job at once.

        Raises:
            SiteError: a layer does not exist or has no single MLP output matrix.
            EditError: a matrix has no free direction, a loss is not finite, or earlier edits of
                the session were made with other settings.
        """

        def adjust(site: Site, update: Update) -> Update:
            weight = job.weight(site)  # with earlier edits, not yet with this one
            eta, alpha = self.hparams.cumulative_ratio, self.hparams.suppression_strength
            return replace(update, right=suppressed(update.right, weight, eta, alpha))

        return edit_in_null_space("sphere", job, self.hparams, adjust)


def suppressed(right: Tensor, weight: Tensor, ratio: float, strength: float) -> Tensor:
    """The rows of Δ less a part of what lies in the principal directions: Δ (I − α U Uᵀ).

    U (d_in, r) are the leading eigenvectors of ŴᵀŴ/d_out, where Ŵ has the rows of W at unit
    length; r is the smallest number of them whose eigenvalues hold the share η of all.  They are
    had from the smaller Gram matrix: with V the leading eigenvectors of ŴŴᵀ, and Λ their
    eigenvalues there, U = Ŵᵀ V Λ^(−½).

    Args:
        right: Δ, or the right one of its factors, (n, d_in).
        weight: W, (d_out, d_in).
        ratio: η.
        strength: α.

    Returns:
        (n, d_in), float64.
    """
    rows = torch.nn.functional.normalize(weight.double(), dim=1)  # Ŵ
    values, vectors = torch.linalg.eigh(rows @ rows.mT)  # ascending
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    shares = values.cumsum(0) / values.sum()
    rank = int((shares < ratio).sum()) + 1
    change = right.to(rows)
    along = change @ rows.mT @ vectors[:, :rank] / values[:rank]  # Δ U Λ^(−½): (n, r)
    return change - strength * along @ vectors[:, :rank].mT @ rows
