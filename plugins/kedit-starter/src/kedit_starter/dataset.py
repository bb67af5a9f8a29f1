"""The starter facts as cases."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import as_file, files

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

KEYS = frozenset(
    {
        *("id", "relation", "subject", "prompt", "answer", "target_new"),
        *("rephrases", "neighborhood", "portability"),
    }
)


class Starter:
    """True facts that smollm2-135m answers by itself, each with a false target to write.

    A case asks, besides the fact's own prompt: two rephrasings (kind `rephrase`), three questions
    of the same relation about other subjects, whose answers must stay (`locality`,
    `neighborhood`), and for many facts one consequence of the new answer (`portability`,
    `one_hop`).  `meta["relation"]` says what kind of fact it is.
    """

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the facts that ship with the package, or those of a file in the same format.

        Raises:
            DataError: the file cannot be read or is of another format.
        """
        known = [Format("the starter facts", KEYS, _case)]
        if source is not None:
            yield from read_cases(source, known)
            return
        with as_file(files("kedit_starter") / "facts.jsonl") as own:
            yield from read_cases(own, known)


def _case(row: Row) -> EditCase:
    subject, target = row.filled("subject"), row.filled("target_new")
    return EditCase(
        request=EditRequest(
            id=row.text("id"),
            prompt=row.filled("prompt"),
            subject=subject,
            target_new=target,
            ground_truth=row.filled("answer"),
        ),
        probes=tuple(_probes(row, subject, target)),
        meta={"relation": row.text("relation")},
    )


def _probes(row: Row, subject: str, target: str) -> Iterator[Probe]:
    for prompt in row.texts("rephrases"):
        yield probe("rephrase", "", prompt.replace("{}", subject), [target])
    for near in row.rows("neighborhood"):
        yield probe("locality", "neighborhood", near.filled("prompt"), [near.filled("answer")])
    if row.value.get("portability", "nothing") is not None:
        hop = row.row("portability")
        yield probe("portability", "one_hop", hop.filled("prompt"), [hop.filled("answer")])
