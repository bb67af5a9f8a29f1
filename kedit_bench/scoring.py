"""From answers to scores, and from scores to means that may be compared.

A score carries its protocol.  Means are taken over scores of one protocol only.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from numbers import Real
from typing import TYPE_CHECKING

from kedit_core.ask import Answers, Question
from kedit_core.cli.printing import shorten
from kedit_core.errors import (
    DataError,
    KEditError,
    PluginError,
    SettingError,
    UnknownNameError,
    reason_of,
)
from kedit_core.named import create, split_named
from kedit_core.plugins import Catalog
from kedit_core.protocols import CaseScore, Metric, ModelMetric
from kedit_core.request import EditCase
from kedit_core.spec import DatasetSpec, MetricSpec

if TYPE_CHECKING:
    from kedit_core.editing import EditSession

log = logging.getLogger(__name__)

UNEDITED = "unedited"
IMMEDIATE = "immediate"
FINAL = "final"


@dataclass(frozen=True)
class Protocol:
    """How a number came about.  Numbers of different protocols are never averaged.

    Attributes:
        metric: its id, with settings.
        part: family of probes, or a factor; "" for the headline.
        probe, decoding, scorer, reference, form: see `MetricSpec`.
        schedule: the regime: how many edits are in force together.
        moment: when it was asked: `unedited`, `immediate` (right after the edit), `final` (after
            all edits) or `after N` edits.
        aggregation: of probes and cases.
        details: what else a metric says that its scores depend on, for example a judge's name.
        model, dtype, dataset: on what.
    """

    metric: str
    part: str
    probe: str
    decoding: str
    scorer: str
    reference: str
    form: str
    schedule: str
    moment: str
    model: str
    dtype: str
    dataset: str
    aggregation: str = "mean over families of probes, then over cases"
    details: str = ""


@dataclass(frozen=True)
class Measurement:
    """One metric's value for one case."""

    protocol: Protocol
    value: float
    probes: int

    @property
    def is_finite(self) -> bool:
        """Whether it can be averaged; what a broken model says may give no number."""
        return isfinite(self.value)


@dataclass(frozen=True)
class Mean:
    """Mean over cases with its standard error.

    The error is None where it is unknown: of a single case, and of what is made of means.
    """

    protocol: Protocol
    mean: float
    error: float | None
    cases: int
    probes: int


class Tally:
    """Mean and standard error of measurements of one protocol, none of which is kept."""

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol
        self._cases = self._probes = 0
        self._total = 0.0
        self._centre = self._spread = 0.0  # Welford's mean and sum of squared distances from it

    def add(self, measurement: Measurement) -> None:
        """Count a measurement in.

        Raises:
            DataError: its protocol is another one, or its value is no finite number.
        """
        one, other = self._protocol, measurement.protocol
        if one != other:
            field = next(k for k in vars(one) if getattr(one, k) != getattr(other, k))
            raise DataError(
                f"Scores of different protocols are not averaged: {field} is "
                f"'{getattr(one, field)}' here and '{getattr(other, field)}' there."
            )
        if not measurement.is_finite:
            raise DataError(
                f"The value {measurement.value} of {one.metric} is not averaged; leave it out."
            )
        self._cases += 1
        self._probes += measurement.probes
        self._total += measurement.value
        step = measurement.value - self._centre
        self._centre += step / self._cases
        self._spread += step * (measurement.value - self._centre)

    def mean(self) -> Mean:
        """Of what was counted in, which is at least one measurement."""
        n = self._cases
        error = sqrt(self._spread / (n - 1) / n) if n > 1 else None
        return Mean(self._protocol, self._total / n, error, n, self._probes)


@dataclass(frozen=True)
class Chosen:
    """A metric with its settings, as it is named in results.

    Attributes:
        by_pattern: it was not named in full.
    """

    name: str
    spec: MetricSpec
    metric: Metric | ModelMetric
    by_pattern: bool = False


class MetricError(PluginError):
    """A metric's own code failed, or gave what it must not."""

    def __init__(self, metric: str, problem: str) -> None:
        self.metric = metric
        super().__init__(f"The metric {metric} {problem}")


