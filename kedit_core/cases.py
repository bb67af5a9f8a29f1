"""How an adapter turns rows into cases: by formats that it knows, as requests and probes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from kedit_core.errors import DataError, RequestError, nearest
from kedit_core.records import LeftOut, Row, RowError, Source, UnfitRow, read_rows
from kedit_core.request import SLOT, EditCase, EditRequest, Probe

Item = TypeVar("Item", EditCase, Probe)


@dataclass(frozen=True)
class Format(Generic[Item]):
    """One schema that an adapter knows.

    Attributes:
        name: for messages.
        keys: what every row of it has; the first format whose keys the first row has is taken.
        cases: makes the case or cases of a row, or its probes.  It may raise `RowError`
            (malformed) and `UnfitRow` or `RequestError` (of no use); the row is then left out
            with that reason.
    """

    name: str
    keys: frozenset[str]
    cases: Callable[[Row], Item | Iterable[Item | LeftOut]]


def read_cases(source: Source | None, formats: Sequence[Format[Item]]) -> Iterator[Item | LeftOut]:
    """The cases of a file in one of several formats, and what was left out, in the file's order.

    Formats whose rows make probes are read the same way.

    Raises:
        DataError: the file cannot be read, or has none of the formats.
    """
    assert source is not None, "the spec says that a path is needed"
    chosen: Format[Item] | None = None
    for row in read_rows(source):
        if chosen is None:
            chosen = _format_of(row, formats)
        yield from _cases_of(row, chosen)


def _cases_of(row: Row, chosen: Format[Item]) -> Iterator[Item | LeftOut]:
    try:
        made = chosen.cases(row)
        yield from (made,) if isinstance(made, EditCase | Probe) else tuple(made)
    except RowError as error:
        yield LeftOut(row.file, row.line, str(error), malformed=True)
    except (UnfitRow, RequestError) as error:
        yield LeftOut(row.file, row.line, str(error).rstrip("."))


def _format_of(row: Row, formats: Sequence[Format[Item]]) -> Format[Item]:
    for known in formats:
        if known.keys <= row.value.keys():
            return known
    closest = min(formats, key=lambda f: (len(f.keys - row.value.keys()), len(f.keys)))
    missing = sorted(closest.keys - row.value.keys())
    hint = f"The file has: {', '.join(sorted(row.value))}." if row.value else "It is empty."
    if meant := nearest(missing[0], row.value):
        hint = f"Did you mean '{meant}'?"
    raise DataError(
        f"{row.file}, line {row.line}: no known format. It comes nearest to {closest.name}, but "
        f"lacks {', '.join(repr(key) for key in missing)}. {hint}"
    )


def with_next(
    found: Iterable[EditCase | LeftOut], join: Callable[[EditCase, EditCase], EditCase]
) -> Iterator[EditCase | LeftOut]:
    """What `join` makes of each case and the one after it, and of the last case and the first.

    The order is kept, with what was left out in its place; a single case is joined with itself.
    """
    first: EditCase | None = None
    held: EditCase | None = None
    left: list[LeftOut] = []  # since the case that is held
    for item in found:
        if isinstance(item, LeftOut):
            left.append(item)
            continue
        if held is not None:
            yield join(held, item)
        yield from left
        first, held, left = first or item, item, []
    if held is not None and first is not None:
        yield join(held, first)
    yield from left


def asked_about(case: EditCase, another: EditCase) -> EditCase:
    """The case with a question about the other one's topic, which must stay as it was.

    Of cases whose first probe is of kind `opinion`: the question has kind `locality` and name
    `other_topic`, and up to three of the other topic's opinions as its answers, of the wanted
    side at most two.  A case on the same topic as the other one stays as it is.
    """
    if another.request.subject == case.request.subject:
        return case  # the only topic, or the same one twice
    same, other = (another.probes[0].options[side] for side in ("same", "other"))
    assert isinstance(same, list)
    assert isinstance(other, list)
    answers = [str(opinion) for opinion in [*same[:2], *other][:3]]
    question = probe("locality", "other_topic", another.request.text, answers)
    return case.model_copy(update={"probes": (*case.probes, question)})


def request_of(
    prompt: str,
    subject: str | None,
    target: str,
    *,
    ground_truth: Iterable[str] = (),
    id: str = "",
) -> EditRequest:
    """A request about a subject that a benchmark names beside the prompt.

    Where the prompt spells the subject in other cases, the prompt's spelling is taken; where it
    stands there several times, the last is meant, which has read the most; where it does not stand
    there, the request has no subject, and methods that need one leave it out.
    """
    truths = tuple(truth for truth in ground_truth if truth.strip())
    subject = subject.strip() if subject else None
    if SLOT in prompt and subject:
        return EditRequest(
            prompt=prompt, subject=subject, target_new=target, ground_truth=truths, id=id
        )
    spelled = _as_spelled(prompt, subject) if subject else None
    if spelled is not None and prompt.count(spelled) > 1:
        before, _, after = prompt.rpartition(spelled)
        prompt = before + SLOT + after
    return EditRequest(
        prompt=prompt, subject=spelled, target_new=target, ground_truth=truths, id=id
    )


def _as_spelled(prompt: str, subject: str) -> str | None:
    if subject in prompt:
        return subject
    found = re.findall(re.escape(subject), prompt, re.IGNORECASE)
    return str(found[-1]) if found else None


def probe(kind: str, name: str, prompt: str, expected: Iterable[str] = (), **options: Any) -> Probe:
    """A probe whose prompt is filled; `UnfitRow` otherwise."""
    if not prompt.strip():
        raise UnfitRow(f"a {kind} prompt is empty")
    answers = tuple(answer.strip() for answer in expected if answer.strip())
    return Probe(kind=kind, name=name, prompt=prompt, expected=answers, options=options)


def probe_each(
    kind: str, name: str, prompts: Iterable[str], expected: Iterable[str] = ()
) -> Iterator[Probe]:
    """A probe for every prompt that is filled, all with the same accepted answers."""
    answers = tuple(expected)
    return (probe(kind, name, prompt, answers) for prompt in prompts if prompt.strip())


def opinions(row: Row, key: str) -> list[str]:
    """The opinions under a key, no repeats; `UnfitRow` where there are none."""
    found = list(dict.fromkeys(opinion.strip() for opinion in row.answers(key)))
    if not found:
        raise UnfitRow(f"'{key}' has no opinion")
    return found
