"""Writing many facts only along directions of keys that ordinary text hardly uses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kedit_core.editing import EditJob, Patch
from kedit_core.errors import EditError
from kedit_core.numerics.facts import FactRows, value_settings
from kedit_core.numerics.ridge import Constraint, Inverse, Update
from kedit_core.numerics.sample import context_texts
from kedit_core.numerics.spread import by_least_squares, write_values
from kedit_core.numerics.stats import from_moments
from kedit_core.numerics.values import target_values
from kedit_core.sites import Site
from kedit_core.targets import NullSpaceHyperParams

log = logging.getLogger(__name__)

NEARLY_ALL = 0.99  # of the directions free: hardly anything is protected


@dataclass(frozen=True)
class NullSpace:
    """The directions of a matrix's keys along which it may be changed.

    P = U₀ U₀ᵀ = I − U₁ U₁ᵀ for eigenvectors U₀ and U₁ of C; the smaller of the two is kept.

    Attributes:
        vectors: U₀ or U₁, (m, ·), float32.
        is_complement: whether they are U₁.
    """

    vectors: Tensor
    is_complement: bool

    @property
    def width(self) -> int:
        """m."""
        return len(self.vectors)

    @property
    def rank(self) -> int:
        """Of P."""
        columns = self.vectors.shape[1]
        return self.width - columns if self.is_complement else columns

    def project(self, keys: Tensor) -> Tensor:
        """P K: (m, n), in the type of the keys; computed in that of the eigenvectors.

        Args:
            keys: K, (m, n).
        """
        vectors = self.vectors.to(keys.device)
        part = (vectors @ (vectors.mT @ keys.to(vectors))).to(keys)
        return keys - part if self.is_complement else part

    def inverse(self, l2: float) -> Inverse:
        """K ↦ P K / L₂, which stands for A₀⁻¹ where A₀ = L₂ I and only P's range may be used."""
        return lambda keys: self.project(keys) / l2

    @classmethod
    def of(
        cls,
        eigenvalues: Tensor,
        eigenvectors: Tensor,
        *,
        threshold: float | None = None,
        energy: float | None = None,
    ) -> NullSpace:
        """Of C's eigenvectors those with small eigenvalues.

        Args:
            eigenvalues: (m,), ascending.
            eigenvectors: (m, m), in columns.
            threshold: those below it (arXiv:2410.02355, §3.1).
            energy: or as many as together hold at most this share of the trace.  The largest
                eigenvalue is no part of that trace: in many models it is that of the few positions
                that attention sinks into, and may be a thousand times all others together.
        """
        values = eigenvalues.double().clamp(min=0)
        if threshold is not None:
            rank = int((values < threshold).sum())
        else:
            assert energy is not None
            rank = int((values.cumsum(0) <= energy * values[:-1].sum()).sum())
        if 2 * rank > len(values):
            return cls(eigenvectors[:, rank:].contiguous(), is_complement=True)
        return cls(eigenvectors[:, :rank].contiguous(), is_complement=False)


def null_spaces(
    job: EditJob, sites: Sequence[Site], hparams: NullSpaceHyperParams
) -> dict[Site, NullSpace]:
    """The null space of each matrix's second moment; C's eigenvectors are computed once and kept.

    Raises:
        ArtifactError: as `second_moments`.
        EditError: a matrix has no free direction.
    """
    stored = from_moments(job, sites, hparams.moment_tokens, "second-moment-eigen", _eigen)
    spaces = {
        site: NullSpace.of(
            eigen["values"],
            eigen["vectors"],
            threshold=hparams.nullspace_threshold,
            energy=hparams.nullspace_energy,
        )
        for site, eigen in stored.items()
    }
    for site, space in spaces.items():
        if space.rank == 0:
            raise EditError(
                f"No direction of {site.parameter} is free: the smallest eigenvalue of its second "
                f"moment is {float(stored[site]['values'][0]):.2g}. Raise nullspace_threshold or "
                f"nullspace_energy."
            )
        if space.rank > NEARLY_ALL * space.width:
            log.warning(
                "%d of %d directions of %s are free, so that hardly anything is protected.",
                space.rank,
                space.width,
                site.parameter,
            )
    return spaces


def _eigen(moment: Tensor) -> dict[str, Tensor]:
    values, vectors = torch.linalg.eigh(moment.double())
    return {"values": values.float(), "vectors": vectors.float()}


def prepare_null_spaces(job: EditJob, hparams: NullSpaceHyperParams) -> None:
    """Make ahead what `edit_in_null_space` needs; tells how many directions are free.

    Raises:
        SiteError, EditError: as there.
    """
    context_texts(job, hparams.contexts)
    sites = [job.host.mlp_out(layer) for layer in hparams.layers]
    for site, space in null_spaces(job, sites, hparams).items():
        log.info("%s: %d of %d directions are free.", site.parameter, space.rank, space.width)


def edit_in_null_space(
    method: str,
    job: EditJob,
    hparams: NullSpaceHyperParams,
    adjust: Callable[[Site, Update], Update] | None = None,
) -> Patch:
    """Write the job's facts by least squares inside each matrix's null space.

    Of all Δ = Δ P the one that minimises

        ‖Δ K − R‖² + ‖Δ K_s‖² + L₂ ‖Δ‖²

    with the keys K_s of the session's earlier edits (Fang et al. 2025, arXiv:2410.02355, eq. 14).
    It solves the paper's [P (K Kᵀ + K_s K_sᵀ) + L₂ I] Δᵀ = P K Rᵀ, in the space of the facts.

    Args:
        method: its name; patches of the job's earlier edits are its own.
        job: the facts, and where they are written.
        hparams: the settings.
        adjust: what is written instead of the solution.  Later layers, and the keys that count
            from now on, see what is written.

    Raises:
        SiteError: a layer does not exist or has no single MLP output matrix.
        EditError: a matrix has no free direction, a loss is not finite, or earlier edits of the
            session were made with other settings.
    """
    host, layers = job.host, hparams.layers
    sites = [host.mlp_out(layer) for layer in layers]
    spaces = null_spaces(job, sites, hparams)
    constraints = {
        site: Constraint.after(space.inverse(hparams.l2), space.width, job.earlier, site)
        for site, space in spaces.items()
    }
    least_squares = by_least_squares(constraints)

    def solve(site: Site, keys: Tensor, residual: Tensor) -> Update:
        update = least_squares(site, keys, residual)
        return adjust(site, update) if adjust is not None else update

    facts, place = FactRows.of(job, hparams), host.block(layers[-1]).path
    values = target_values(job, place, layers[-1], facts.tasks, value_settings(hparams))
    patch = write_values(method, host, layers, facts, values, solve, at=place, history=constraints)
    ranks = [spaces[site].rank for site in sites]
    return replace(patch, notes={**patch.notes, "ranks": ranks})
