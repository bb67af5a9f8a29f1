"""Which text statistics are collected on."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kedit_core.errors import ArtifactError, reason_of
from kedit_core.paths import expanded


@dataclass(frozen=True)
class Corpus:
    """A source of text.

    Attributes:
        source: `self` for text that the model itself generates (the default, needs no data), the
            path of a text file (paragraphs are documents), or the name of a dataset that the
            `datasets` library loads, as `name` or `name:config`.  Or, instead of text, the path
            of an `.npz` file of second moments that were collected elsewhere, or of a folder of
            them; see `kedit_core.numerics.given`.
        split: split of the dataset.
        column: column of the dataset that holds the text.
    """

    source: str = "self"
    split: str = "train"
    column: str = "text"

    @property
    def is_generated(self) -> bool:
        return self.source == "self"

    @property
    def moment_files(self) -> list[Path]:
        """The files of second moments that stand in for text; none if there is text."""
        path = self._path
        if path.is_file() and path.suffix == ".npz":
            return [path]
        return sorted(path.glob("*.npz")) if path.is_dir() else []

    def key(self) -> dict[str, Any]:
        """What identifies the text in an artifact's key: a file by its content.

        Raises:
            ArtifactError: a file of second moments is damaged.
        """
        if self.is_generated:
            return {"generated": True}
        if files := self.moment_files:
            return {"given": {file.name: moments_key(file) for file in files}}
        if self._path.is_file():
            return {"file": self._digest}
        return {"dataset": self.source, "split": self.split, "column": self.column}

    @property
    def _path(self) -> Path:
        return expanded(self.source)

    @cached_property
    def _digest(self) -> str:
        with self._path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def documents(self) -> Iterator[str]:
        """The documents of a file or dataset, in order.

        Raises:
            ArtifactError: neither a readable file nor a dataset that can be loaded.
        """
        if self.moment_files:
            raise ArtifactError(
                f"The corpus '{self.source}' holds second moments and no text. Give a text."
            )
        if self._path.is_file():
            yield from _paragraphs(self._path)
            return
        try:
            import datasets
        except ImportError:
            raise ArtifactError(
                f"The corpus '{self.source}' is no file, and datasets are read with the package "
                f"'datasets': pip install datasets."
            ) from None
        name, _, config = self.source.partition(":")
        try:
            rows = datasets.load_dataset(name, config or None, split=self.split, streaming=True)
            for row in rows:
                text = row[self.column]
                if isinstance(text, str) and text.strip():
                    yield text
        except KeyError:
            raise ArtifactError(
                f"The dataset '{self.source}' has no column '{self.column}'."
            ) from None
        except (OSError, ValueError, RuntimeError) as error:
            raise ArtifactError(
                f"The corpus '{self.source}' is neither a file nor a dataset that can be loaded: "
                f"{reason_of(error)}"
            ) from None


def moments_key(file: Path) -> dict[str, int]:
    """The checksum of each array in an `.npz` file, from its table of contents.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return {entry.filename: entry.CRC for entry in archive.infolist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{file} cannot be read as .npz: {error}.") from None


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    lines.append(line)
                elif lines:
                    yield "".join(lines)
                    lines = []
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"The corpus {path} cannot be read: {error}.") from None
    if lines:
        yield "".join(lines)
