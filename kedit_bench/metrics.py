"""Scores of one case, from the answers to its probes without and with the edit.

A metric's name carries its protocol, and scores of different names never share a column.
Formulas are in `docs/metrics.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from kedit_core.request import EditCase, Probe
from kedit_core.view import Answer

KINDS = {
    "efficacy": "rewrite",
    "generalization": "rephrase",
    "locality": "locality",
    "portability": "portability",
}


def probes_of(case: EditCase) -> tuple[Probe, ...]:
    """The case's probes with the rewritten prompt itself in front."""
    request = case.request
    rewrite = Probe(kind="rewrite", prompt=request.text, expected=(request.target_new,))
    return (rewrite, *case.probes)


@dataclass(frozen=True)
class ProbeMetric:
    """Mean over a case's probes of one kind.

    Attributes:
        name: id of the metric.
        kind: kind of the probes that count.
        score_probe: value of one probe from its answers before and after.
        needs_expected: whether a probe without an expected answer is left out.
    """

    name: str
    kind: str
    score_probe: Callable[[Probe, Answer, Answer], float]
    needs_expected: bool = True

    def score(
        self, case: EditCase, before: Sequence[Answer], after: Sequence[Answer]
    ) -> Mapping[str, float]:
        """The score by name; empty where the case has no such probe.

        `before` and `after` answer `probes_of(case)`, in that order.
        """
        values = [
            self.score_probe(probe, old, new)
            for probe, old, new in zip(probes_of(case), before, after, strict=True)
            if probe.kind == self.kind and (probe.expected or not self.needs_expected)
        ]
        return {self.name: sum(values) / len(values)} if values else {}


def begins_with(text: str, answer: str) -> bool:
    """Whether a text begins with the answer: as whole words, case ignored."""
    found, wanted = text.lstrip().casefold(), answer.strip().casefold()
    return found.startswith(wanted) and not found[len(wanted) : len(wanted) + 1].isalnum()


def answered(probe: Probe, before: Answer, after: Answer) -> float:
    """1 if the greedy answer after the edit begins with an accepted answer."""
    return float(any(begins_with(after.text, answer) for answer in probe.expected))


def token_accuracy(probe: Probe, before: Answer, after: Answer) -> float:
    """Share of answer tokens that are the most probable ones; the best accepted answer counts."""
    return max(score.accuracy for score in after.scores)


def same_answer(probe: Probe, before: Answer, after: Answer) -> float:
    """1 if the greedy answer has not changed in as many words as the expected answer has."""
    words = max(len(answer.split()) for answer in probe.expected) if probe.expected else 1
    old, new = (_words(answer.text)[:words] for answer in (before, after))
    return float(old == new)


def same_tokens(probe: Probe, before: Answer, after: Answer) -> float:
    """Share of the expected answer's tokens at which the prediction has not changed."""
    shares = []
    for old, new in zip(before.scores, after.scores, strict=True):
        same = [a == b for a, b in zip(old.predicted, new.predicted, strict=True)]
        shares.append(sum(same) / len(same))
    return sum(shares) / len(shares)


def _words(text: str) -> list[str]:
    return [word.strip(".,;:!?\"'()").casefold() for word in text.split()]


def _metric(
    kind: str,
    protocol: str,
    score: Callable[[Probe, Answer, Answer], float],
    needs_expected: bool = True,
) -> partial:
    return partial(ProbeMetric, f"{kind}/{protocol}@1", KINDS[kind], score, needs_expected)


efficacy_teacher_forced = _metric("efficacy", "teacher-forced", token_accuracy)
efficacy_greedy = _metric("efficacy", "greedy", answered)
generalization_teacher_forced = _metric("generalization", "teacher-forced", token_accuracy)
generalization_greedy = _metric("generalization", "greedy", answered)
locality_teacher_forced = _metric("locality", "teacher-forced", same_tokens)
locality_greedy = _metric("locality", "greedy", same_answer, needs_expected=False)
portability_teacher_forced = _metric("portability", "teacher-forced", token_accuracy)
portability_greedy = _metric("portability", "greedy", answered)
