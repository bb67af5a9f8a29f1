"""Facts as rows of tokens: with contexts before them, and what they leave in place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kedit_core.host import ModelHost
from kedit_core.job import EditJob
from kedit_core.numerics.sample import context_texts
from kedit_core.numerics.states import Side, states_at_marks, wide
from kedit_core.numerics.values import ValueSettings, ValueTask
from kedit_core.request import EditRequest
from kedit_core.targets import ValueHyperParams
from kedit_core.tokens import FactToken, Row, encode, fact_position, rewrite_row

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FactRows:
    """Rows of the facts of one job, marked at their fact token.

    Attributes:
        rows: for each fact its prompt and target, first without context, then after each.
        anchors: for each fact a prompt that the edit should leave in place.
        contexts: the texts before every fact, first the empty one; none where facts have their
            own.
    """

    rows: tuple[tuple[Row, ...], ...]
    anchors: tuple[Row, ...]
    contexts: tuple[str, ...] = ()

    @classmethod
    def of(cls, job: EditJob, hparams: ValueHyperParams) -> FactRows:
        """The job's facts after the sampled contexts; tells of what will hardly go well.

        Raises:
            RequestError: a fact is too long for the model.
        """
        contexts = context_texts(job, hparams.contexts)
        facts = cls.after(job, [contexts] * len(job.requests), hparams.fact_token)
        for request, row in zip(job.requests, facts.clean, strict=True):
            if row.mark == 0:
                log.warning(
                    "The key of %r is read at the first token, where keys are unlike any other; "
                    "put words before the subject, or check the edit's neighbours.",
                    request.text,
                )
        return replace(facts, contexts=("", *contexts))

    @classmethod
    def after(
        cls, job: EditJob, contexts: Sequence[Sequence[str]], fact_token: FactToken
    ) -> FactRows:
        """The job's facts, each after contexts of its own.

        Raises:
            RequestError: a fact is too long for the model.
        """
        host = job.host
        rows = tuple(
            tuple(rewrite_row(host, request, fact_token, text) for text in ("", *texts))
            for request, texts in zip(job.requests, contexts, strict=True)
        )
        return cls(rows, tuple(essence_row(host, r, fact_token) for r in job.requests))

    @property
    def clean(self) -> list[Row]:
        """The rows without context, one of each fact."""
        return [rows[0] for rows in self.rows]

    @property
    def tasks(self) -> list[ValueTask]:
        """What is to be optimised."""
        return [ValueTask(*pair) for pair in zip(self.rows, self.anchors, strict=True)]


def value_settings(hparams: ValueHyperParams) -> ValueSettings:
    """The settings of the optimisation among a method's settings."""
    return ValueSettings(
        steps=hparams.steps,
        lr=hparams.lr,
        weight_decay=hparams.weight_decay,
        max_norm_ratio=hparams.max_norm_ratio,
        kl_weight=hparams.kl_weight,
        stop=hparams.stop,
        stop_loss=hparams.stop_loss,
    )


def essence_row(host: ModelHost, request: EditRequest, fact_token: FactToken) -> Row:
    """'{subject} is a', marked at its fact token: what an edit should leave in place."""
    essence = EditRequest(prompt="{} is a", subject=request.subject, target_new="person")
    mark = fact_position(host, essence, fact_token)
    return Row(encode(host, essence.text).ids, mark=mark)


def mean_keys(host: ModelHost, module: str, rows: Sequence[Sequence[Row]]) -> Tensor:
    """The keys of facts: what a module reads at their marks, averaged over contexts.

    The row without context counts one half and the others share the other half, as in MEMIT's
    code.

    Args:
        host: a causal model.
        module: path of the module that holds the matrix.
        rows: for each fact at least one.

    Returns:
        (d_in, facts), float32 or wider.
    """
    points: dict[str, tuple[str, Side]] = {"key": (module, "input")}
    states = states_at_marks(host, [row for fact in rows for row in fact], points)["key"]
    split = wide(states).split([*map(len, rows)])
    return torch.stack([_mean(own) for own in split], dim=1)


def _mean(keys: Tensor) -> Tensor:
    if len(keys) == 1:
        return keys[0]
    return (keys[0] + keys[1:].mean(dim=0)) / 2
