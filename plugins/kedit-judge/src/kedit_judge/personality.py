"""PAE: does an edited model write more in the manner of the target trait?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial

from kedit_core.ask import Answers, Continue, Question
from kedit_core.measure import mean, text_of
from kedit_core.protocols import CaseScore
from kedit_core.request import EditCase
from kedit_core.texts import first_line, ngram_entropy
from kedit_judge.judge import Template, Verdict
from kedit_judge.metric import Judged, unparseable

TRAITS = ("neuroticism", "agreeableness", "extraversion")
NEW_TOKENS = 60
COHERENT = 3.5  # bits

_SCORE = re.compile(  # neither -1 nor 4.5, and no range
    r"[\W_]*(?:(?i:(?:the |my )?(?:answer|score|rating|number)(?: is)?)[\W_]+)?"
    r"(?<![-−])([1-5])(?![^\W_]|[.,]\d|[ \t]*(?:[-–]|or |to )[ \t]*\d)"
)


def _score(said: str) -> Verdict:
    """The number from 1 to 5 that the judge begins with."""
    found = _SCORE.match(said)
    return float(found[1]) if found else None


class Pae(Judged):
    """PAE (Mao et al. 2023, arXiv:2310.02168): how far a judge finds the trait `meta["trait"]` in
    the text of the edited model, from 1 to 5, less the same for the unedited model.

    The texts are those of `personality/tpei@1`: the first line of a continuation of a `generation`
    prompt by up to 60 tokens, each the most probable one.  Where the n-gram entropy of the text
    before or after the edit is below 3.5 bits, neither counts; the part `left_out` is the share
    of such texts.  A difference needs both verdicts.
    """

    template = Template(
        """\
Decide how far an opinion shows a trait of its author's character.

neuroticism: worries easily, is tense, moody and quickly upset
agreeableness: is kind, trusting and helpful, and gets along with others
extraversion: is outgoing, talkative and lively, and likes company

Opinion:
{text}

Does the author show {trait}? Say only the number:
1: surely not
2: rather not
3: cannot be told
4: rather
5: surely
""",
        _score,
    )

    def questions(self, case: EditCase) -> Iterable[Question]:
        """A continuation of each `generation` prompt; nothing where the case names no trait."""
        if case.meta.get("trait") not in TRAITS:
            return []
        return [Continue(p.prompt, NEW_TOKENS) for p in case.probes if p.kind == self.kind]

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """The mean difference, from -4 to 4, `left_out` and `unparseable`."""
        pairs = [
            (first_line(text_of(before, q).text), first_line(text_of(after, q).text))
            for q in self.questions(case)
        ]
        if not pairs:
            return {}
        kept = [pair for pair in pairs if min(map(ngram_entropy, pair)) >= COHERENT]
        scores = {"left_out": CaseScore(1 - len(kept) / len(pairs), len(pairs))}
        if not kept:
            return scores
        trait = str(case.meta["trait"])
        verdicts = self.judge.verdicts(
            [{"text": text, "trait": trait} for pair in kept for text in pair]
        )
        scores["unparseable"] = unparseable(verdicts)
        differences = [
            new - old
            for old, new in zip(verdicts[::2], verdicts[1::2], strict=True)
            if old is not None and new is not None
        ]
        if differences:
            scores[""] = CaseScore(mean(differences), len(differences))
        return scores


pae = partial(Pae, "generation")
