"""NAMET from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from kedit_core.editing import EditJob, Patch
from kedit_core.numerics.facts import FactRows, value_settings
from kedit_core.numerics.sample import context_texts
from kedit_core.numerics.spread import by_moments, outputs, write_values
from kedit_core.numerics.states import Side, states_at_marks
from kedit_core.numerics.values import ValueTask, target_values
from kedit_namet.hparams import NametHyperParams


class Namet:
    """Noise-aware model editing in transformers (arXiv:2505.11876v1).

    MEMIT with a target z_c = h_c + δ for each context c: what is still missing of a fact is the
    mean over contexts of z_c − h_c, and δ is measured by all its h_c.
    """

    def __init__(self, hparams: NametHyperParams) -> None:
        self.hparams = hparams

    def prepare(self, job: EditJob) -> None:
        """Collect and factor the second moments and sample the contexts."""
        context_texts(job, self.hparams.contexts)
        by_moments(job, self.hparams)

    def edit(self, job: EditJob) -> Patch:
        """Compute the changes that write all facts of the job at once.

        Raises:
            SiteError: a layer does not exist or has no single MLP output matrix.
            EditError: a loss is not finite, or a system is singular.
        """
        host, hparams, last = job.host, self.hparams, self.hparams.layers[-1]
        solve = by_moments(job, hparams)
        facts, place = FactRows.of(job, hparams), host.block(last).path
        points: dict[str, tuple[str, Side]] = {"state": (place, "output")}
        rows = [row for own in facts.rows for row in own]
        states = states_at_marks(host, rows, points)["state"].float()
        tasks = self._tasks(facts, states.split([*map(len, facts.rows)]))
        values = target_values(job, place, last, tasks, value_settings(hparams))
        means = outputs(host, place, facts, averaged=True).cpu().mT  # mean of h_c: (n, d)
        pairs = zip(values, means, strict=True)
        values = [replace(value, initial=mean) for value, mean in pairs]
        return write_values(
            "namet", host, hparams.layers, facts, values, solve, at=place, averaged=True
        )

    def _tasks(self, facts: FactRows, states: Sequence[Tensor]) -> list[ValueTask]:
        """The tasks with bound and decay by their states [h_c], (rows, d) each."""
        hparams = self.hparams
        tasks = []
        for task, own in zip(facts.tasks, states, strict=True):
            norm = float(own.norm())  # Frobenius
            bound, decay = hparams.max_norm_ratio * norm, hparams.weight_decay / norm
            tasks.append(replace(task, bound=bound, decay=decay))
        return tasks
