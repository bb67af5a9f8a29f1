"""ROME and R-ROME: the algorithm from top to bottom."""

from __future__ import annotations

import logging

from torch import Tensor

from kedit_core.editing import EditJob, Patch, Site, WeightDelta
from kedit_core.numerics.facts import essence_row
from kedit_core.numerics.ridge import Inverse, inverse_by
from kedit_core.numerics.sample import context_texts
from kedit_core.numerics.solve import rank_one_factors
from kedit_core.numerics.stats import moment_factors
from kedit_core.numerics.trace import states_at_marks
from kedit_core.numerics.values import Value, ValueSettings, ValueTask, target_values
from kedit_core.request import EditRequest
from kedit_core.tokens import Row, rewrite_row
from kedit_rome.hparams import RomeHyperParams

log = logging.getLogger(__name__)


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
        (request,) = job.requests
        host, hparams = job.host, self.hparams
        site = host.mlp_out(hparams.layer)
        inverse = self._inverse(job, site)
        contexts = ("", *context_texts(job, hparams.contexts))
        rows = tuple(rewrite_row(host, request, hparams.fact_token, text) for text in contexts)

        if rows[0].mark == 0:
            log.warning(
                "The subject of %r is the first token, where keys are unlike any other; put words "
                "before it, or check the edit's neighbours.",
                request.text,
            )
        value = self._value(job, site.module, request, rows)
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
            "contexts": list(contexts),
        }
        return Patch("rome", (WeightDelta(site, left, right),), notes=notes)

    def _inverse(self, job: EditJob, site: Site) -> Inverse:
        """K ↦ C⁻¹ K; without a second moment K itself."""
        if not self.hparams.second_moment:
            return lambda keys: keys
        return inverse_by(moment_factors(job, [site], self.hparams.moment_tokens)[site])

    def _value(
        self, job: EditJob, module: str, request: EditRequest, rows: tuple[Row, ...]
    ) -> Value:
        """v*: what the MLP should write so that the target follows."""
        hparams = self.hparams
        settings = ValueSettings(
            steps=hparams.steps,
            lr=hparams.lr,
            weight_decay=hparams.weight_decay,
            max_norm_ratio=hparams.max_norm_ratio,
            kl_weight=hparams.kl_weight,
            stop_loss=hparams.stop_loss,
        )
        task = ValueTask(rows, essence_row(job.host, request, hparams.fact_token))
        (value,) = target_values(job, module, hparams.layer, [task], settings)
        return value

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
