"""WikiBigEdit as published and in a flat form, and UltraEditBench."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from kedit_core import (
    EditCase,
    Format,
    LeftOut,
    Probe,
    Row,
    RowError,
    Source,
    UnfitRow,
    probe,
    read_cases,
    request_of,
)

NOTES = ("subject", "tag", "relation", "relation_id")


@dataclass(frozen=True)
class Keys:
    """What the parts of a case are called in one form.

    Attributes:
        complete: every row has all of them; otherwise questions may be missing.
    """

    prompt: str
    target: str
    rephrase: str
    locality: str
    locality_answer: str
    complete: bool = True

    @property
    def needed(self) -> frozenset[str]:
        """The keys that every row has."""
        asked = {self.rephrase, self.locality, self.locality_answer} if self.complete else set()
        return frozenset({"subject", self.prompt, self.target, *asked})


FLAT = Keys(
    *("prompt", "target_new", "rephrase_prompt", "locality_prompt", "locality_ground_truth")
)
ULTRA = Keys("prompt", "ans", "rephrase_prompt", "loc", "loc_ans")
PUBLISHED = Keys("update", "ans", "rephrase", "loc", "loc_ans", complete=False)


class WikiBigEdit:
    """A question and its new answer, a paraphrase, and a question about something similar (kind
    `locality`, name `neighborhood`).  The published files also ask as somebody with a manner of
    speech of their own would (`rephrase`, `persona`), and what follows from the edit
    (`portability`, `multi_hop`).

    A question that a row does not have is not asked.  Rows without an answer are left out.
    """

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `wiki_big_edit_20240201_20240220.json`.

        Raises:
            DataError: the file cannot be read or is neither WikiBigEdit nor UltraEditBench.
        """
        known = {
            "flat WikiBigEdit": FLAT,
            "UltraEditBench": ULTRA,
            "WikiBigEdit": PUBLISHED,
        }
        formats = [Format(name, keys.needed, partial(_case, keys)) for name, keys in known.items()]
        yield from read_cases(source, formats)


def _case(keys: Keys, row: Row) -> EditCase:
    if missing := sorted(keys.needed - row.value.keys()):
        raise RowError(f"it lacks '{missing[0]}'")
    notes = {key: _text(row, key) for key in NOTES}
    target = _filled(row, keys.target).strip()
    return EditCase(
        request=request_of(_filled(row, keys.prompt), notes["subject"] or None, target),
        probes=tuple(_probes(keys, row, target)),
        meta={key: note for key, note in notes.items() if note},
    )


def _probes(keys: Keys, row: Row, target: str) -> Iterator[Probe]:
    if asked := _text(row, keys.rephrase):
        yield probe("rephrase", "", asked, [target])
    if asked := _text(row, "personas"):
        yield probe("rephrase", "persona", asked, [target])
    if asked := _text(row, keys.locality):
        yield probe("locality", "neighborhood", asked, [_text(row, keys.locality_answer)])
    if (asked := _text(row, "mhop")) and (answer := _text(row, "mhop_ans")):
        yield probe("portability", "multi_hop", asked, [answer])


def _text(row: Row, key: str) -> str:
    """A text; empty where it is missing, blank, null, or NaN, which also stands for missing."""
    value = row.value.get(key)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = row.text(key)
    return text if text.strip() else ""


def _filled(row: Row, key: str) -> str:
    """Such a text; the row is of no use without it."""
    text = _text(row, key)
    if not text:
        raise UnfitRow(f"'{key}' is empty")
    return text
