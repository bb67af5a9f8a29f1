"""What the model writes after a case's prompts, compared with the accepted answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from kedit_core.ask import Answers, Continue, Question
from kedit_core.measure import at_least_one, by_family, probes_of, text_of
from kedit_core.protocols import CaseScore
from kedit_core.request import EditCase, Probe

NEW_TOKENS = 128

# Pairs of a written text and an accepted answer, and how alike those of each pair are.
Compare = Callable[[Sequence[tuple[str, str]]], Sequence[float]]


class Similarity:
    """How like its accepted answer is what the model writes after each prompt of one kind?

    The model continues the prompt greedily; the best accepted answer counts.  The value of a case
    is the mean over families of the mean over their probes; families are its parts.

    Args:
        kind: of the probes; `rewrite` is the requests' own prompts with their targets.
        compare: makes numbers of texts and answers.
        new_tokens: how many tokens are written at most.

    Raises:
        SettingError: `new_tokens` is no whole number from 1 on.
    """

    def __init__(self, kind: str, compare: Compare, new_tokens: int = NEW_TOKENS) -> None:
        self.kind, self.compare = kind, compare
        self.new_tokens = at_least_one("new_tokens", new_tokens)

    def questions(self, case: EditCase) -> Iterable[Question]:
        """A continuation of each prompt."""
        return [self._asked(probe) for probe in self._probes(case)]

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """Scores by family; empty where the case has no such probe with an accepted answer."""
        probes = self._probes(case)
        pairs = [
            (text_of(after, self._asked(probe)).text.strip(), answer)
            for probe in probes
            for answer in probe.expected
        ]
        values = iter(self.compare(pairs) if pairs else ())
        return by_family(
            (probe.name, max(next(values) for _ in probe.expected)) for probe in probes
        )

    def _asked(self, probe: Probe) -> Continue:
        return Continue(probe.prompt, self.new_tokens)

    def _probes(self, case: EditCase) -> list[Probe]:
        return [p for p in probes_of(case) if p.kind == self.kind and p.expected]
