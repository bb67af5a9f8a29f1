"""What every dataset adapter must do, as functions for its tests.

from kedit_core.testing.datasets import FAULTS, refuse_spoilt, rows_add_up

@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_file_is_refused_in_one_sentence(fault, tmp_path):
    refuse_spoilt(Zsre(), FIXTURES / "zsre.json", fault, tmp_path)
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kedit_core.errors import DataError
from kedit_core.protocols import DatasetAdapter
from kedit_core.records import LeftOut, Source, checked, read_rows
from kedit_core.request import EditCase

PAGE = b"<!DOCTYPE html>\n<html><body>Not Found</body></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def _truncated(content: bytes) -> bytes:
    return content.rstrip()[:-7]


def _wrong_encoding(content: bytes) -> bytes:
    return content.rstrip()[:-7] + "é".encode("latin-1") + content.rstrip()[-7:]


def _wrong_types(content: bytes) -> Iterator[bytes]:
    """Of a table nothing: all that it holds is text."""
    for spoilt in _one_key_spoilt(content, lambda record, key: {**record, key: 7.5}):
        if spoilt.lstrip()[:1] in (b"[", b"{"):
            yield spoilt


def _missing_keys(content: bytes) -> Iterator[bytes]:
    yield from _one_key_spoilt(
        content, lambda record, key: {k: v for k, v in record.items() if k != key}
    )


def _one_key_spoilt(
    content: bytes, change: Callable[[dict[str, Any], str], dict[str, Any]]
) -> Iterator[bytes]:
    """The file once for each key, with that key changed in its second record (in a table: in all
    its records), or in the only one."""
    text = content.decode("utf-8-sig").strip()
    if text[:1] not in ("[", "{"):
        rows = list(csv.DictReader(io.StringIO(text)))
        for key in rows[0]:
            yield _table([change(row, key) for row in rows])
        return
    records = json.loads(text) if text[:1] == "[" else list(_values(text))
    place = min(1, len(records) - 1)
    for key in records[place]:
        spoilt = [*records[:place], change(records[place], key), *records[place + 1 :]]
        lines = [json.dumps(record, ensure_ascii=False) for record in spoilt]
        yield ("\n".join(lines) if text[:1] == "{" else "[" + ",\n".join(lines) + "]").encode()


def _values(text: str) -> Iterator[Any]:
    """JSON values that follow one another."""
    while text:
        value, end = json.JSONDecoder().raw_decode(text)
        yield value
        text = text[end:].strip()


def _table(rows: list[dict[str, Any]]) -> bytes:
    out = io.StringIO()
    table = csv.DictWriter(out, list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    return out.getvalue().encode()


SPOIL: Mapping[str, Callable[[bytes], Iterable[bytes]]] = {
    "truncated": lambda content: [_truncated(content)],
    "wrong types": _wrong_types,
    "missing keys": _missing_keys,
    "web page": lambda content: [PAGE],
    "pointer": lambda content: [POINTER],
    "wrong encoding": lambda content: [_wrong_encoding(content)],
    "empty": lambda content: [b""],
}
FAULTS = tuple(SPOIL)


def refuse_spoilt(adapter: DatasetAdapter, fixture: Path, fault: str, folder: Path) -> None:
    """Spoil a good file and let the adapter read it: it must be refused in one sentence.

    `wrong types` and `missing keys` spoil one key of the second record after the other.  A key
    that the adapter does not read may be of any type, and one that it does not need may be missing,
    but by the first no case may change, and by the second none may be lost without being left out
    for a reason.  Types cannot be wrong in a table, so that fault is for JSON only.

    Raises:
        AssertionError: it was read, or the sentence lacks the file or the line.
    """
    spoilt, content = folder / fixture.name, fixture.read_bytes()
    spoilt.write_bytes(content)
    whole = list(checked(adapter.cases(spoilt)))
    refused = 0
    for bad in SPOIL[fault](content):
        spoilt.write_bytes(bad)
        try:
            found = list(checked(adapter.cases(spoilt)))
        except DataError as error:
            sentence = str(error)
            assert spoilt.name in sentence, f"the sentence does not name the file: {sentence}"
            assert "line " in sentence, f"the sentence does not name the line: {sentence}"
            assert "\n" not in sentence, f"more than one line: {sentence}"
            refused += 1
            continue
        if fault == "wrong types":
            assert _cases(found) == _cases(whole), f"a wrong type was read in {bad.decode()}"
        elif fault == "missing keys":
            assert len(found) == len(whole), f"a row that lacks a key was lost in {bad.decode()}"
    assert refused, f"a file with {fault} was read as if nothing were wrong"


def _cases(found: Iterable[EditCase | LeftOut]) -> list[EditCase]:
    return [item for item in found if not isinstance(item, LeftOut)]


def rows_add_up(
    adapter: DatasetAdapter, source: Source, cases_per_row: int | None = 1
) -> tuple[list[EditCase], list[LeftOut]]:
    """Read a file whole: every row is a case or is left out for a reason, and none is malformed.

    Args:
        adapter: the adapter.
        source: one file with a record per row.
        cases_per_row: how many cases a row makes; None where that differs.

    Returns:
        The cases and what was left out.
    """
    found = list(adapter.cases(source))
    cases = [item for item in found if isinstance(item, EditCase)]
    left = [item for item in found if isinstance(item, LeftOut)]
    assert not [item for item in left if item.malformed], [str(i) for i in left if i.malformed][:3]
    assert all(item.reason and item.line > 0 for item in left)
    if cases_per_row is not None:
        rows = sum(1 for _ in read_rows(source))
        assert len(cases) == (rows - len(left)) * cases_per_row
    return cases, left
