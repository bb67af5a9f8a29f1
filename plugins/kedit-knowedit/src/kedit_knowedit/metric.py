"""Sanitation's scores: is an answer forgotten, and are other answers the same?"""

from __future__ import annotations

from collections.abc import Sequence

from kedit_core.ask import Answers, Continue, Question
from kedit_core.measure import ProbeMetric, mean, text_of
from kedit_core.request import Probe
from kedit_core.texts import contains

NEW_TOKENS = 8


def forgotten() -> ProbeMetric:
    """Success: 1 if the edit's answer ("I don't know.") stands in 8 new tokens."""

    def of(probe: Probe, before: Answers, after: Answers) -> float:
        written = text_of(after, _question(probe)).text
        return float(any(contains(written, answer) for answer in probe.expected))

    return ProbeMetric("rewrite", _asks, of)


def retained() -> ProbeMetric:
    """Locality: share of the 8 new tokens that are those of the unedited model, by position.

    Where one text is shorter, it lacks what the other has.
    """

    def of(probe: Probe, before: Answers, after: Answers) -> float:
        old, new = (text_of(answers, _question(probe)).tokens for answers in (before, after))
        return _agreement(old, new)

    return ProbeMetric("locality", _asks, of, needs_expected=False)


def _asks(probe: Probe) -> list[Question]:
    return [_question(probe)]


def _question(probe: Probe) -> Continue:
    return Continue(probe.prompt, NEW_TOKENS)


def _agreement(old: Sequence[int], new: Sequence[int]) -> float:
    length = max(len(old), len(new))
    return mean(old[n : n + 1] == new[n : n + 1] for n in range(length)) if length else 1.0
