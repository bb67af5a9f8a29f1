"""MQuAKE: facts that are edited together, and questions whose answers change with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kedit_core import (
    EditCase,
    EditRequest,
    Format,
    LeftOut,
    Probe,
    Row,
    Source,
    UnfitRow,
    probe,
    read_cases,
    request_of,
)

KEYS = frozenset(
    {
        *("case_id", "requested_rewrite", "questions", "new_single_hops"),
        *("answer", "answer_alias", "new_answer", "new_answer_alias"),
    }
)


class MQuake:
    """A group of facts to write together, each as a sentence to complete; for each the same fact
    as a question (kind `rephrase`); questions that follow from all of them at once (kind
    `portability`, name `multi_hop`: one right answer is enough); and the single facts on the way
    to the answer (kind `portability`, name `single_hop`: all must be right).

    Of the single facts, the edited ones are asked as the sentence that was written and the others
    as a question, as the benchmark's authors do.
    """

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `MQuAKE-CF-3k-v2.json`.

        Raises:
            DataError: the file cannot be read or is not MQuAKE.
        """
        yield from read_cases(source, [Format("MQuAKE", KEYS, _case)])


def _case(row: Row) -> EditCase:
    rewrites = row.rows("requested_rewrite")
    if not rewrites:
        raise UnfitRow("it has nothing to edit")
    case_id = row.number("case_id")
    requests = tuple(
        request_of(
            rewrite.filled("prompt").strip(),
            rewrite.filled("subject").strip(),
            rewrite.row("target_new").filled("str").strip(),
            ground_truth=[rewrite.row("target_true").text("str").strip()],
            id=f"{case_id}-{n}",
        )
        for n, rewrite in enumerate(rewrites)
    )
    return EditCase(
        requests=requests,
        probes=(
            *_rephrased(rewrites, requests),
            *_multi_hop(row),
            *_single_hops(row, {request.text for request in requests}),
        ),
        meta={
            "hops": len(row.rows("new_single_hops")),
            "old_answers": [*_old_answers(row)],
            "relation_ids": [rewrite.text("relation_id") for rewrite in rewrites],
        },
    )


def _rephrased(rewrites: Sequence[Row], requests: Sequence[EditRequest]) -> Iterator[Probe]:
    for rewrite, request in zip(rewrites, requests, strict=True):
        question = rewrite.text("question").strip()
        if question:
            yield probe("rephrase", "", question, [request.target_new])


def _multi_hop(row: Row) -> Iterator[Probe]:
    answers = (*row.answers("new_answer"), *row.answers("new_answer_alias"))
    for question in row.texts("questions"):
        if question.strip() and answers:
            test = {"test": "multi_hop", "combine": "any", "conditions": []}
            yield probe("portability", "multi_hop", question.strip(), answers, **test)


def _single_hops(row: Row, edited: set[str]) -> Iterator[Probe]:
    for hop in row.rows("new_single_hops"):
        cloze, question = hop.text("cloze").strip(), hop.text("question").strip()
        asked = cloze if cloze in edited else question or cloze
        answers = (*hop.answers("answer"), *hop.answers("answer_alias"))
        if asked and answers:
            test = {"test": "single_hops", "combine": "all", "conditions": []}
            yield probe("portability", "single_hop", asked, answers, **test)


def _old_answers(row: Row) -> tuple[str, ...]:
    """What was right before the edit; MQuAKE-T accepts more under a key of its own."""
    keys = ("answer", "answer_alias", "answer_extended")
    found = [answer.strip() for key in keys if key in row for answer in row.answers(key)]
    return tuple(dict.fromkeys(found))
