"""WISE's OOD score: how sure a model is of another text on what was edited."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from kedit_core.ask import Answers, Question, Read
from kedit_core.measure import mean, read_of
from kedit_core.protocols import CaseScore
from kedit_core.request import EditCase

SURE = math.log(0.8)  # δ of the paper


class OtherText:
    """Share of a text's tokens whose probability, given all before them, is above 0.8 (WISE,
    arXiv:2405.14768, temporal set), on probes of kind `rephrase` named `ood`.

    The text's first word is given and the rest is read, so that no token is asked for that has
    nothing before it, whether or not the model has a beginning token.  A text of one word has no
    score.  The authors' code also counts padding, as tokens that the model is sure of, and leaves
    out what is behind 1,024 tokens.
    """

    def questions(self, case: EditCase) -> Iterable[Question]:
        """A reading of each text after its first word, as it is written."""
        texts = [p.prompt.strip() for p in case.probes if (p.kind, p.name) == ("rephrase", "ood")]
        return [
            Read(words[0], text[len(words[0]) :], exact=True)
            for text in texts
            if len(words := text.split(maxsplit=1)) == 2
        ]

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """The mean over the case's texts, of which there is one; empty where there is none."""
        read = [read_of(after, question) for question in self.questions(case)]
        if not read:
            return {}
        shares = [mean(logprob > SURE for logprob in score.logprobs) for score in read]
        return {"": CaseScore(mean(shares), len(shares))}