class MissingAnswerError(DataError):
    """A metric needs an answer that was not kept."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        super().__init__(
            f"The journal does not hold the answers that {metric} needs. Give that metric to "
            f"`kedit eval` with another --out."
        )


def choose_metrics(
    catalog: Catalog, wanted: Sequence[str], dataset: DatasetSpec | None = None
) -> list[Chosen]:
    """The metrics that were asked for: names with settings, or patterns with `*`.

    Where none is asked for, those of the dataset, or else the default ones.

    Raises:
        UnknownNameError, SettingError: a name or a setting is wrong, or no metric is left.
        PluginError: what a name stands for is no metric.
    """
    names = list(wanted) or list(dataset.metrics if dataset else ())
    specs = catalog.all(MetricSpec)
    if not names:
        return [Chosen(s.name, s, _made(s, {})) for s in specs if s.default]
    chosen: dict[str, Chosen] = {}
    for text in names:
        name, settings = split_named(text)
        found = [s for s in specs if fnmatch.fnmatchcase(s.name, name)]
        if not found and ("*" in name or "?" in name):
            if wanted:
                raise UnknownNameError(f"No metric is called like '{name}'.")
            continue  # a dataset may name metrics of a plugin that is not installed
        for spec in found or [catalog.metric(name)]:
            shown = text if settings else spec.name
            if len(found) > 1 and settings:
                raise SettingError(f"Give settings to one metric, not to all like '{name}'.")
            try:
                chosen[shown] = Chosen(shown, spec, _made(spec, settings), spec.name != name)
            except (PluginError, SettingError) as error:
                if not found or spec.name == name:
                    raise
                log.warning("%s is left out: %s", spec.name, error)
    if not chosen:
        raise SettingError(
            f"No metric is left of {', '.join(names)}. Choose with --metric from `kedit "
            f"list-metrics`."
        )
    return list(chosen.values())


def _made(spec: MetricSpec, settings: Mapping[str, str]) -> Metric | ModelMetric:
    made = create(spec, settings)
    if isinstance(made, Metric | ModelMetric):
        return made
    raise PluginError(
        f"'{spec.name}' is no metric: '{spec.target}' has neither questions(case) and score(case, "
        f"before, after) nor measure(session)."
    )


class Scorer:
    """Several metrics together.

    Args:
        chosen: the metrics.
        where: model, dtype, dataset and schedule of all their scores.

    Attributes:
        broken: what was wrong with metrics that are passed over, by name.
    """

    def __init__(self, chosen: Sequence[Chosen], where: Mapping[str, str]) -> None:
        self.chosen = list(chosen)
        self.where = dict(where)
        self.broken: dict[str, KEditError] = {}

    def questions(self, case: EditCase) -> list[Question]:
        """What all metrics ask about a case, each once."""
        return self._asked(lambda name, metric: _questions(name, metric, case))

    def followups(self, case: EditCase, answers: Answers) -> list[Question]:
        """What all metrics ask the unedited model about a model's answers, each once."""
        return self._asked(lambda name, metric: _followups(name, metric, case, answers))

    def score(
        self, case: EditCase, before: Answers, after: Answers, moment: str
    ) -> list[Measurement]:
        """Every metric's scores of a case.

        Raises:
            DataError: both sides are the same object; an edited model was never asked.
            MetricError, MissingAnswerError: a metric failed, or lacks an answer.
        """
        if before is after:
            raise DataError("The answers before and after the edit are the same; nothing to score.")
        return self._scored(case, before, after, moment)

    def unchanged(self, case: EditCase, before: Answers) -> list[Measurement]:
        """The scores of the unedited model, compared with itself."""
        return self._scored(case, before, before, UNEDITED)

    def measure(self, session: EditSession) -> dict[str, dict[str, float]]:
        """What each metric of the whole model finds, by its name."""
        found = {}
        for chosen, metric in self.of_models():
            with self._passing_over(), _calling(chosen.name, "measure()"):
                found[chosen.name] = _numbers(metric.measure(session))
        return found

    def figures(
        self, metric: Chosen, found: Mapping[str, float | str], moment: str
    ) -> list[Measurement]:
        """What a metric of the whole model found, as it was or as the journal has it."""
        return [
            Measurement(self._protocol(metric, part, moment), float(value), 1)
            for part, value in found.items()
        ]

    def summary(self, measurements: Iterable[Measurement]) -> list[Mean]:
        """Means by metric, part and moment, with what metrics make of their means.

        The measurements are taken one by one, and not kept.
        """
        tallies: dict[Protocol, Tally] = {}
        for measurement in measurements:
            protocol = measurement.protocol
            tallies.setdefault(protocol, Tally(protocol)).add(measurement)
        means = [tally.mean() for tally in tallies.values()]
        return [*means, *self._combined(means)]

    def _of_cases(self) -> list[tuple[Chosen, Metric]]:
        return [(c, c.metric) for c in self._whole() if isinstance(c.metric, Metric)]

    def of_models(self) -> list[tuple[Chosen, ModelMetric]]:
        """The metrics of the model as a whole."""
        return [(c, c.metric) for c in self._whole() if isinstance(c.metric, ModelMetric)]

    def _whole(self) -> list[Chosen]:
        return [chosen for chosen in self.chosen if chosen.name not in self.broken]

    @contextlib.contextmanager
    def _passing_over(self) -> Iterator[None]:
        try:
            yield
        except MetricError as error:
            log.warning("%s It is passed over.", error)
            self.broken[error.metric] = error

    def _asked(self, ask: Callable[[str, Metric], list[Question]]) -> list[Question]:
        asked: dict[Question, None] = {}
        for chosen, metric in self._of_cases():
            with self._passing_over():
                asked |= dict.fromkeys(ask(chosen.name, metric))
        return list(asked)

    def _scored(
        self, case: EditCase, before: Answers, after: Answers, moment: str
    ) -> list[Measurement]:
        return [
            Measurement(self._protocol(chosen, part, moment), float(score.value), score.probes)
            for chosen, metric in self._of_cases()
            for part, score in _scores(chosen.name, metric, case, before, after).items()
        ]

    def _combined(self, means: Sequence[Mean]) -> list[Mean]:
        made = []
        for chosen in self._whole():
            if not hasattr(chosen.metric, "combine"):
                continue
            ours = [m for m in means if m.protocol.metric == chosen.name]
            for moment in dict.fromkeys(m.protocol.moment for m in ours):
                parts = {m.protocol.part: m for m in ours if m.protocol.moment == moment}
                with _calling(chosen.name, "combine()"):
                    found = _numbers(chosen.metric.combine({k: m.mean for k, m in parts.items()}))
                for part, value in found.items():
                    of = _made_of(part, parts)
                    cases, probes = min(m.cases for m in of), sum(m.probes for m in of)
                    protocol = self._protocol(chosen, part, moment)
                    made.append(Mean(protocol, value, None, cases, probes))
        return made

    def _protocol(self, chosen: Chosen, part: str, moment: str) -> Protocol:
        spec = chosen.spec
        return Protocol(
            metric=chosen.name,
            part=part,
            probe=spec.probe,
            decoding=spec.decoding,
            scorer=spec.scorer,
            reference=spec.reference,
            form=spec.form,
            moment=moment,
            details=str(getattr(chosen.metric, "details", "")),
            **self.where,
        )


