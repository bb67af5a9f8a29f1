"""ConceptEdit's change of instances: how many fewer of them the edited model calls so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kedit_bench.metrics.answers import GREEDY_TOKENS
from kedit_core.ask import Answers, Continue, Question
from kedit_core.measure import begins_with, mean, text_of
from kedit_core.protocols import CaseScore
from kedit_core.request import EditCase

NO = "No"


class InstanceChange:
    """Share of instances called so before the edit, less the share after it (Wang et al. 2024,
    arXiv:2403.06259), on probes of kind `instance`.

    A reply says so if it begins with an accepted answer ("Yes").  The authors' code counts a reply
    that is neither yes nor no as a yes; here it is none, and part `unclear` is the share of such
    replies after the edit.
    """

    def questions(self, case: EditCase) -> Iterable[Question]:
        """A continuation of each instance's prompt."""
        return [Continue(p.prompt, GREEDY_TOKENS) for p in case.probes if p.kind == "instance"]

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """The change, from -1 to 1, and `unclear`; empty where the case has no instance."""
        changes, unclear = [], []
        for probe in case.probes:
            if probe.kind != "instance":
                continue
            old, new = (
                text_of(answers, Continue(probe.prompt, GREEDY_TOKENS)).text
                for answers in (before, after)
            )
            yes = [any(begins_with(text, a) for a in probe.expected) for text in (old, new)]
            changes.append(yes[0] - yes[1])
            unclear.append(not yes[1] and not begins_with(new, NO))
        if not changes:
            return {}
        return {
            "": CaseScore(mean(changes), len(changes)),
            "unclear": CaseScore(mean(unclear), len(unclear)),
        }
