"""Which text statistics are collected on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedit_core.errors import ArtifactError


@dataclass(frozen=True)
class Corpus:
    """A source of text.

    Attributes:
        source: `self` for text that the model itself generates (the default, needs no data), the
            path of a text file (paragraphs are documents), or the name of a dataset that the
            `datasets` library loads, as `name` or `name:config`.
        split: split of the dataset.
        column: column of the dataset that holds the text.
    """

    source: str = "self"
    split: str = "train"
    column: str = "text"

    @property
    def is_generated(self) -> bool:
        return self.source == "self"

    def key(self) -> dict[str, Any]:
        """What identifies the text in an artifact's key: a file by its content."""
        path = Path(self.source)
        if self.is_generated:
            return {"generated": True}
        if path.is_file():
            return {"file": hashlib.sha256(path.read_bytes()).hexdigest()}
        return {"dataset": self.source, "split": self.split, "column": self.column}

    def documents(self) -> Iterator[str]:
        """The documents of a file or dataset, in order.

        Raises:
            ArtifactError: neither a readable file nor a dataset that can be loaded.
        """
        path = Path(self.source)
        if path.is_file():
            yield from _paragraphs(path)
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
                if row[self.column].strip():
                    yield row[self.column]
        except KeyError:
            raise ArtifactError(
                f"The dataset '{self.source}' has no column '{self.column}'."
            ) from None
        except (OSError, ValueError, RuntimeError) as error:
            raise ArtifactError(
                f"The corpus '{self.source}' is neither a file nor a dataset that can be loaded: "
                f"{str(error).splitlines()[0]}"
            ) from None


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
