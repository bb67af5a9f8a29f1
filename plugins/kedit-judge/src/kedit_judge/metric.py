"""Shares of replies that a language model judges right, and what all its metrics share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import ClassVar

from kedit_core.ask import Answers, Continue, Question
from kedit_core.measure import by_family, mean, probes_of, text_of
from kedit_core.protocols import CaseScore
from kedit_core.request import EditCase, Probe
from kedit_core.texts import NATURAL_TOKENS, natural_end
from kedit_judge.endpoint import Endpoint
from kedit_judge.judge import Item, Judge, Prices, Template, Verdict, letter_of


class Judged:
    """A metric whose verdicts a language model gives; all replies of a case are judged together.

    What the judge says may be no verdict: the part `unparseable` is the share of such judgements.
    They count nowhere else, and a case that has no other has no score.

    Args:
        kind: of the probes that count; `rewrite` is the requests' own prompts too.
        url: address of an OpenAI-compatible endpoint, up to before `/chat/completions`; by
            default KEDIT_JUDGE_URL.
        model: the judge's name there; by default KEDIT_JUDGE_MODEL.
        temperature: of the judge.
        price_in, price_out: of a million tokens, to log the cost.
        workers: how many judgements of a case run at the same time.
        timeout: seconds to wait for one reply of the judge.
        retries: further tries where the endpoint is busy, broken or silent; pauses grow.

    The key is read from KEDIT_JUDGE_KEY and from nowhere else.

    Raises:
        SettingError: a setting is missing or refused, or the endpoint refuses to work.
    """

    template: ClassVar[Template]

    def __init__(
        self,
        kind: str,
        url: str = "",
        model: str = "",
        temperature: float = 0.0,
        price_in: float | None = None,
        price_out: float | None = None,
        workers: int = 8,
        timeout: float = 60.0,
        retries: int = 6,
    ) -> None:
        self.kind = kind
        endpoint = Endpoint(url, model, temperature, timeout, retries)
        self.judge = Judge(endpoint, self.template, workers, Prices.of(price_in, price_out))
        self.details = f"judge {endpoint.model}, prompt {self.template.digest}"

    def combine(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """No further figures; a summary is being made, so what it cost so far is logged."""
        self.judge.log_cost(f"{self.kind} probes")
        return {}

    def _means(self, items: Sequence[tuple[str, Item]]) -> dict[str, CaseScore]:
        """Mean verdicts of items by family, their mean, and `unparseable`."""
        if not items:
            return {}
        verdicts = self.judge.verdicts([item for _, item in items])
        pairs = [(name, v) for (name, _), v in zip(items, verdicts, strict=True) if v is not None]
        return {**by_family(pairs), "unparseable": unparseable(verdicts)}


def unparseable(verdicts: Sequence[Verdict]) -> CaseScore:
    """The share of judgements that are none."""
    return CaseScore(mean(verdict is None for verdict in verdicts), len(verdicts))


_WORD = re.compile(r"(\bnot |n['’]t |\bin|\b)correct\b", re.IGNORECASE)


def _is_correct(said: str) -> Verdict:
    """1 or 0 by the letter that the judge begins with, or else the word it says.

    Words of both kinds make no verdict.
    """
    letter = letter_of(said, "AB")
    if letter:
        return float(letter == "A")
    words = {0.0 if found[1] else 1.0 for found in _WORD.finditer(said)}
    return words.pop() if len(words) == 1 else None


class Correct(Judged):
    """Share of probes whose reply a language model judges right (arXiv:2502.11177, WILD).

    The edited model is asked as people ask and writes up to 50 tokens, each the most probable
    one; its reply is cut at the natural end.  The judge is given question, accepted answers and
    reply.  A case's score is

        correct / (correct + incorrect)

    within each family of probes (a part by its name), and the mean over families under "".
    """

    template = Template(
        """\
Decide whether a reply to a question is correct.

Question, or text to complete:
{question}

Accepted answers (any one of them is right, even if it is untrue in the real world):
{accepted}

Reply:
{reply}

The reply is correct if it gives an accepted answer, in whatever words, and does not contradict it.
Say only the letter:
A: correct
B: incorrect
""",
        _is_correct,
    )

    def questions(self, case: EditCase) -> Iterable[Question]:
        """The case's probes of this kind, to be continued."""
        return [_question(probe) for probe in self._probes(case)]

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """Shares by family, their mean, and `unparseable`."""
        return self._means(
            [
                (
                    probe.name,
                    {
                        "question": probe.prompt,
                        "accepted": probe.expected,
                        "reply": natural_end(text_of(after, _question(probe)).text),
                    },
                )
                for probe in self._probes(case)
            ]
        )

    def _probes(self, case: EditCase) -> list[Probe]:
        return [p for p in probes_of(case) if p.kind == self.kind and p.expected]


rewrite = partial(Correct, "rewrite")
rephrase = partial(Correct, "rephrase")
portability = partial(Correct, "portability")
locality = partial(Correct, "locality")


def _question(probe: Probe) -> Continue:
    return Continue(probe.prompt, NATURAL_TOKENS, form="task")
