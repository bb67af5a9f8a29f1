"""AKEW: the same facts as sentences to complete and as paragraphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

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
from kedit_core.cases import probe_each

KEYS = frozenset({"case_id", "requested_rewrite"})
MULTI_HOP = frozenset({"questions", "new_answer", "new_answer_alias"})
NEIGHBOURS = frozenset({"paraphrase_prompts", "neighborhood_prompts"})


class Akew:
    """A fact to write, or in `MQuAKE-CF.json` a group of them, as a sentence to complete with a
    short answer, or as a question to answer with a paragraph.

    A structured edit is asked as a question (kind `rephrase`).  Of an unstructured one are asked
    the short answer in the sentence (kind `portability`, name `fact`) and the other facts that the
    paragraph states (kind `portability`, name `triplet`).  `MQuAKE-CF.json` adds questions that
    follow from all facts of the group (`portability`, `multi_hop`: one right answer is enough),
    `CounterFact.json` paraphrases (`rephrase`) and neighbours (`locality`, `neighborhood`).

    Args:
        writes_paragraphs: make the unstructured edits.
    """

    def __init__(self, writes_paragraphs: bool = False) -> None:
        self.writes_paragraphs = writes_paragraphs

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `WikiUpdate.json`.

        Raises:
            DataError: the file cannot be read or is not AKEW.
        """
        known = {
            "AKEW's MQuAKE-CF": KEYS | MULTI_HOP,
            "AKEW's CounterFact": KEYS | NEIGHBOURS,
            "AKEW's WikiUpdate": KEYS,
        }
        yield from read_cases(source, [Format(n, keys, self._case) for n, keys in known.items()])

    def _case(self, row: Row) -> EditCase:
        grouped = isinstance(row.value.get("requested_rewrite"), list)
        rewrites = row.rows("requested_rewrite") if grouped else (row.row("requested_rewrite"),)
        if not rewrites:
            raise UnfitRow("it has nothing to edit")
        make = _paragraph if self.writes_paragraphs else _sentence
        case_id = row.number("case_id")
        requests = tuple(make(rewrite, f"{case_id}-{n}") for n, rewrite in enumerate(rewrites))
        return EditCase(
            requests=requests,
            probes=(
                *(p for pair in zip(rewrites, requests, strict=True) for p in self._probes(*pair)),
                *_multi_hop(row),
                *_neighbours(row, requests, rewrites),
            ),
            meta={
                "subjects": [rewrite.text("subject") for rewrite in rewrites],
                "relation_ids": [rewrite.text("relation_id") for rewrite in rewrites],
            },
        )

    def _probes(self, rewrite: Row, request: EditRequest) -> Iterator[Probe]:
        if not self.writes_paragraphs:
            question = rewrite.text("question").strip()
            if question:
                yield probe("rephrase", "", question, _answers(rewrite))
            return
        yield probe("portability", "fact", _sentence(rewrite, request.id).text, _answers(rewrite))
        for triplet in rewrite.rows("unsfact_triplets_GPT"):
            asked = triplet.text("prompt").replace("{}", triplet.text("subject")).strip()
            if asked and triplet.text("target").strip():
                yield probe("portability", "triplet", asked, [triplet.text("target")])


def _sentence(rewrite: Row, id: str) -> EditRequest:
    return request_of(
        rewrite.filled("prompt").strip(),
        rewrite.filled("subject").strip(),
        rewrite.row("target_new").filled("str").strip(),
        ground_truth=[rewrite.row("target_true").text("str").strip()],
        id=id,
    )


def _paragraph(rewrite: Row, id: str) -> EditRequest:
    return request_of(
        rewrite.text("question").strip() or _sentence(rewrite, id).text,
        rewrite.text("subject").strip(),
        rewrite.filled("fact_new_uns").strip(),
        id=id,
    )


def _answers(rewrite: Row) -> tuple[str, ...]:
    """The short answer and its aliases, whose key the files spell in two ways."""
    aliases = ("answer_new_alias", "answer_new_aliases")
    found = (answer for key in aliases if key in rewrite for answer in rewrite.answers(key))
    return (rewrite.row("target_new").text("str"), *found)


def _multi_hop(row: Row) -> Iterator[Probe]:
    if not row.value.keys() >= MULTI_HOP:
        return
    answers = (*row.answers("new_answer"), *row.answers("new_answer_alias"))
    for question in row.texts("questions"):
        if question.strip() and answers:
            test = {"test": "multi_hop", "combine": "any", "conditions": []}
            yield probe("portability", "multi_hop", question.strip(), answers, **test)


def _neighbours(
    row: Row, requests: Sequence[EditRequest], rewrites: Sequence[Row]
) -> Iterator[Probe]:
    if not row.value.keys() >= NEIGHBOURS:
        return
    others = map(str.strip, row.texts("paraphrase_prompts"))
    yield from probe_each("rephrase", "", others, [requests[0].target_new])
    true = rewrites[0].row("target_true").text("str")
    near = map(str.strip, row.texts("neighborhood_prompts"))
    yield from probe_each("locality", "neighborhood", near, [true])


structured = partial(Akew, writes_paragraphs=False)
unstructured = partial(Akew, writes_paragraphs=True)
