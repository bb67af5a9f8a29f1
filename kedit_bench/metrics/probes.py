"""Mean over a case's probes of one kind, family by family."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from kedit_core.ask import Answers, Question
from kedit_core.measure import by_family, probes_of
from kedit_core.protocols import CaseScore
from kedit_core.request import EditCase, Probe

# Questions about one probe, and its value from the answers without and with the edit: None where
# they do not tell.
Asks = Callable[[Probe], Iterable[Question]]
Value = Callable[[Probe, Answers, Answers], float | None]

_PER_CASE = "perplexity_per_case"


def perplexity(nll: float) -> float:
    """exp of a mean negative log-probability in nats, finite whatever became of the model."""
    return math.exp(min(nll, 100.0))  # so that squares of it are finite too


def likelihood_scores(nll: Mapping[str, CaseScore]) -> dict[str, CaseScore]:
    """A case's mean negative log-probabilities by part, and `perplexity_per_case` of each."""
    each = {
        _of(part, _PER_CASE): CaseScore(perplexity(s.value), s.probes) for part, s in nll.items()
    }
    return {**nll, **each}


def perplexities(means: Mapping[str, float]) -> dict[str, float]:
    """`perplexity` of each part of `likelihood_scores`, from the means over cases."""
    nll = {part: value for part, value in means.items() if not part.endswith(_PER_CASE)}
    return {_of(part, "perplexity"): perplexity(value) for part, value in nll.items()}


def _of(part: str, figure: str) -> str:
    """The name of a figure of a part; the headline's has its name alone."""
    return f"{part}.{figure}" if part else figure


@dataclass(frozen=True)
class ProbeMetric:
    """The mean over families of the mean over a case's probes of one kind.

    Attributes:
        kind: kind of the probes that count.
        asks: what is asked about a probe.
        value: value of a probe.
        needs_expected: whether a probe without an accepted answer is left out.
    """

    kind: str
    asks: Asks
    value: Value
    needs_expected: bool = True

    def questions(self, case: EditCase) -> Iterable[Question]:
        """What is asked about the case's probes of this kind."""
        return [question for probe in self._probes(case) for question in self.asks(probe)]

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """Scores by family; empty where the case has no such probe that has a value."""
        values = ((p.name, self.value(p, before, after)) for p in self._probes(case))
        return by_family((name, value) for name, value in values if value is not None)

    def _probes(self, case: EditCase) -> list[Probe]:
        return [
            probe
            for probe in probes_of(case)
            if probe.kind == self.kind and (probe.expected or not self.needs_expected)
        ]
