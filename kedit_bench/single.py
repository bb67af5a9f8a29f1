"""The single regime: edit one case, ask all its probes, take the edit back, go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from kedit_bench.metrics import probes_of
from kedit_core.editing import Answer, EditSession
from kedit_core.hookspecs import CaseMeasured
from kedit_core.protocols import Metric
from kedit_core.request import EditCase, Probe
from kedit_core.spec import MethodSpec
from kedit_core.view import ModelView

NEW_TOKENS = 12


@dataclass(frozen=True)
class CaseResult:
    """One case: its scores, and the raw answers from which other scores can be computed.

    Attributes:
        case: what was asked.
        before, after: answers to `probes_of(case)`.
        scores: by metric id.
        baseline: the same scores with the unedited model in both places.
        seconds: of the edit alone.
    """

    case: EditCase
    before: tuple[Answer, ...]
    after: tuple[Answer, ...]
    scores: Mapping[str, float]
    baseline: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Mean:
    """Mean over cases with its standard error."""

    n: int
    mean: float
    error: float


def ask(view: ModelView, probes: Sequence[Probe]) -> tuple[Answer, ...]:
    """A view's greedy text and its reading of every accepted answer, for each probe."""
    # Neighbouring prompts recur among cases; each is asked once.
    prompts = list(dict.fromkeys(probe.prompt for probe in probes))
    texts = dict(zip(prompts, view.greedy(prompts, max_new_tokens=NEW_TOKENS), strict=True))
    pairs = list(dict.fromkeys((p.prompt, answer) for p in probes for answer in p.expected))
    read = view.score([prompt for prompt, _ in pairs], [answer for _, answer in pairs])
    scores = dict(zip(pairs, read, strict=True))
    return tuple(
        Answer(p.prompt, texts[p.prompt], tuple(scores[p.prompt, answer] for answer in p.expected))
        for p in probes
    )


def run_single(
    session: EditSession,
    spec: MethodSpec,
    cases: Sequence[EditCase],
    metrics: Sequence[Metric],
    **settings: object,
) -> Iterator[CaseResult]:
    """Measure each case by itself; the session's model ends as it began.

    Answers of the unedited model are asked for all cases first, in large batches.

    Args:
        session: without edits.
        spec: the method.
        cases: what to edit.
        metrics: what to compute.
        settings: passed to `EditSession.edit`.
    """
    every = [probe for case in cases for probe in probes_of(case)]
    unedited = iter(ask(session.view(), every))
    before = [tuple(next(unedited) for _ in probes_of(case)) for case in cases]
    for case, old in zip(cases, before, strict=True):
        with session.trial(spec, case.request, **settings) as outcome:
            new = ask(session.view(), probes_of(case))
        scores = _scores(metrics, case, old, new)
        session.catalog.notify("kedit_case_measured", CaseMeasured(spec.name, case, scores))
        baseline = _scores(metrics, case, old, old)
        yield CaseResult(case, old, new, scores, baseline, outcome.seconds)


def _scores(
    metrics: Sequence[Metric], case: EditCase, before: Sequence[Answer], after: Sequence[Answer]
) -> dict[str, float]:
    scores: dict[str, float] = {}
    for metric in metrics:
        scores.update(metric.score(case, before, after))
    return scores


def summarise(rows: Sequence[Mapping[str, float]]) -> dict[str, Mean]:
    """Mean and standard error over cases of each score that any case has."""
    names = dict.fromkeys(name for row in rows for name in row)
    summary = {}
    for name in names:
        values = [row[name] for row in rows if name in row]
        mean = sum(values) / len(values)
        spread = sum((value - mean) ** 2 for value in values)
        error = sqrt(spread / (len(values) - 1) / len(values)) if len(values) > 1 else 0.0
        summary[name] = Mean(len(values), mean, error)
    return summary
