"""Sanitation: answers to forget, and answers to keep."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial

from kedit_core import (
    EditCase,
    Format,
    LeftOut,
    Probe,
    RequestError,
    Row,
    Source,
    UnfitRow,
    probe,
    read_cases,
    request_of,
)
from kedit_knowedit.files import file_of

QUOTED = re.compile(r'"((?:[^"]|"")*)"', re.DOTALL)


class Sanitation:
    """One case for each question whose answer is to be forgotten; the edit writes "I don't know."

    The questions whose answers are kept (kind `locality`, name `retained`) are dealt out to the
    cases in the file's order: the first few to the first case, the next few to the second, so
    that all are asked once.

    The questions about one answer are a group (`meta["group"]`: the answer in lower case, for the
    files spell it in several), so that scores are told for each answer too.
    """

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `trivia_qa_test.json`, or of the one in a folder.

        Raises:
            DataError: the file cannot be read or is not Sanitation.
        """
        formats = [
            Format("Sanitation", frozenset(keys), partial(self._cases, *keys))
            for keys in (("success", "locality"), ("K_F", "K_R"))
        ]
        yield from read_cases(file_of(source, "*trivia_qa_{}.json"), formats)

    def _cases(self, forget: str, retain: str, row: Row) -> Iterator[EditCase | LeftOut]:
        questions, retained = row.rows(forget), row.rows(retain)
        for place, question in enumerate(questions):
            start, end = (len(retained) * n // len(questions) for n in (place, place + 1))
            try:
                yield _case(question, retained[start:end])
            except (UnfitRow, RequestError) as error:  # this question alone, not the whole file
                yield LeftOut(row.file, row.line, str(error).rstrip("."))


def _case(question: Row, retained: Sequence[Row]) -> EditCase:
    forgotten = _unquoted(question.filled("ground_truth")).strip()
    request = request_of(
        _unquoted(question.filled("question")).strip(),
        question.text("subject") if "subject" in question else None,
        question.filled("target_new").strip(),
        ground_truth=(forgotten,),
    )
    return EditCase(
        request=request,
        probes=tuple(_probes(retained)),
        meta={"group": forgotten.lower()},
    )


def _probes(retained: Sequence[Row]) -> Iterator[Probe]:
    for question in retained:
        if question.text("question").strip():
            answers = [_unquoted(answer) for answer in question.answers("ground_truth")]
            yield probe("locality", "retained", _unquoted(question.text("question")), answers)


def _unquoted(text: str) -> str:
    """A field as it was before a CSV writer put quotes around it and doubled those inside."""
    found = QUOTED.fullmatch(text)
    return found[1].replace('""', '"') if found else text
