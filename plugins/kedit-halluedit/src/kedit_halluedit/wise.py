"""The two sets with long targets on which WISE is measured."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from kedit_core import (
    EditCase,
    Format,
    LeftOut,
    Probe,
    Row,
    RowError,
    Source,
    read_cases,
    request_of,
)
from kedit_core.cases import probe_each

KEYS = frozenset({"prompt", "subject", "target_new", "locality_prompt", "locality_ground_truth"})
OTHER_TEXT = "ood_rephrase"


class Wise:
    """A text and how it should go on, and web text that has nothing to do with it (kind
    `locality`, name `unrelated`; cut off anywhere, its continuation may be empty).

    Args:
        temporal: read the temporal set.  Its prompt is a topic's name, which is the subject too,
            and it has another text on the topic (kind `rephrase`, name `ood`, no expected
            answer: what counts is how probable that text itself is).  Otherwise the
            hallucination set, whose prompt is a biography so far, and whose subject is in lower
            case.

    Rows without a prompt or a target are left out.
    """

    def __init__(self, temporal: bool = False) -> None:
        self.temporal = temporal

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `hallucination-edit.json`.

        Raises:
            DataError: the file cannot be read or is not the set.
        """
        if self.temporal:
            known = Format("WISE's temporal set", KEYS | {OTHER_TEXT}, self._case)
        else:
            known = Format("WISE's hallucination set", KEYS, self._case)
        yield from read_cases(source, [known])

    def _case(self, row: Row) -> EditCase:
        if OTHER_TEXT in row and not self.temporal:
            raise RowError(f"it has '{OTHER_TEXT}', as the rows of wise-temporal have")
        subject = row.filled("subject")
        target = row.filled("target_new").strip()
        return EditCase(
            request=request_of(row.filled("prompt"), subject, target),
            probes=tuple(self._probes(row)),
            meta={"subject": subject},
        )

    def _probes(self, row: Row) -> Iterator[Probe]:
        if self.temporal:
            yield from probe_each("rephrase", "ood", [row.text(OTHER_TEXT)])
        asked, answer = row.text("locality_prompt"), row.text("locality_ground_truth")
        yield from probe_each("locality", "unrelated", [asked], [answer])


hallucination = partial(Wise, temporal=False)
temporal = partial(Wise, temporal=True)
