"""The user's own file as a dataset."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from kedit_core import (
    EditCase,
    Format,
    LeftOut,
    Probe,
    Row,
    RowError,
    Source,
    probe,
    read_cases,
    request_of,
)
from kedit_core.errors import nearest

log = logging.getLogger(__name__)


class Jsonl:
    """A JSON, JSON lines or CSV file with one edit per record.

    Each argument is the name of a column; by default the column is called like the argument.
    The file must have the columns of prompt and target, and every column that is named here;
    the others may be missing.  A column of texts holds one text or a list of them.

    Args:
        prompt: the text that the target completes; `{}` may stand for the subject.
        target_new: the answer to write.
        subject: what the edit is about.
        ground_truth: the former answer or answers.
        rephrase: other wordings of the prompt, answered by the target.
        locality: questions whose answers must stay.
        locality_answer: accepted answers: for one question a text or a list, for a list of
            questions a list as long, of texts or lists.
        portability: questions that follow from the edit.
        portability_answer: their answers, in the same way.
        id: a text or a whole number that names the edit.

    Raises:
        TypeError: an argument is no text.
    """

    def __init__(
        self,
        *,
        prompt: str | None = None,
        subject: str | None = None,
        target_new: str | None = None,
        ground_truth: str | None = None,
        rephrase: str | None = None,
        locality: str | None = None,
        locality_answer: str | None = None,
        portability: str | None = None,
        portability_answer: str | None = None,
        id: str | None = None,
    ) -> None:
        given = {
            "prompt": prompt,
            "subject": subject,
            "target_new": target_new,
            "ground_truth": ground_truth,
            "rephrase": rephrase,
            "locality": locality,
            "locality_answer": locality_answer,
            "portability": portability,
            "portability_answer": portability_answer,
            "id": id,
        }
        for name, column in given.items():
            if column is not None and not (isinstance(column, str) and column):
                raise TypeError(f"{name} is the name of a column in quotes, not {column!r}")
        self.columns = {name: column or name for name, column in given.items()}
        self.needed = frozenset(
            self.columns[name]
            for name, column in given.items()
            if column or name in ("prompt", "target_new")
        )

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file; tells of its columns that are not read.

        Raises:
            DataError: the file cannot be read, or lacks a column that it must have.
        """
        known = set(self.columns.values())

        def case_of(row: Row) -> EditCase:
            if unread := [column for column in row.value if column not in known]:
                known.update(unread)
                log.warning(
                    "%s, line %d: columns that are not read: %s.",
                    row.file,
                    row.line,
                    ", ".join(map(self._unread, unread)),
                )
            return self._case(row)

        yield from read_cases(source, [Format("the columns asked for", self.needed, case_of)])

    def _unread(self, column: str) -> str:
        meant = nearest(column, self.columns.values())
        return f"'{column}'" + (f" (did you mean '{meant}'?)" if meant else "")

    def _case(self, row: Row) -> EditCase:
        if missing := sorted(self.needed - row.value.keys()):
            raise RowError(f"it lacks '{missing[0]}'")
        subject = self._text(row, "subject")
        target = row.filled(self.columns["target_new"]).strip()
        request = request_of(
            row.filled(self.columns["prompt"]),
            subject or None,
            target,
            ground_truth=self._texts(row, "ground_truth"),
            id=self._id(row),
        )
        probes = (
            *(probe("rephrase", "", asked, [target]) for asked in self._texts(row, "rephrase")),
            *self._questions(row, "locality"),
            *self._questions(row, "portability"),
        )
        meta = {"subject": subject} if subject else {}
        return EditCase(request=request, probes=probes, meta=meta)

    def _text(self, row: Row, name: str) -> str:
        """The text in a column; empty where there is none."""
        column = self.columns[name]
        return "" if row.value.get(column) is None else row.text(column).strip()

    def _texts(self, row: Row, name: str) -> tuple[str, ...]:
        """The texts in a column; none where there is nothing."""
        column = self.columns[name]
        return () if row.value.get(column) is None else row.answers(column)

    def _id(self, row: Row) -> str:
        column = self.columns["id"]
        is_number = isinstance(row.value.get(column), int)
        return str(row.number(column)) if is_number else self._text(row, "id")

    def _questions(self, row: Row, kind: str) -> Iterator[Probe]:
        """The questions in a column, each with the answers in its place of the other column.

        One that is to follow from the edit needs an answer; one that is not to change does not.
        """
        column, beside = self.columns[kind], self.columns[f"{kind}_answer"]
        asked, answers = row.value.get(column), row.value.get(beside)
        if asked and kind == "portability" and beside not in row:
            raise RowError(f"it has '{column}', but lacks '{beside}'")
        if not isinstance(asked, list):
            asked, answers = [asked], [answers]
        elif answers is None:
            answers = [None] * len(asked)
        if not isinstance(answers, list) or len(answers) != len(asked):
            raise RowError(f"'{column}' is a list, but '{beside}' is not one as long")
        for question, answer in zip(asked, answers, strict=True):
            here = {column: question, beside: answer}
            part = Row(row.file, row.line, {k: "" if v is None else v for k, v in here.items()})
            text, accepted = part.text(column), part.answers(beside)
            if text.strip() and (accepted or kind == "locality"):
                yield probe(kind, "", text, accepted)
