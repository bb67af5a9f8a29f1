"""Concept Consistency: does an edited model define a concept anew?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from kedit_core.ask import Answers, Continue, Question
from kedit_core.measure import text_of
from kedit_core.protocols import CaseScore
from kedit_core.request import EditCase
from kedit_core.texts import natural_end
from kedit_judge.judge import Template, Verdict, letter_of
from kedit_judge.metric import Judged

NEW_TOKENS = 40


def _closeness(said: str) -> Verdict:
    """1 for the new definition, -1 for the old one, 0 for neither."""
    return {"A": 1.0, "B": -1.0, "C": 0.0}.get(letter_of(said, "ABC"))


class Consistency(Judged):
    """Concept Consistency (Wang et al. 2024, arXiv:2403.06259), from -1 to 1; the paper's is 100
    times as much.

    The edited model continues the rewritten prompt by up to 40 tokens, each the most probable
    one.  A judge reads that to its natural end and says 1 where it is close to the new definition,
    -1 where it is close to the old one, 0 where it is neither.

    The files that are edited hold no old definition.  The authors take it from another file; here
    it is what the unedited model writes, so -1 says that the edit changed nothing.
    """

    template = Template(
        """\
A text says what something is. Decide which of two definitions it comes close to in meaning, even if
both are untrue in the real world.

Text:
{text}

Definition A:
{new}

Definition B:
{old}

Say only the letter:
A: the text is close to definition A
B: the text is close to definition B
C: the text is close to neither
""",
        _closeness,
    )

    def questions(self, case: EditCase) -> Iterable[Question]:
        """A continuation of each rewritten prompt."""
        return [Continue(request.text, NEW_TOKENS) for request in case.requests]

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """The mean verdict over the case's requests, and `unparseable`."""
        items = []
        for request in case.requests:
            old, text = (
                natural_end(text_of(answers, Continue(request.text, NEW_TOKENS)).text)
                for answers in (before, after)
            )
            items.append(("", {"text": text, "new": request.target_new, "old": old}))
        return self._means(items)


consistency = partial(Consistency, "rewrite")
