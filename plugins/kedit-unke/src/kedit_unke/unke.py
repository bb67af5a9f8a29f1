"""UnKEBench: paragraphs as answers."""

from __future__ import annotations

from collections.abc import Iterator

from kedit_core import (
    EditCase,
    EditRequest,
    Format,
    LeftOut,
    Probe,
    Row,
    RowError,
    Source,
    probe,
    read_cases,
)
from kedit_core.cases import probe_each

KEYS = frozenset({"id", "question", "para_question", "answer", "sub_question", "sub_answer"})


class Unke:
    """A question and a paragraph to answer it; the question in other words (kind `rephrase`); and
    questions about single facts of the paragraph (kind `portability`, name `sub_question`).
    """

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `final_data_v3.json`.

        Raises:
            DataError: the file cannot be read or is not UnKEBench.
        """
        yield from read_cases(source, [Format("UnKEBench", KEYS, _case)])


def _case(row: Row) -> EditCase:
    target = row.filled("answer").strip()
    return EditCase(
        request=EditRequest(
            prompt=row.filled("question").strip(), target_new=target, id=str(row.number("id"))
        ),
        probes=tuple(_probes(row, target)),
    )


def _probes(row: Row, target: str) -> Iterator[Probe]:
    yield from probe_each("rephrase", "", [row.text("para_question").strip()], [target])
    questions, answers = row.texts("sub_question"), row.texts("sub_answer")
    if len(questions) != len(answers):
        raise RowError(f"it has {len(questions)} 'sub_question' but {len(answers)} 'sub_answer'")
    for question, answer in zip(questions, answers, strict=True):
        if question.strip() and answer.strip():
            yield probe("portability", "sub_question", question.strip(), [answer])
