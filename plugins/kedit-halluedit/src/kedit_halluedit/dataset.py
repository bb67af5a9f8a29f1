"""HalluEditBench: one table for each model and topic, of questions that the model got wrong."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from kedit_core import (
    EditCase,
    Format,
    LeftOut,
    Probe,
    Row,
    RowError,
    Source,
    files_in,
    probe,
    read_cases,
    request_of,
)
from kedit_core.cases import probe_each

HOPS = range(2, 7)
COLUMNS = frozenset(
    {
        "topic",
        "subject",
        "relation",
        "object",
        "question",
        "multiple_choices",
        "paraphrased_question",
        "multiple_choice_with_letters",
        "multiple_choice_labels",
        "yes_question",
        "no_question",
        "locality_question",
        "reversed_relation_question",
    }
).union(*({f"question_{hops}hop", f"answer_{hops}hop"} for hops in HOPS))
OUTPUT = "output_"  # and the model's name


class HalluEdit:
    """A question, its true answer, and what a model said instead, as the former answer.

    Asked too: a paraphrase (kind `rephrase`); what follows (kind `portability`, names `yes`, `no`,
    `multiple_choice`, `reversed`, `hop_2` to `hop_6`); another question about the same subject
    (kind `locality`, name `same_subject`, no known answer).  A question whose cell or answer is
    empty is not asked.

    Rows without a question or an answer are left out.
    """

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a table such as `art_sculpture.csv`, or of all tables of a folder.

        Raises:
            DataError: a file cannot be read or is not HalluEditBench.
        """
        known = [Format("HalluEditBench", COLUMNS, self._case)]
        for file in files_in(source, "*.csv"):
            yield from read_cases(file, known)

    def _case(self, row: Row) -> EditCase:
        outputs = [column for column in row.value if column.startswith(OUTPUT)]
        target = row.filled("object").strip()
        request = request_of(
            row.filled("question"),
            row.filled("subject").strip(),
            target,
            ground_truth=[row.text(column).strip() for column in outputs],
        )
        return EditCase(
            request=request,
            probes=tuple(self._probes(row, target)),
            meta={
                "topic": row.text("topic"),
                "subject": row.text("subject"),
                "relation": row.text("relation"),
                "models": [column.removeprefix(OUTPUT) for column in outputs],
                "choices": _choices(row),
            },
        )

    def _probes(self, row: Row, target: str) -> Iterator[Probe]:
        yield from probe_each("rephrase", "", [row.text("paraphrased_question")], [target])
        for name, asked, answer in _what_follows(row):
            if asked.strip() and answer.strip():
                yield probe("portability", name, asked, [answer])
        yield from probe_each("locality", "same_subject", [row.text("locality_question")])


def _what_follows(row: Row) -> Iterator[tuple[str, str, str]]:
    """Name, question and answer of each question that follows from the edit."""
    yield "yes", row.text("yes_question"), "Yes"
    yield "no", row.text("no_question"), "No"
    if letters := row.text("multiple_choice_with_letters").strip():
        asked = f"{row.text('question')}\n{letters}"
        yield "multiple_choice", asked, row.text("multiple_choice_labels")
    yield "reversed", row.text("reversed_relation_question"), row.text("subject")
    for hops in HOPS:
        yield f"hop_{hops}", row.text(f"question_{hops}hop"), row.text(f"answer_{hops}hop")


def _choices(row: Row) -> list[str]:
    """The texts of `multiple_choices`, a list as Python writes it."""
    try:
        found = ast.literal_eval(row.text("multiple_choices"))
    except (ValueError, SyntaxError):
        found = None
    if not isinstance(found, list) or not all(isinstance(choice, str) for choice in found):
        raise RowError("'multiple_choices' is no list of texts")
    return found
