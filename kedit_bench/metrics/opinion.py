"""Opinions written into a model: ConvSent's sentiments, PersonalityEdit's traits.

Formulas of MEND's sentiment task (Mitchell et al. 2022, arXiv:2206.06520), with two different
models and log-probabilities that are read where they are predicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from kedit_core.ask import Answers, Diverge, Divergence, Question, Read
from kedit_core.measure import ProbeMetric, mean, read_of
from kedit_core.protocols import CaseScore
from kedit_core.request import EditCase, Probe


class Opinion:
    """ES = z_sent · z_topic on probes of kind `opinion`.

    z_sent = σ(log p'(same) − log p'(other)), z_topic = min(1, exp(log p'(same) − log p(same))):
    means over the tokens of the utterances of the wanted opinion (`same`) and of the others; p'
    is the edited model.
    """

    def questions(self, case: EditCase) -> Iterable[Question]:
        """Every utterance of both kinds."""
        return [
            Read(probe.prompt, utterance)
            for probe in _opinions(case)
            for side in ("same", "other")
            for utterance in _utterances(probe, side)
        ]

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """ES and its two factors."""
        probes = _opinions(case)
        if not probes:
            return {}
        sent, topic = [], []
        for probe in probes:
            same = _mean_logprob(after, probe, "same")
            other = _mean_logprob(after, probe, "other")
            sent.append(1 / (1 + math.exp(min(other - same, 700.0))))  # more is no float
            # In this order what is no number stays none.
            topic.append(math.exp(min(same - _mean_logprob(before, probe, "same"), 0.0)))
        products = [a * b for a, b in zip(sent, topic, strict=True)]
        parts = {"": products, "z_sent": sent, "z_topic": topic}
        return {part: CaseScore(mean(values), len(values)) for part, values in parts.items()}


def divergence() -> ProbeMetric:
    """DD: mean of KL(p ‖ p') over the tokens of all that is said about another topic, in nats."""

    def asks(probe: Probe) -> list[Question]:
        return [Diverge(probe.prompt, answer) for answer in probe.expected]

    def of(probe: Probe, before: Answers, after: Answers) -> float:
        found = [_divergence(after, question) for question in asks(probe)]
        return sum(d.kl * d.tokens for d in found) / sum(d.tokens for d in found)

    return ProbeMetric("locality", asks, of)


def _divergence(answers: Answers, question: Question) -> Divergence:
    found = answers[question]
    assert isinstance(found, Divergence)
    return found


def _opinions(case: EditCase) -> list[Probe]:
    return [
        probe
        for probe in case.probes
        if probe.kind == "opinion" and _utterances(probe, "same") and _utterances(probe, "other")
    ]


def _utterances(probe: Probe, side: str) -> list[str]:
    found = probe.options.get(side)
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


def _mean_logprob(answers: Answers, probe: Probe, side: str) -> float:
    reads = [read_of(answers, Read(probe.prompt, text)) for text in _utterances(probe, side)]
    return mean(logprob for read in reads for logprob in read.logprobs)
