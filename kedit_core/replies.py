"""Replies that were dear to get, by key, in a file."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from kedit_core.errors import ArtifactError


class Replies:
    """Texts by key, in an SQLite file that several processes may use; made at first use.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, keys: Iterable[str]) -> dict[str, str]:
        """Those that are there.

        Raises:
            ArtifactError: the file cannot be read.
        """
        found = {}
        with self._open() as file:
            for key in keys:
                row = file.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    found[key] = row[0]
        return found

    def put(self, replies: Mapping[str, str]) -> None:
        """Keep replies: all of them or none.

        Raises:
            ArtifactError: the file cannot be written.
        """
        with self._open() as file:
            file.executemany("INSERT OR REPLACE INTO replies VALUES (?, ?)", replies.items())

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.path, timeout=60)) as file, file:
                file.execute(
                    "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT)"
                )
                yield file
        except (OSError, sqlite3.Error) as error:
            raise ArtifactError(
                f"The replies kept in {self.path} cannot be used: {error}. Delete that file, or "
                f"set KEDIT_CACHE to a folder that can be written."
            ) from None
