"""PIQA's everyday goals, each with two ways to reach it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from kedit_core import (
    DataError,
    Format,
    LeftOut,
    Probe,
    Row,
    Source,
    UnfitRow,
    probe,
    read_cases,
)

KEYS = frozenset({"goal", "sol1", "sol2"})


class Commonsense:
    """A goal to be completed by one of two ways (kind `locality`, name `commonsense`).

    The right one is known where labels lie beside the file: for `piqa_valid.jsonl` the file
    `piqa_valid-labels.lst`, with 0 or 1 in the line of each record.  It is then the accepted
    answer, and option `other` is the other way.  Without labels no answer is accepted, and option
    `ways` has both: whether the reply stays as it was can be told, whether it is right cannot.
    """

    def probes(self, source: Source | None = None) -> Iterator[Probe | LeftOut]:
        """Yield the questions of a file such as `piqa_valid.jsonl`.

        Raises:
            DataError: the file or its labels cannot be read, or they do not belong together.
        """
        assert source is not None, "the spec says that a path is needed"
        file = Path(source)
        labels = file.parent / f"{file.stem}-labels.lst"
        if not labels.is_file():
            yield from read_cases(source, [Format("PIQA", KEYS, _probe)])
            return
        right = _labels(labels)
        yield from read_cases(source, [Format("PIQA", KEYS, partial(_labelled, right, labels))])
        if next(right, None) is not None:
            raise DataError(f"{labels} has more labels than {file} has records.")


def _ways(row: Row) -> tuple[str, str]:
    ways = row.filled("sol1").strip(), row.filled("sol2").strip()
    if ways[0] == ways[1]:
        raise UnfitRow("both ways are the same")
    return ways


def _probe(row: Row) -> Probe:
    return probe("locality", "commonsense", row.filled("goal"), ways=list(_ways(row)))


def _labelled(right: Iterator[int], labels: Path, row: Row) -> Probe:
    answer = next(right, None)  # before the row is looked at: the next one has the next label
    if answer is None:
        raise DataError(f"{labels} has no label for the record in line {row.line} of {row.file}.")
    ways = _ways(row)
    right_way, other = ways[answer], ways[1 - answer]
    return probe("locality", "commonsense", row.filled("goal"), [right_way], other=other)


def _labels(file: Path) -> Iterator[int]:
    """The labels, one per line."""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip() not in ("0", "1"):
                raise DataError(f"{file}, line {number}: a label is 0 or 1, not {line.strip()!r}.")
            yield int(line)
