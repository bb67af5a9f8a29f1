"""Likelihoods of answers as figures of a case, and perplexity of their means."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kedit_core.protocols import CaseScore

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
