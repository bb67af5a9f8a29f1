"""CKnowEdit: Chinese questions that a model answered wrongly, with the right answers."""

from __future__ import annotations

from collections.abc import Iterator

from kedit_core import (
    EditCase,
    EditRequest,
    Format,
    LeftOut,
    Probe,
    Row,
    Source,
    probe,
    read_cases,
)

KEYS = frozenset({"prompt", "target_old", "target_new", "rephrase"})


class CKnowEdit:
    """A Chinese question and its right answer; the question in other words (kind `rephrase`, as
    often as the record has it); questions that need the same knowledge (kind `portability`, name
    `related`) and questions that do not (kind `locality`, name `unrelated`).

    What the model said before the edit is its former answer.  The records name no subject.
    """

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `ccks-CKnowEdit.json`.

        Raises:
            DataError: the file cannot be read or is not CKnowEdit.
        """
        yield from read_cases(source, [Format("CKnowEdit", KEYS, _case)])


def _case(row: Row) -> EditCase:
    target, former = row.filled("target_new").strip(), row.text("target_old").strip()
    return EditCase(
        request=EditRequest(
            prompt=row.filled("prompt").strip(),
            target_new=target,
            ground_truth=(former,) if former else (),
        ),
        probes=(
            *(probe("rephrase", "", p.strip(), [target]) for p in row.answers("rephrase")),
            *_questions(row, "portability", "related"),
            *_questions(row, "locality", "unrelated"),
        ),
    )


def _questions(row: Row, kind: str, name: str) -> Iterator[Probe]:
    """The questions under a key that may be absent or null.

    What an edit must not change can be compared without an answer; the rest cannot.
    """
    for question in row.rows(kind) if row.value.get(kind) is not None else ():
        prompt, answers = question.text("prompt").strip(), question.answers("answer")
        if prompt and (answers or kind == "locality"):
            yield probe(kind, name, prompt, answers)
