"""CHED's success of edits: the new answer is written, and the old one is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from kedit_core.ask import Answers, Continue, Question
from kedit_core.measure import at_least_one, by_family, probes_of, text_of
from kedit_core.protocols import CaseScore
from kedit_core.request import EditCase, Probe
from kedit_core.texts import contains


class EditingSuccess:
    """Share of prompts after which the new answer stands in the text, and the old one does not
    (Park et al. 2025, arXiv:2505.23026).

    Asked are the rewritten prompt (part `rewrite`), its paraphrases (`rephrase`), and the prompt
    after each sentence (the names of the probes of kind `context`).  The headline is the mean over
    parts.

    The text is greedy up to the model's own end; the authors sample past it.  Answers are
    compared as whole words without regard to case; the authors' code finds `Rome` in `Romeo`.  A
    case whose new answer holds the old one could not succeed, and has no score.

    Args:
        new_tokens: longest text.
    """

    def __init__(self, new_tokens: int = 50) -> None:
        self.new_tokens = at_least_one("new_tokens", new_tokens)

    def questions(self, case: EditCase) -> Iterable[Question]:
        """A continuation of each prompt."""
        return [Continue(probe.prompt, self.new_tokens) for _, probe in _asked(case)]

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """Shares by part; empty where no former answer is known."""
        old = [truth for request in case.requests for truth in request.ground_truth]
        asked = list(_asked(case))
        new = {answer for _, probe in asked for answer in probe.expected}
        if not old or any(contains(answer, truth) for answer in new for truth in old):
            return {}
        return by_family(
            (part, float(_has(text, probe.expected) and not _has(text, old)))
            for part, probe in asked
            for text in [text_of(after, Continue(probe.prompt, self.new_tokens)).text]
        )


def _asked(case: EditCase) -> Iterator[tuple[str, Probe]]:
    """The probes, each with its part."""
    for probe in probes_of(case):
        if probe.expected and probe.kind in ("rewrite", "rephrase", "context"):
            yield probe.name if probe.kind == "context" else probe.kind, probe


def _has(text: str, answers: Iterable[str]) -> bool:
    return any(contains(text, answer) for answer in answers)
