"""ELKEN, event-level editing: an event, the facts that it changes, and what it may lead to."""

from __future__ import annotations

from collections.abc import Iterator
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

KEYS = frozenset({"event", "event_type", "fact", "tendency"})
UNKNOWN = "unknown"  # answer of facts that the event makes uncertain
OPENING = "Event:"  # what stands before an event in the authors' prompts


class Elken:
    """An event, written either as the facts that it changes or as it stands.

    Asked too: what the event may lead to, as a choice whose letter is the answer, in brackets or
    not (kind `portability`, name `tendency`); facts and choices that it leaves alone (kind
    `locality`, names `fact` and `tendency`).

    Args:
        writes_event: write the event itself, after the word with which the authors' prompts
            begin.  The facts are then asked (kind `portability`, name `fact`).  Otherwise each
            fact is a request, and they are edited together.

    Facts whose answer is unknown after the event are neither written nor asked.  Rows without a
    fact to write are left out, if facts are written.
    """

    def __init__(self, writes_event: bool = False) -> None:
        self.writes_event = writes_event

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `test.json`.

        Raises:
            DataError: the file cannot be read or is not ELKEN.
        """
        yield from read_cases(source, [Format("ELKEN", KEYS, self._case)])

    def _case(self, row: Row) -> EditCase:
        event = row.filled("event").strip()
        facts = tuple(fact for fact in row.row("fact").rows("qas") if _is_known(fact))
        if self.writes_event:
            requests = (request_of(OPENING, None, event),)
        elif facts:
            requests = tuple(map(_request, facts))
        else:
            raise UnfitRow("it has no fact with a known answer")
        return EditCase(
            requests=requests,
            probes=tuple(self._probes(row, facts)),
            meta={
                "event": event,
                "event_type": row.text("event_type"),
                "relations": [fact.text("rel_id") for fact in facts],
            },
        )

    def _probes(self, row: Row, facts: tuple[Row, ...]) -> Iterator[Probe]:
        if self.writes_event:
            yield from _asked("portability", facts)
        yield from _chosen("portability", row.row("tendency").rows("qas"))
        yield from _asked("locality", row.row("fact").rows("local_qas"))
        yield from _chosen("locality", row.row("tendency").rows("local_qas"))


def _is_known(fact: Row) -> bool:
    """Whether there is an answer; its `id` does not say that: dates and numbers have none."""
    answer = fact.row("answer").text("name").strip()
    return answer != "" and answer.lower() != UNKNOWN


def _request(fact: Row) -> EditRequest:
    subject = fact.row("subject")
    name = subject.filled("name" if "name" in subject else "ent2name")
    return request_of(fact.filled("question"), name, fact.row("answer").filled("name").strip())


def _asked(kind: str, facts: tuple[Row, ...]) -> Iterator[Probe]:
    for fact in facts:
        answer = fact.row("answer")
        spelled = answer.answers("name") + answer.answers("alias")
        accepted = dict.fromkeys(text.strip() for text in spelled)
        if fact.text("question").strip():
            yield probe(kind, "fact", fact.text("question"), accepted)


def _chosen(kind: str, choices: tuple[Row, ...]) -> Iterator[Probe]:
    for choice in choices:
        question, candidates = choice.text("question").strip(), choice.text("candidate").strip()
        letter = choice.text("answer")
        if question and candidates and letter.strip():
            accepted = [letter.strip(), f"({letter.strip()})"]  # as the candidates are numbered
            yield probe(kind, "tendency", f"{question}\n{candidates}", accepted)


facts = partial(Elken, writes_event=False)
event = partial(Elken, writes_event=True)
