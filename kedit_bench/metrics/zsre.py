"""ZsRE as ROME, MEMIT and AlphaEdit score it: token by token, with the faults of the last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kedit_core.ask import Answers, Question, Read
from kedit_core.measure import mean, probes_of, read_of
from kedit_core.protocols import CaseScore
from kedit_core.request import EditCase


@dataclass(frozen=True)
class _Asked:
    """One prompt: what is read for the answer's first token and for the others, and how many
    tokens of the answer are wrong whatever the model says."""

    first: Read
    rest: Read
    wrong: int = 0

    def hits(self, answers: Answers) -> list[bool]:
        """Whether each token of the answer is the most probable one."""
        first, rest = _right(answers, self.first), _right(answers, self.rest)
        return [*first[:1], *rest[1:], *[False] * self.wrong]


class ZsreHarness:
    """Shares of answer tokens that are the most probable ones, as AlphaEdit's code computes them.

    `efficacy`: the new answer after the rewritten prompt; `generalization`: after rephrased
    prompts; `specificity`: the right answer after unrelated questions with a `?` behind them.
    Always one space before the answer.  That is also what ROME (arXiv:2202.05262) and MEMIT
    (arXiv:2210.07229) compute.

    With `bos`, also what AlphaEdit's code (arXiv:2410.02355, `eval_utils_zsre.py`, `zsre.py`) does
    to LLaMA-3, which lowers the scores: there is a second space before the answer where its later
    tokens are asked; after unrelated questions the beginning token stands once more, and is
    asked for as a first token of the answer, which no model says.

    The authors decode the answer's tokens one by one and encode them again after the prompt; here
    prompt and answer are encoded together.  That is the same but for answers whose beginnings
    have other tokens than they have within the answer.

    Args:
        bos: the beginning token as text, `<|begin_of_text|>`; empty for models without one, as
            GPT-2 and GPT-J.
    """

    def __init__(self, bos: str = "") -> None:
        self.bos = bos

    def questions(self, case: EditCase) -> Iterable[Question]:
        """The answers after each prompt; nothing where a case has several requests."""
        asked = (one for prompts in self._asked(case).values() for one in prompts)
        return [question for one in asked for question in (one.first, one.rest)]

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """The three shares: those for which the case has prompts."""
        return {
            part: CaseScore(mean(hit for one in prompts for hit in one.hits(after)), len(prompts))
            for part, prompts in self._asked(case).items()
            if prompts
        }

    def _asked(self, case: EditCase) -> dict[str, list[_Asked]]:
        if len(case.requests) != 1:
            return {}
        answer, probes = case.request.target_new, probes_of(case)
        return {
            "efficacy": [self._written(p.prompt, answer) for p in probes if p.kind == "rewrite"],
            "generalization": [
                self._written(p.prompt, answer) for p in probes if p.kind == "rephrase"
            ],
            "specificity": [
                self._unrelated(p.prompt, p.expected[0])
                for p in probes
                if p.kind == "locality" and p.expected
            ],
        }

    def _written(self, prompt: str, answer: str) -> _Asked:
        later = f"{prompt} " if self.bos else prompt
        return _Asked(Read(prompt, f" {answer}"), Read(later, f" {answer}"))

    def _unrelated(self, prompt: str, answer: str) -> _Asked:
        read = Read(f"{prompt}?{self.bos}", f" {answer}")
        return _Asked(read, read, wrong=1 if self.bos else 0)


def _right(answers: Answers, question: Read) -> list[bool]:
    found = read_of(answers, question)
    return [a == b for a, b in zip(found.tokens, found.predicted, strict=True)]
