"""Settings scored on facts, with a journal, so that a search that was killed goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf, isfinite
from statistics import fmean, harmonic_mean
from typing import Any

from kedit_bench.journal import Journal
from kedit_bench.scoring import IMMEDIATE, Measurement, Scorer, choose_metrics
from kedit_bench.search import BudgetSpent, Score
from kedit_bench.unedited import Asker
from kedit_core.ask import number_to_json
from kedit_core.errors import DataError, KEditError
from kedit_core.hparams import HyperParams
from kedit_core.request import EditCase
from kedit_core.spec import MethodSpec

PARTS = {  # quantity: the metric that measures it
    "efficacy": "efficacy/greedy@1",
    "rephrase": "generalization/greedy@1",
    "neighbours": "locality-agreement/greedy@1",
}
NLL = "locality-accuracy/nll@1"


class Trials:
    """The `Measure` of a search: edits of the unedited model, as many facts at once as may be.

    Args:
        asker: of a session without edits.
        spec: the method.
        cases: the facts.
        where: model, dtype, dataset and schedule, for the scorer.
        journal: what was measured before, and where it goes.
        tick: called after each edit.
    """

    def __init__(
        self,
        asker: Asker,
        spec: MethodSpec,
        cases: Sequence[EditCase],
        where: Mapping[str, str],
        journal: Journal,
        tick: Callable[[], object] = lambda: None,
    ) -> None:
        self.spent = 0.0  # seconds of work, also that of a run that was killed
        self._asker, self._spec, self._cases = asker, spec, cases
        chosen = choose_metrics(asker.session.catalog, [*PARTS.values(), NLL])
        self._scorer = Scorer(chosen, where)
        self._journal, self._tick = journal, tick
        self._kept = {line["trial"]: line for line in journal.lines() if "trial" in line}
        self._used: set[str] = set()
        questions = (q for case in cases for q in self._scorer.questions(case))
        self._before = asker.unedited(questions)

    def __call__(self, hparams: HyperParams, numbers: Sequence[int], until: float = inf) -> Score:
        size = self._spec.max_batch or len(numbers)
        steps = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        return score_of([self._step(hparams, list(step), until) for step in steps])

    def _step(self, hparams: HyperParams, numbers: list[int], until: float) -> dict[str, Any]:
        """The journal's line of facts that are edited together."""
        key = json.dumps([hparams.model_dump(mode="json"), numbers], sort_keys=True)
        if key not in self._used and self.spent >= until:
            raise BudgetSpent
        if key not in self._kept:
            started = time.perf_counter()
            line = self._measured(hparams, [self._cases[n] for n in numbers])
            line = {"trial": key, "cost": time.perf_counter() - started, **line}
            self._journal.append(line)
            self._kept[key] = line
        line = self._kept[key]
        if key not in self._used:
            self._used.add(key)
            self.spent += line["cost"]
            self._tick()
        return line

    def _measured(self, hparams: HyperParams, cases: Sequence[EditCase]) -> dict[str, Any]:
        """Edit cases together and ask about each; an edit that fails scores 0."""
        requests = [request for case in cases for request in case.requests]
        questions = [q for case in cases for q in self._scorer.questions(case)]
        unchanged = [_values(self._scorer.unchanged(case, self._before)) for case in cases]
        try:
            with self._asker.session.trial(self._spec, requests, hparams=hparams) as outcome:
                after = self._asker.edited(questions)
        except KEditError as error:
            self._asker.check()
            parts = set(PARTS.values())
            scores = [{k: 0.0 if k in parts else v for k, v in s.items()} for s in unchanged]
            return {"scores": scores, "seconds": 0.0, "failed": str(error)}
        scores = [_values(self._scorer.score(c, self._before, after, IMMEDIATE)) for c in cases]
        return {"scores": scores, "seconds": outcome.seconds}


def _values(measurements: Iterable[Measurement]) -> dict[str, float | str]:
    """Headline values by metric, as the journal has them."""
    return {m.protocol.metric: number_to_json(m.value) for m in measurements if not m.protocol.part}


def score_of(lines: Sequence[Mapping[str, Any]]) -> Score:
    """Lines of a journal as one score; a quantity that no fact has a probe for does not count.

    Raises:
        DataError: no fact's own answer could be judged.
    """
    cases = [scores for line in lines for scores in line["scores"]]
    means = {
        metric: fmean(float(s[metric]) for s in cases if metric in s)
        for metric in (*PARTS.values(), NLL)
        if any(metric in s for s in cases)
    }
    parts = {name: means[metric] for name, metric in PARTS.items() if metric in means}
    if "efficacy" not in parts:
        raise DataError(
            f"{PARTS['efficacy']} judges none of these facts: their answers are longer than what "
            f"is written. Tune on facts with short answers."
        )
    nll = means.get(NLL, 0.0)
    return Score(
        value=harmonic_mean(list(parts.values())),
        parts=parts,
        nll=nll if isfinite(nll) else inf,
        seconds=sum(line["seconds"] for line in lines) / len(cases),
        cost=sum(line["cost"] for line in lines),
        failures=tuple(line["failed"] for line in lines if "failed" in line),
    )
