"""Files that grow line by line and survive being cut off."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kedit_core.errors import DataError


class Journal:
    """JSON lines on disk: what was appended is there, whole, whatever happens next.

    Args:
        path: the file; made when the first line is appended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> Iterator[Any]:
        """The lines in their order.  A last one that was cut off by a crash is not one.

        Raises:
            DataError: a line is no JSON.
        """
        for number, (_, line) in enumerate(self._whole(), start=1):
            yield self._read(line, f"line {number}")

    def places(self) -> Iterator[int]:
        """Where each line begins, for `at`."""
        return (place for place, _ in self._whole())

    def at(self, place: int) -> Any:
        """The line that begins there.

        Raises:
            DataError: it is no JSON.
        """
        with self.path.open("rb") as file:
            file.seek(place)
            return self._read(file.readline(), f"byte {place}")

    def _whole(self) -> Iterator[tuple[int, bytes]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            place = 0
            for line in file:
                if not line.endswith(b"\n"):
                    return
                yield place, line
                place += len(line)

    def _read(self, line: bytes, where: str) -> Any:
        try:
            return json.loads(line)
        except ValueError:
            raise DataError(f"{self.path}, {where}: not JSON.") from None

    def append(self, *records: Any) -> None:
        """Write records and wait until they are on disk; a crash keeps those that are whole.

        Numbers are finite: what may not be is written with `number_to_json`.
        """
        self._drop_half_a_line()
        lines = (json.dumps(r, ensure_ascii=False, allow_nan=False) for r in records)
        text = "".join(line + "\n" for line in lines)
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def _drop_half_a_line(self) -> None:
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return
        with self.path.open("rb+") as file:
            size = end = file.seek(0, os.SEEK_END)
            while end > 0:
                start = max(0, end - 65536)
                file.seek(start)
                found = file.read(end - start).rfind(b"\n")
                if found >= 0:
                    end = start + found + 1
                    break
                end = start
            if end < size:
                file.truncate(end)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Inside the block no other process works in the folder.

    Raises:
        DataError: one does already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"Another process is working in {folder}. Wait for it.") from None
        yield
