"""RippleEdits: a fact, and tests of what must change with it and what must stay."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from kedit_core import (
    EditCase,
    Format,
    LeftOut,
    Probe,
    Row,
    RowError,
    Source,
    UnfitRow,
    files_in,
    probe,
    read_cases,
    request_of,
)
from kedit_rippleedits.sentences import complete, former_target, split, subject_of

FILES = ("popular.json", "random.json", "recent.json")
FAMILIES = MappingProxyType(
    {
        "Logical_Generalization": ("portability", "logical_generalization"),
        "Compositionality_I": ("portability", "compositionality_1"),
        "Compositionality_II": ("portability", "compositionality_2"),
        "Subject_Aliasing": ("portability", "subject_aliasing"),
        "Relation_Specificity": ("locality", "relation_specificity"),
        "Forgetfulness": ("locality", "forgetfulness"),
    }
)
COMBINE = MappingProxyType({"OR": "any", "AND": "all"})


class RippleEdits:
    """A fact to write and its tests: logical generalization, compositionality 1 and 2 and subject
    aliasing (kind `portability`), relation specificity and forgetfulness (kind `locality`).

    Each query of a test is a probe.  Its option `test` is the same for all queries of the test,
    `combine` says whether any or all of them must be right, and `conditions` are the questions
    that the unedited model must answer for the test to count.  A query that asks for several
    things accepts each of them; `answers` then holds the names of each.

    The records have no labels: subject and target are read off their sentences.  Queries without
    an answer are not asked.
    """

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `popular.json`, or of the three in a folder.

        Raises:
            DataError: a file cannot be read or is not RippleEdits.
        """
        known = Format("RippleEdits", frozenset({"edit", *FAMILIES}), _case)
        for file in files_in(source, *FILES):
            yield from read_cases(file, [known])


def _case(row: Row) -> EditCase:
    edit = row.row("edit")
    queries = {family: list(_queries(row, family)) for family in FAMILIES}
    prompt, target = split(edit, [query for found in queries.values() for query in found])
    if not target:
        raise UnfitRow("its sentence names no target")
    if not complete(prompt):
        raise UnfitRow("its sentence names no subject")
    # A test of other names has the subject's id too, and one of forgetting adds to its name.
    named = (
        q for f in FAMILIES if f not in ("Subject_Aliasing", "Forgetfulness") for q in queries[f]
    )
    subject = subject_of(prompt, edit.text("subject_id"), named)
    return EditCase(
        request=request_of(prompt, subject, target, ground_truth=former_target(edit, prompt)),
        probes=tuple(p for family in FAMILIES for p in _probes(row, family)),
        meta={
            "example_type": row.value.get("example_type"),
            "relation": edit.text("relation"),
            "subject_id": edit.text("subject_id"),
        },
    )


def _queries(row: Row, family: str) -> Iterator[Row]:
    for test in row.rows(family):
        yield from (*test.rows("test_queries"), *test.rows("condition_queries"))


def _probes(row: Row, family: str) -> Iterator[Probe]:
    kind, name = FAMILIES[family]
    for number, test in enumerate(row.rows(family)):
        condition = test.text("test_condition")
        if condition not in COMBINE:
            raise RowError(f"'{test.path}test_condition' is neither OR nor AND")
        conditions = [found for query in test.rows("condition_queries") if (found := _asked(query))]
        for query in test.rows("test_queries"):
            if found := _asked(query):
                yield probe(
                    kind,
                    name,
                    found.pop("prompt"),
                    found.pop("expected"),
                    test=f"{name}-{number}",
                    combine=COMBINE[condition],
                    conditions=conditions,
                    **found,
                )


def _asked(query: Row) -> dict[str, Any]:
    """A query's prompt and answers; empty where it lacks one of them."""
    prompt = query.text("prompt").strip()
    names = [_names(answer) for answer in query.rows("answers")]
    names = [each for each in names if each]
    if not names or not complete(prompt):
        return {}
    expected = list(dict.fromkeys(name for each in names for name in each))
    return {"prompt": prompt, "expected": expected, **({"answers": names} if names[1:] else {})}


def _names(answer: Row) -> list[str]:
    """Name and aliases; a single letter is none, since it would be found in any text."""
    found = [name.strip() for name in (answer.text("value"), *answer.texts("aliases"))]
    return [name for name in found if len(name) > 1 or name.isdigit()]
