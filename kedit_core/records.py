"""Rows of benchmark files, and what is wrong with a row.

They are read one at a time, so a file may be larger than memory.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kedit_core.errors import DataError, PluginError, reason_of

HUB = "hub:"

Source = str | Path
T = TypeVar("T")

_CHUNK = 1 << 16
_SPACE = re.compile(r"[\s,]*")
_LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_FRAGMENT = re.compile(r"\.|[eE][+-]?|u[0-9a-fA-F]{0,4}")  # of a number, or of an escape


class RowError(DataError):
    """A row is not what its format says: a key is missing, or holds another type."""


class UnfitRow(DataError):
    """A row is well formed, but makes no case; the message says why."""


@dataclass(frozen=True)
class LeftOut:
    """A row that made no case.

    Attributes:
        file, line: where it is.
        reason: why, in words.
        malformed: whether the row is broken, rather than of no use.
    """

    file: str
    line: int
    reason: str
    malformed: bool = False

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}"


@dataclass(frozen=True)
class Row:
    """One record, or a part of one.

    Attributes:
        file: name of the file.
        line: where the record begins, from 1.
        value: what was read.
        path: where in the record this part is, for messages.
    """

    file: str
    line: int
    value: Mapping[str, Any]
    path: str = ""

    def __contains__(self, key: str) -> bool:
        return key in self.value

    def text(self, key: str) -> str:
        """A text that may be empty; `RowError` where it is missing or no text."""
        return self._get(key, str, "a text")

    def filled(self, key: str) -> str:
        """A text; `UnfitRow` where it is empty."""
        text = self.text(key)
        if not text.strip():
            raise UnfitRow(f"'{self.path}{key}' is empty")
        return text

    def number(self, key: str) -> int:
        """A whole number."""
        return self._get(key, int, "a whole number")

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts."""
        found = self._get(key, list, "a list")
        if not all(isinstance(item, str) for item in found):
            raise RowError(f"'{self.path}{key}' is no list of texts")
        return tuple(found)

    def answers(self, key: str) -> tuple[str, ...]:
        """Accepted answers: a text, or lists of them at any depth; flat, filled, no repeats."""
        if key not in self.value:
            raise RowError(f"it lacks '{self.path}{key}'")
        return tuple(dict.fromkeys(a for a in self._flat(key, self.value[key]) if a.strip()))

    def row(self, key: str) -> Row:
        """A mapping inside this one."""
        found = self._get(key, dict, "a mapping")
        return Row(self.file, self.line, found, f"{self.path}{key}.")

    def rows(self, key: str) -> tuple[Row, ...]:
        """A list of mappings inside this one."""
        found = self._get(key, list, "a list")
        if not all(isinstance(item, dict) for item in found):
            raise RowError(f"'{self.path}{key}' is no list of mappings")
        return tuple(
            Row(self.file, self.line, item, f"{self.path}{key}.{n}.")
            for n, item in enumerate(found)
        )

    def _get(self, key: str, kind: type, what: str) -> Any:
        if key not in self.value:
            raise RowError(f"it lacks '{self.path}{key}'")
        found = self.value[key]
        if not isinstance(found, kind) or isinstance(found, bool):
            raise RowError(f"'{self.path}{key}' is {_shown(found)}, not {what}")
        return found

    def _flat(self, key: str, value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            for item in value:
                yield from self._flat(key, item)
        else:
            raise RowError(f"'{self.path}{key}' holds {_shown(value)} among its answers")


def checked(
    found: Iterable[T | LeftOut], kind: type | None = None, *, to_the_end: bool = False
) -> Iterator[T | LeftOut]:
    """The same, but a malformed row ends it, unless all are to be seen `to_the_end`.

    Args:
        found: what a dataset gave.
        kind: what it should hold: cases or probes.

    Raises:
        DataError: names file, line and what is wrong.
        PluginError: the dataset gave something else.
    """
    if not isinstance(found, Iterable):
        raise PluginError(f"The dataset returned {found!r}, from which no item can be read.")
    for item in found:
        if kind and not isinstance(item, kind | LeftOut):
            raise PluginError(
                f"The dataset gave an item of type {type(item).__name__}, and {kind.__name__} or "
                f"LeftOut are wanted: {_shown(item)}"
            )
        if isinstance(item, LeftOut) and item.malformed and not to_the_end:
            raise DataError(f"{item}. See all such rows with `kedit data check`.")
        yield item


# -- files -----------------------------------------------------------------------------------


def files_in(source: Source | None, *patterns: str) -> list[Source]:
    """The file or hub name itself, or the files of a folder that match a pattern, by name.

    Raises:
        DataError: there is no such file or folder, or nothing in it matches.
    """
    assert source is not None, "the spec says that a path is needed"
    if isinstance(source, str) and source.startswith(HUB):
        return [source]
    path = Path(source)
    if not path.exists():
        raise DataError(f"{path} does not exist. Give the dataset's file or folder.")
    if path.is_file():
        return [path]
    found: list[Source] = sorted(
        {f for pattern in patterns for f in path.rglob(pattern) if f.is_file()}
    )
    if not found:
        raise DataError(f"The folder {path} has no file like {' or '.join(patterns)}.")
    return found


def read_rows(source: Source) -> Iterator[Row]:
    """The records of a JSON array, of JSON lines, of a CSV file, or of a hub dataset.

    Which of them a file is, its content says.  A file that holds one JSON object is one record.

    Args:
        source: a path, or `hub:owner/name` or `hub:owner/name:split` for a dataset that the
            `datasets` library loads.

    Raises:
        DataError: with file and line: unreadable, empty, cut off, no JSON, in another encoding, a
            web page or the pointer of a large file that was not downloaded.
    """
    if isinstance(source, str) and source.startswith(HUB):
        yield from _hub_rows(source)
        return
    path = Path(source)
    try:
        with path.open("rb") as file:
            start = file.read(512).removeprefix(codecs.BOM_UTF8)
            file.seek(0)
            _refuse_other_things(path, start)
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            if start.lstrip()[:1] in (b"[", b"{"):
                yield from _json_rows(path, text)
            else:
                yield from _csv_rows(path, text)
    except UnicodeDecodeError as error:
        line = _line_of_bad_byte(path)
        if error.reason == "unexpected end of data":
            raise DataError(
                f"{path}, line {line}: the file ends in the middle of a character. Download or "
                f"write it again."
            ) from None
        raise DataError(
            f"{path}, line {line}: not UTF-8 ({error.reason}). Convert the file, for example with "
            f"iconv."
        ) from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder. Give one of its files.") from None
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. Give the dataset's file.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from None


def _refuse_other_things(path: Path, start: bytes) -> None:
    head = start.lstrip()[:200].lower()
    if not head:
        raise DataError(f"{path}, line 1: the file is empty. Download or write it again.")
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(
            f"{path}, line 1: a web page, not data. Download the raw file instead of its page."
        )
    if head.startswith(b"version https://git-lfs"):
        raise DataError(
            f"{path}, line 1: the pointer of a large file, not the file. Fetch it with `git lfs "
            f"pull`."
        )


def _line_of_bad_byte(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _json_rows(path: Path, file: io.TextIOBase) -> Iterator[Row]:
    """Records of an array, or of values that follow one another."""
    values = _Values(path, file)
    if values.peek() == "[":
        values.skip(1)
        while values.peek() not in ("]", ""):
            yield _row(path, *values.next())
        if values.peek() == "":
            raise values.cut_off()
        values.skip(1)
        if values.peek():
            raise DataError(f"{path}, line {values.line}: more follows the end of the array.")
    else:
        while values.peek():
            yield _row(path, *values.next())


class _Values:
    """JSON values one by one, from a text read in chunks; commas between them are passed over."""

    def __init__(self, path: Path, file: io.TextIOBase) -> None:
        self.path, self.file = path, file
        self.text, self.at, self.line = "", 0, 1
        self.ended = False
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The first character of what comes next; empty at the end."""
        while True:
            found = _SPACE.match(self.text, self.at)
            self.skip(found.end() - self.at if found else 0)
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._more()

    def skip(self, count: int) -> None:
        self.line += self.text.count("\n", self.at, self.at + count)
        self.at += count

    def next(self) -> tuple[int, Any]:
        """Line and value of what `peek` has found."""
        line = self.line
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                open_string = error.msg.startswith("Unterminated")
                if not open_string and not _may_go_on(self.text[error.pos :].rstrip()):
                    bad = self.line + self.text.count("\n", self.at, error.pos)
                    raise DataError(f"{self.path}, line {bad}: not JSON ({error.msg}).") from None
                if self.ended:
                    raise self.cut_off() from None
                self._more()
                continue
            except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
                raise DataError(f"{self.path}, line {line}: unreadable JSON ({error}).") from None
            self.skip(end - self.at)
            return line, value

    def cut_off(self) -> DataError:
        line = self.line + self.text.count("\n", self.at)
        return DataError(
            f"{self.path}, line {line}: the file ends in the middle. Download or write it again."
        )

    def _more(self) -> None:
        """Read as much again as is held, so that a long record is decoded few times."""
        self.text = self.text[self.at :]
        self.at = 0
        chunk = self.file.read(max(_CHUNK, len(self.text)))
        self.ended = not chunk
        self.text += chunk


def _may_go_on(rest: str) -> bool:
    """Whether what stands where JSON goes wrong is only cut off."""
    return any(word.startswith(rest) for word in _LITERALS) or bool(_FRAGMENT.fullmatch(rest))


def _csv_rows(path: Path, file: io.TextIOBase) -> Iterator[Row]:
    reader = csv.reader(file, strict=True)
    line = 1
    try:
        header = next(reader, [])
        for mark, name in ((";", "';'"), ("\t", "tabs")):
            if len(header) == 1 and mark in header[0]:
                raise DataError(
                    f"{path}, line 1: the columns are parted by {name}, not by commas. Save the "
                    f"file with commas."
                )
        if len(header) < 2:
            raise DataError(f"{path}, line 1: neither JSON nor a table with a header.")
        for name in filter(None, header):
            if header.count(name) > 1:
                raise DataError(
                    f"{path}, line 1: more than one column is called '{name}'. Rename all but one."
                )
        line = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(header):
                raise DataError(
                    f"{path}, line {line}: not as many fields as the header has; the file may be "
                    f"cut off."
                )
            if fields:  # otherwise an empty line
                yield Row(str(path), line, dict(zip(header, fields, strict=True)))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: no table ({error}).") from None


def hub_revision(source: str) -> str:
    """The commit of a hub dataset, or what the `datasets` library tells its content by.

    Raises:
        DataError: it cannot be loaded.
    """
    with _from_hub(source) as (datasets, name, _):
        return str(datasets.load_dataset_builder(name).hash)


def _hub_rows(source: str) -> Iterator[Row]:
    with _from_hub(source) as (datasets, name, split):
        records = datasets.load_dataset(name, split=split or "train", streaming=True)
        for number, record in enumerate(records, start=1):
            kept = {key: value for key, value in record.items() if value is not None}
            yield Row(source, number, kept)


@contextlib.contextmanager
def _from_hub(source: str) -> Iterator[tuple[Any, str, str]]:
    """The `datasets` library, and the dataset's name and split; what goes wrong is `DataError`."""
    name, _, split = source.removeprefix(HUB).partition(":")
    if not name:
        raise DataError(f"'{source}' names no dataset. Write {HUB}OWNER/NAME.")
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"'{source}' is read with the package 'datasets': pip install datasets."
        ) from None
    try:
        yield datasets, name, split
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"'{source}' cannot be loaded: {reason_of(error)}") from None


def _row(path: Path, line: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{path}, line {line}: a record is a mapping, not {_shown(value)}.")
    return Row(str(path), line, value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:39] + "…"
