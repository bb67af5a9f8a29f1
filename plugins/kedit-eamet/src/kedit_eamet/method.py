"""EAMET from top to bottom."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kedit_core.editing import EditJob, ModelHost, Patch
from kedit_core.numerics.facts import FactRows, mean_keys, value_settings
from kedit_core.numerics.sample import context_texts
from kedit_core.numerics.spread import by_moments, outputs, write_values
from kedit_core.numerics.values import Value, ValueTask, memory_chunks, optimise_values
from kedit_eamet.alignment import Alignment, directions
from kedit_eamet.hparams import EametHyperParams

LONG = 100.0  # states longer than this give no start: outliers of a few dimensions


class Eamet:
    """Embedding alignment for mass editing (arXiv:2505.11876v4).

    MEMIT with targets whose changes lie to each other as the keys of their facts do, so that
    facts with similar keys do not ask one matrix for unlike changes.
    """

    def __init__(self, hparams: EametHyperParams) -> None:
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
        host, hparams = job.host, self.hparams
        solve = by_moments(job, hparams)
        facts, place = FactRows.of(job, hparams), host.block(hparams.layers[-1]).path
        values = self._values(host, facts, place)
        return write_values("eamet", host, hparams.layers, facts, values, solve, at=place)

    def _values(self, host: ModelHost, facts: FactRows, place: str) -> list[Value]:
        """The values block by block, in the order of the facts."""
        hparams, last = self.hparams, self.hparams.layers[-1]
        keys = mean_keys(host, host.mlp_out(last).module, facts.rows)  # (m, n)
        states = outputs(host, place, facts)  # (d, n)
        tasks = self._tasks(facts, keys, states)
        unit = directions(keys.mT)  # (n, m)
        bounds = hparams.key_ratio * keys.norm(dim=0)
        values: list[Value] = []
        finished = states.new_zeros(0, len(states))
        for start in range(0, len(tasks), hparams.block):
            # A block that memory does not hold becomes several.
            for chunk in memory_chunks(host, last, tasks[start : start + hparams.block]):
                done, end = len(values), len(values) + len(chunk)
                terms = Alignment(
                    similar=unit[done:end] @ unit[:end].mT,
                    finished=finished,
                    bounds=bounds[done:end],
                    cosine_weight=hparams.cosine_weight,
                    square_weight=hparams.square_weight,
                    norm_weight=hparams.norm_weight if hparams.bound == "key" else 0.0,
                    temperature=hparams.temperature,
                )
                found = optimise_values(
                    host, place, last, chunk, value_settings(hparams), penalty=terms, together=True
                )
                values += found
                deltas = torch.stack([value.delta for value in found])
                finished = torch.cat([finished, deltas.to(finished)])
        return values

    def _tasks(self, facts: FactRows, keys: Tensor, states: Tensor) -> list[ValueTask]:
        """The tasks with their starts and bounds, by keys (m, n) and states (d, n)."""
        hparams, tasks = self.hparams, []
        for task, length, state in zip(facts.tasks, keys.norm(dim=0), states.mT, strict=True):
            norm = state.norm()
            is_long = hparams.start == "zero" or norm >= LONG
            start = torch.zeros_like(state) if is_long else state * (length / norm)
            by_key = hparams.bound == "key"
            bound = hparams.key_ratio * length if by_key else hparams.max_norm_ratio * norm
            decay = 0.0 if by_key else hparams.weight_decay / float(norm)
            tasks.append(replace(task, start=start, bound=float(bound), decay=decay))
        return tasks
