"""EditEverything: long answers of many kinds."""

from __future__ import annotations

from collections.abc import Iterator

from kedit_core import EditCase, EditRequest, Format, LeftOut, Row, Source, read_cases

KEYS = frozenset({"id", "question", "answer", "category"})


class EditEvery:
    """A question and its long answer, with nothing else to ask; `meta` has the category."""

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `editevery.json`.

        Raises:
            DataError: the file cannot be read or is not EditEverything.
        """
        yield from read_cases(source, [Format("EditEverything", KEYS, _case)])


def _case(row: Row) -> EditCase:
    return EditCase(
        request=EditRequest(
            prompt=row.filled("question").strip(),
            target_new=row.filled("answer").strip(),
            id=str(row.number("id")),
        ),
        meta={"category": row.text("category")},
    )
