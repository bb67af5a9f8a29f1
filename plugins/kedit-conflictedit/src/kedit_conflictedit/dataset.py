"""ConflictEdit, pairs of edits that contradict, and RoundEdit, facts that have many answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kedit_core import (
    EditCase,
    EditRequest,
    Format,
    LeftOut,
    Probe,
    Row,
    RowError,
    Source,
    UnfitRow,
    probe,
    read_cases,
    request_of,
)


class ConflictEdit:
    """In ConflictEdit (`reverse_edit`, `composite_edit`, `coverage_edit`) the edits of a row, in
    their order; the last one contradicts the first.  Asked too, of what should hold at the end:
    the last edit as a question (kind `rephrase`), the fact that follows from both (kind
    `portability`, name `implied`; not for coverage), and the facts on which the contradiction
    rests, which nobody edits (kind `locality`, name `tied_fact`).

    In RoundEdit (`easy`, `hard`) one edit of a relation that has several true answers, all of
    them former answers, and the edit as a question.

    Rows with an edit that changes nothing are left out.
    """

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `reverse_edit.json` or `easy.json`.

        Raises:
            DataError: the file cannot be read or is neither of the two.
        """
        pairs = frozenset({"type", "triples", "prerequisites", "edits"})
        known = [
            Format("ConflictEdit", pairs, self._pair),
            Format("RoundEdit", frozenset({"type", "edit", "true_objects"}), self._round),
        ]
        yield from read_cases(source, known)

    def _pair(self, row: Row) -> EditCase:
        edits = row.rows("edits")
        if not edits:
            raise UnfitRow("it has no edit")
        meta = {"type": row.text("type"), "relations": [_relation(edit) for edit in edits]}
        if "rule" in row:
            meta["rule"] = row.text("rule")
        return EditCase(
            requests=tuple(_request(edit, [_label(edit, "object")]) for edit in edits),
            probes=(*_question(edits[-1]), *_implied(row, edits), *_tied_facts(row)),
            meta=meta,
        )

    def _round(self, row: Row) -> EditCase:
        edit = row.row("edit")
        truths = dict.fromkeys(true.text("label").strip() for true in row.rows("true_objects"))
        return EditCase(
            request=_request(edit, truths),
            probes=tuple(_question(edit)),
            meta={"type": row.text("type"), "relations": [_relation(edit)]},
        )


def _request(edit: Row, truths: Iterable[str]) -> EditRequest:
    target = _label(edit, "new_object")
    if target == _label(edit, "object"):
        raise UnfitRow(f"'{edit.path}new_object' is the object that it replaces")
    prompt = edit.row("relation").filled("prompt")
    return request_of(prompt, _label(edit, "subject"), target, ground_truth=truths)


def _question(edit: Row) -> Iterator[Probe]:
    query = edit.row("relation").text("query")
    if query.strip():
        asked = query.replace("{}", _label(edit, "subject"))
        yield probe("rephrase", "", asked, [_label(edit, "new_object")])


def _implied(row: Row, edits: tuple[Row, ...]) -> Iterator[Probe]:
    """What the authors call the implicit conflict: the last edit, seen from the first's side."""
    first, last = edits[0], edits[-1]
    known = {
        "reverse": (_label(last, "new_object"), _label(first, "new_object")),
        "composite": (_label(first, "subject"), _label(last, "new_object")),
    }
    if row.text("type") in known:
        subject, answer = known[row.text("type")]
        asked = first.row("relation").filled("prompt").replace("{}", subject)
        yield probe("portability", "implied", asked, [answer])


def _tied_facts(row: Row) -> Iterator[Probe]:
    triples, places = row.rows("triples"), row.value.get("prerequisites")
    if not isinstance(places, list) or any(n not in range(len(triples)) for n in places):
        raise RowError("'prerequisites' is no list of places in 'triples'")
    for tied in (triples[place] for place in places):
        prompt = tied.row("relation").text("prompt")
        subject, answer = tied.row("subject").text("label"), tied.row("object").text("label")
        if prompt.strip() and subject.strip():
            asked = prompt.replace("{}", subject.strip())
            yield probe("locality", "tied_fact", asked, [answer])


def _label(fact: Row, key: str) -> str:
    return fact.row(key).filled("label").strip()


def _relation(edit: Row) -> str:
    return edit.row("relation").text("id")
