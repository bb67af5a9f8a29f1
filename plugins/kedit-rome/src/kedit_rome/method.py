"""ROME and R-ROME: the algorithm from top to bottom."""

from __future__ import annotations

from torch import Tensor

from kedit_core.editing import EditJob, Patch, Site, WeightDelta
from kedit_core.numerics.facts import FactRows, value_settings
from kedit_core.numerics.ridge import Inverse, inverse_by
from kedit_core.numerics.sample import context_texts
from kedit_core.numerics.solve import rank_one_factors
from kedit_core.numerics.states import states_at_marks
from kedit_core.numerics.stats import moment_factors
from kedit_core.numerics.values import target_values
from kedit_rome.hparams import RomeHyperParams


class Rome:
    """Rank-one model editing: one fact, one MLP matrix.

    ROME is Meng et al. 2022 (arXiv:2202.05262), R-ROME Gupta et al. 2024 (arXiv:2403.07175).
    """

    def __init__(self, hparams: RomeHyperParams) -> None:
        self.hparams = hparams

    def prepare(self, job: EditJob) -> None:
        """Collect and factor the second moment and sample the contexts."""
        context_texts(job, self.hparams.contexts)
        self._inverse(job, job.host.mlp_out(self.hparams.layer))

    def edit(self, job: EditJob) -> Patch:
        """Compute the rank-one change that writes the request's fact.

        Raises:
            SiteError: the layer does not exist or has no single MLP output matrix.
            EditError: the loss is not finite, or the key cannot be reached.
        """
        host, hparams = job.host, self.hparams
        site = host.mlp_out(hparams.layer)
        inverse = self._inverse(job, site)
        facts = FactRows.of(job, hparams)
        settings = value_settings(hparams)
        (value,) = target_values(job, site.module, hparams.layer, facts.tasks, settings)
        (rows,) = facts.rows
        points = {"key": (site.module, "input"), "output": (site.module, "output")}
        states = states_at_marks(host, rows, points)
        keys, outputs = states["key"].float().cpu(), states["output"].float().cpu()
        direction_key, key, current = self._keys(keys, outputs)
        direction = inverse(direction_key[:, None])[:, 0]
        left, right = rank_one_factors(value.target - current, direction, key)

        notes = {
            "losses": list(value.losses),
            "nll": value.nll,
            "delta_norm_ratio": float(value.delta.norm() / value.initial.norm()),
            "change_norm": float(left.norm()),
            "second_moment": hparams.second_moment,
            "contexts": list(facts.contexts),
        }
        return Patch("rome", (WeightDelta(site, left, right),), notes=notes)

    def _inverse(self, job: EditJob, site: Site) -> Inverse:
        """K ↦ C⁻¹ K; without a second moment K itself."""
        if not self.hparams.second_moment:
            return lambda keys: keys
        return inverse_by(moment_factors(job, [site], self.hparams.moment_tokens)[site])

    def _keys(self, keys: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Key of the direction, key that is mapped, and the present output for it.

        Row 0 is the plain prompt; the others have contexts before it.
        """
        if self.hparams.key == "context":
            return keys.mean(0), keys.mean(0), outputs.mean(0)
        if self.hparams.key == "prompt":
            return keys[0], keys[0], outputs[0]
        # As in the authors' code: the direction from the mean, the rest from the plain prompt.
        return keys.mean(0), keys[0], outputs[0]
