"""MEMIT from top to bottom, and where PMET and EMMET differ from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from kedit_core.editing import EditJob, ModelHost, Patch
from kedit_core.errors import SiteError
from kedit_core.numerics.facts import FactRows, value_settings
from kedit_core.numerics.sample import context_texts
from kedit_core.numerics.spread import by_least_squares, moment_constraints, write_values
from kedit_core.numerics.values import ValueSettings, target_values
from kedit_memit.hparams import EmmetHyperParams, MemitHyperParams, PmetHyperParams


class Memit:
    """Mass-editing memory in a transformer (Meng et al. 2023, arXiv:2210.07229)."""

    share: Literal["even", "root"] = "even"

    def __init__(self, hparams: MemitHyperParams) -> None:
        self.hparams = hparams

    def prepare(self, job: EditJob) -> None:
        """Collect and factor the second moments and sample the contexts."""
        context_texts(job, self.hparams.contexts)
        moment_constraints(job, self.hparams, self._weights())

    def edit(self, job: EditJob) -> Patch:
        """Compute the changes that write all facts of the job at once.

        Raises:
            SiteError: a layer does not exist or has no single MLP output matrix.
            EditError: a loss is not finite, or a system is singular.
        """
        host, hparams = job.host, self.hparams
        place = self._place(host)
        earlier = job.earlier if hparams.history else ()
        # What may fail comes before what takes long.
        constraints = moment_constraints(job, hparams, self._weights(), earlier)
        facts = FactRows.of(job, hparams)
        values = target_values(
            job,
            place,
            hparams.layers[-1],
            facts.tasks,
            self._settings(),
            companions=self._companions(host),
        )
        return write_values(
            "memit",
            host,
            hparams.layers,
            facts,
            values,
            by_least_squares(constraints, self._ridge(job)),  # Δ = R Kᵀ (λC + K Kᵀ)⁻¹ (eq. 14)
            at=place,
            share=self.share,
            history=constraints if hparams.history else None,
        )

    def _place(self, host: ModelHost) -> str:
        """The module whose output is optimised: the last edited block."""
        return host.block(self.hparams.layers[-1]).path

    def _companions(self, host: ModelHost) -> Sequence[str]:
        return ()

    def _settings(self) -> ValueSettings:
        return value_settings(self.hparams)

    def _weights(self) -> Sequence[float]:
        """λ of each layer."""
        return self.hparams.moment_weights

    def _ridge(self, job: EditJob) -> float:
        """μ, how far equality is relaxed in the units of `_weights`."""
        return 1.0


class Pmet(Memit):
    """Precise model editing (Li et al. 2024, arXiv:2308.08742).

    What attention and MLP of the last edited block write are optimised together; only the MLP's
    part is written into matrices, so that it need not make up for the attention's.
    """

    share = "root"
    hparams: PmetHyperParams

    def _place(self, host: ModelHost) -> str:
        return host.mlp_out(self.hparams.layers[-1]).module

    def _companions(self, host: ModelHost) -> Sequence[str]:
        attention = host.block(self.hparams.layers[-1]).attention_out
        if attention is None:
            raise SiteError(
                f"Block {self.hparams.layers[-1]} of {host.name} has no single attention output "
                f"matrix, which PMET needs. Choose another layer, or memit."
            )
        return (attention.module,)

    def _settings(self) -> ValueSettings:
        return replace(
            super()._settings(),
            reached_factor=self.hparams.reached_factor,
            reached_kl=self.hparams.reached_kl,
        )


class Emmet(Memit):
    """Equality-constrained mass model editing (Gupta et al. 2024, arXiv:2403.14236).

    Δ = R (μI + Kᵀ(λ'C)⁻¹K)⁻¹ Kᵀ(λ'C)⁻¹ (eq. 12): ROME's constraint for many facts at once, and with
    μ > 0 the same as MEMIT with λ = μλ'.  It is then solved as that, so that keys of earlier edits
    count as much as those of this one.  A single fact has μ = 0, as in the authors' code.
    """

    hparams: EmmetHyperParams

    def _weights(self) -> Sequence[float]:
        return [(self.hparams.ridge or 1.0) * weight for weight in self.hparams.moment_weights]

    def _ridge(self, job: EditJob) -> float:
        is_alone = len(job.requests) == 1 and not self.hparams.history
        return 0.0 if is_alone or not self.hparams.ridge else 1.0
