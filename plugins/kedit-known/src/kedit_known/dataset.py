"""Facts that a model knows, on which causal tracing shows where it knows them."""

from __future__ import annotations

from collections.abc import Iterator

from kedit_core import EditCase, Format, LeftOut, Row, Source, read_cases, request_of

KEYS = frozenset({"known_id", "subject", "attribute", "prompt", "prediction", "relation_id"})


class Known:
    """A prompt about a subject and the true attribute that completes it.

    Nothing is to be changed: the attribute is target and former answer in one, and there are no
    probes.  `prediction` in `meta` is how GPT-2 XL went on after the fact's template.

    Rows without a prompt or an attribute are left out.
    """

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `known_1000.json`.

        Raises:
            DataError: the file cannot be read or has other keys.
        """
        yield from read_cases(source, [Format("known facts", KEYS, self._case)])

    def _case(self, row: Row) -> EditCase:
        attribute = row.filled("attribute").strip()
        request = request_of(
            row.filled("prompt"), row.filled("subject"), attribute, ground_truth=[attribute]
        )
        meta = {
            "known_id": row.number("known_id"),
            "subject": row.text("subject"),
            "relation_id": row.text("relation_id"),
            "prediction": row.text("prediction"),
        }
        return EditCase(request=request, meta=meta)
