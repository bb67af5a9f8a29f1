"""Texts about things that have an attribute, and about the subjects of facts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from kedit_core import DataError, RowError, Source, read_rows

FILE = "attribute_snippets.json"


class References:
    """The texts of `attribute_snippets.json` beside a file of cases, read when first asked for.

    Args:
        source: the file of cases.
    """

    def __init__(self, source: Source) -> None:
        self.path = Path(source).parent / FILE

    def of(self, relation: str, target: str) -> list[str]:
        """Texts about things that have this target in this relation, in the file's order.

        Raises:
            DataError: the file is there, but cannot be read.
        """
        return self._texts.get((relation, target), [])

    def about(self, subject: str) -> list[str]:
        """Texts about the thing of this name, in the file's order.

        Raises:
            DataError: the file is there, but cannot be read.
        """
        return self._texts.get(subject, [])

    @cached_property
    def _texts(self) -> Mapping[tuple[str, str] | str, list[str]]:
        """By relation and target, and by name."""
        texts: dict[tuple[str, str] | str, list[str]] = defaultdict(list)
        for row in read_rows(self.path) if self.path.is_file() else ():
            try:
                about = (row.text("relation_id"), row.text("target_id"))
                found = [(s.text("name"), s.text("text").strip()) for s in row.rows("samples")]
            except RowError as error:
                raise DataError(f"{row.file}, line {row.line}: {error}.") from None
            for name, text in found:
                if text:
                    texts[about].append(text)
                    texts[name].append(text)
        return texts