def _made_of(figure: str, parts: Mapping[str, Mean]) -> list[Mean]:
    """The means whose cases a figure counts: its part's, or else those of all."""
    own = parts.get(figure.rpartition(".")[0])
    return [own] if own else list(parts.values())


def _scores(
    name: str, metric: Metric, case: EditCase, before: Answers, after: Answers
) -> Mapping[str, CaseScore]:
    with _calling(name, "score()", case):
        try:
            scores = metric.score(case, before, after)
        except KeyError as error:
            lacking = next((key for key in error.args if isinstance(key, Question)), None)
            if lacking is None:
                raise
            if lacking in _questions(name, metric, case) or any(
                lacking in _followups(name, metric, case, answers) for answers in (before, after)
            ):
                raise MissingAnswerError(name) from None
            raise MetricError(
                name,
                f"looked up the answer to {lacking!r}, which it did not ask: neither questions() "
                f"nor followups() gave it for {_shown(case)}.",
            ) from None
    if not isinstance(scores, Mapping) or not all(
        isinstance(score, CaseScore) and isinstance(score.value, Real) for score in scores.values()
    ):
        raise MetricError(
            name,
            f"returned {scores!r}; score() must return a mapping from parts to CaseScore, each "
            f"with a number.",
        )
    return scores


def _questions(name: str, metric: Metric, case: EditCase) -> list[Question]:
    with _calling(name, "questions()", case):
        return _only_questions(metric.questions(case))


def _followups(name: str, metric: Metric, case: EditCase, answers: Answers) -> list[Question]:
    if not hasattr(metric, "followups"):
        return []
    with _calling(name, "followups()", case):
        return _only_questions(metric.followups(case, answers))


def _only_questions(found: Iterable[Question]) -> list[Question]:
    listed = list(found)
    for question in listed:
        if not isinstance(question, Question):
            raise TypeError(f"{question!r} is no question")
    return listed


def _numbers(found: Mapping[str, float]) -> dict[str, float]:
    if isinstance(found, Mapping) and all(isinstance(value, Real) for value in found.values()):
        return {part: float(value) for part, value in found.items()}
    raise TypeError(f"{found!r} is no mapping from parts to numbers")


@contextlib.contextmanager
def _calling(name: str, function: str, case: EditCase | None = None) -> Iterator[None]:
    """Where a metric's code runs: whatever it raises becomes a `MetricError`."""
    try:
        yield
    except (MetricError, MissingAnswerError):
        raise
    except Exception as error:
        log.debug("%s in %s", name, function, exc_info=True)
        where = f" for {_shown(case)}" if case is not None else ""
        kind = "" if isinstance(error, KEditError) else f"{type(error).__name__}: "
        said = f"failed in {function}{where}: {kind}{reason_of(error)}"
        raise MetricError(name, said.rstrip(".") + ".") from error


def _shown(case: EditCase) -> str:
    return f"the case {shorten(case.requests[0].text, 60)!r}"
