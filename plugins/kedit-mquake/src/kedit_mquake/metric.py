"""Multi-hop accuracy of MQuAKE: its questions after eight demonstrations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path

from kedit_core.ask import Answers, Continue, Question
from kedit_core.errors import SettingError
from kedit_core.measure import mean, text_of
from kedit_core.protocols import CaseScore
from kedit_core.request import EditCase, Probe
from kedit_core.texts import NATURAL_TOKENS, contains, first_line

CHAIN_TOKENS = 200


class MultiHop:
    """1 if the answer to any of a case's multi-hop questions is right (Zhong et al. 2023,
    arXiv:2305.14795): an accepted answer stands in it.

    Questions are probes of kind `portability` whose option `test` is `multi_hop`.  Each is asked
    after the demonstrations; the first line of what the model writes is its answer.  With `chain`
    the model writes its thoughts first, and only the first line behind `Answer:` counts; part
    `unanswered` is the share of questions to which it wrote no such line.

    Args:
        chain: demonstrations have the lines `Question:`, `Thoughts:` and `Answer:`, else `Q:` and
            `A:`.
        demonstrations: a text file to put in place of the eight that ship with the package, such
            as the authors' `multihop-prompts.txt`.  Where question and answer stand in one line
            there, so does what is asked.

    Raises:
        SettingError: the file cannot be read, or has other demonstrations.
    """

    def __init__(self, chain: bool, demonstrations: str = "") -> None:
        self.chain = chain
        marks = ("Question:", "Thoughts:", "Answer:") if chain else ("Q:", "A:")
        own = files("kedit_mquake") / ("chain.txt" if chain else "few_shot.txt")
        try:
            text = (Path(demonstrations) if demonstrations else own).read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise SettingError(f"'{demonstrations}' cannot be read: {error}.") from None
        for mark in marks:
            if mark not in text:
                raise SettingError(
                    f"'{demonstrations}' has no '{mark}'. Its demonstrations must have "
                    f"{', '.join(marks)}."
                )
        between, line = ("\n\n", "\n") if f"\n{marks[1]}" in text else ("\n", " ")
        self._before = f"{text}{between}{marks[0]} "
        self._behind = f"{line}{marks[1]}"
        self.details = f"demonstrations {hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def questions(self, case: EditCase) -> Iterable[Question]:
        """A continuation of each multi-hop question."""
        return [self._question(probe) for probe in _probes(case)]

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """1 or 0, and `unanswered`; empty where the case has no multi-hop question."""
        probes = _probes(case)
        if not probes:
            return {}
        said = [self._answer(text_of(after, self._question(probe)).text) for probe in probes]
        right = any(
            contains(answer, accepted)
            for probe, answer in zip(probes, said, strict=True)
            for accepted in probe.expected
        )
        scores = {"": CaseScore(float(right))}
        if self.chain:
            scores["unanswered"] = CaseScore(mean(not answer for answer in said), len(said))
        return scores

    def _question(self, probe: Probe) -> Continue:
        tokens = CHAIN_TOKENS if self.chain else NATURAL_TOKENS
        return Continue(self._before + probe.prompt + self._behind, tokens)

    def _answer(self, text: str) -> str:
        """The answer in what the model wrote; empty where there is none."""
        if self.chain:
            text = text.partition("Question:")[0].partition("Answer:")[2]
        return first_line(text)


few_shot = partial(MultiHop, False)
chain = partial(MultiHop, True)


def _probes(case: EditCase) -> list[Probe]:
    return [
        probe
        for probe in case.probes
        if probe.kind == "portability" and probe.options.get("test") == "multi_hop"
    ]
