"""HalluEditBench's robustness: does the model stand by the edit when it is contradicted?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kedit_core.ask import Answers, Converse, Question
from kedit_core.measure import at_least_one, mean, text_of
from kedit_core.protocols import CaseScore
from kedit_core.request import EditCase
from kedit_core.texts import begins_with, contains

# Another sentence is another protocol: give the metric a new version with it.
OBJECTION = "What you answered to my first question is wrong. {} Say only Yes or No."
REPLY_TOKENS = 16


class Robustness:
    """Share of turns at which the model still says Yes (Huang et al. 2024, arXiv:2410.16251).

    The first turn is the request's own question, and each further one says that the answer is
    wrong and asks the probe of kind `portability` named `yes`.  All earlier replies, of at most 16
    tokens, stand in the conversation.  Part `turn_0` is 1 if the new answer stands in the first
    reply, `turn_N` if the reply to the N-th objection begins with Yes; the headline is the mean
    over the objections.

    The authors put a system message in front that asks for short replies, use words of their own
    to object, and have a language model compare replies; here nothing is put in front and words
    are compared.

    Args:
        turns: how many objections.
    """

    def __init__(self, turns: int = 10) -> None:
        self.turns = at_least_one("turns", turns)

    def questions(self, case: EditCase) -> Iterable[Question]:
        """The conversation up to each turn; nothing where the case has no yes-question."""
        for probe in case.probes:
            if (probe.kind, probe.name) == ("portability", "yes"):
                turns = (case.request.text, *[OBJECTION.format(probe.prompt)] * self.turns)
                return [Converse(turns[:n], REPLY_TOKENS) for n in range(1, len(turns) + 1)]
        return []

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """The mean over the objections, and each turn by itself."""
        replies = [text_of(after, question).text for question in self.questions(case)]
        if not replies:
            return {}
        still = [float(begins_with(reply, "Yes")) for reply in replies[1:]]
        right = float(contains(replies[0], case.request.target_new))
        each = {f"turn_{n}": CaseScore(value) for n, value in enumerate([right, *still])}
        return {"": CaseScore(mean(still), self.turns), **each}
