"""CoRE from top to bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kedit_core.editing import EditJob, ModelHost, Patch
from kedit_core.numerics.facts import FactRows, value_settings
from kedit_core.numerics.sample import context_texts, continued_texts
from kedit_core.numerics.spread import by_moments, write_values
from kedit_core.numerics.values import target_values
from kedit_core.request import EditRequest
from kedit_core_edit.hparams import CoreHyperParams


class Core:
    """Context-robust editing (arXiv:2505.23026).

    MEMIT with targets that are optimised after texts begun by the fact's own words, and held to
    the same states after all of them.
    """

    def __init__(self, hparams: CoreHyperParams) -> None:
        self.hparams = hparams

    def prepare(self, job: EditJob) -> None:
        """Collect and factor the second moments and sample the contexts of the keys."""
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
        contexts = [self._contexts(job, request) for request in job.requests]
        own = FactRows.after(job, contexts, hparams.fact_token)
        watch = self._watch(host)
        values = target_values(
            job,
            place,
            last,
            own.tasks,
            value_settings(hparams),
            penalty=Variance(watch, hparams.variance_weight) if watch else None,
        )
        if hparams.keys == "own":
            facts = own
        patch = write_values("core", host, hparams.layers, facts, values, solve, at=place)
        return replace(patch, notes={**patch.notes, "own_contexts": [list(c) for c in contexts]})

    def _contexts(self, job: EditJob, request: EditRequest) -> tuple[str, ...]:
        """Texts that the request's own words begin."""
        words = (request.ground_truth[0], str(request.subject), request.target_new)
        each, more = divmod(self.hparams.context_count, len(words))
        starts = [word for n, word in enumerate(words) for _ in range(each + (n < more))]
        return continued_texts(job, starts, self.hparams.context_tokens)

    def _watch(self, host: ModelHost) -> tuple[str, ...]:
        """The blocks whose states count.

        Not the last one, as in the paper: only what answers are read from passes through it.
        """
        if not self.hparams.variance_weight:
            return ()
        first = self.hparams.layers[-1] + 1
        blocks = host.blocks[first : min(first + self.hparams.variance_range, len(host.blocks) - 1)]
        return tuple(block.path for block in blocks)


@dataclass(frozen=True)
class Variance:
    """How far the states after different contexts lie apart, a `Penalty`.

    The mean over blocks of (1/d) Σ_{i<j} |h_i − h_j|² over all pairs of a fact's rows, times
    weight.  The sum over pairs is N Σ |h_i − h̄|², which loses no digits to large states.

    Attributes:
        watch: paths of the blocks.
        weight: of the term.
    """

    watch: Sequence[str]
    weight: float

    def __call__(self, owner: Tensor, delta: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        """The term of each task: (tasks,)."""
        zeros = torch.zeros(len(delta), device=delta.device)
        counts = zeros.index_add(0, owner, torch.ones_like(owner, dtype=zeros.dtype))
        total = zeros
        for state in states.values():
            h = state.float().to(delta.device)
            sums = torch.zeros_like(delta).index_add(0, owner, h)
            off = h - (sums / counts.clamp(min=1)[:, None])[owner]
            pairs = counts * zeros.index_add(0, owner, off.square().sum(dim=1))
            total = total + pairs / h.shape[1]
        return self.weight * total / len(states)
