"""The fact subsets of KnowEdit: recent and changed facts, ZsRE, and sentences of biographies."""

from __future__ import annotations

from collections.abc import Iterator, Set
from functools import partial
from itertools import product

from kedit_core import (
    EditCase,
    EditRequest,
    Format,
    LeftOut,
    Probe,
    Row,
    RowError,
    Source,
    probe,
    read_cases,
    request_of,
)
from kedit_knowedit.files import file_of

SPELLINGS = (("prompt", "text"), ("target_new", "labels"), ("subject", "concept"))


class Facts:
    """A fact, questions that follow from it (kind `portability`) and questions that do not (kind
    `locality`), each in the families that the record names; ZsRE has a paraphrase as well.  The
    edit's own prompt is continued in free text (kind `generation`).

    All spellings of all true answers are accepted.  Questions of `portability` that have none are
    not asked, for nothing can be said of the reply; those of `locality` are, for the reply before
    the edit is known.

    Args:
        file: the subset's file in the folder of KnowEdit, with `{}` for the split.
        needs: keys that every record has, besides prompt, target and subject.
    """

    def __init__(self, file: str, needs: Set[str]) -> None:
        self.file, self.needs = file, frozenset(needs)

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `recent_test.json`, or of the one in a folder.

        Raises:
            DataError: the file cannot be read or is not of this subset.
        """
        formats = [
            Format("a fact of KnowEdit", self.needs.union(keys), partial(self._case, *keys))
            for keys in product(*SPELLINGS)
        ]
        yield from read_cases(file_of(source, self.file), formats)

    def _case(self, prompt: str, target: str, subject: str, row: Row) -> EditCase:
        lacking = sorted(self.needs - row.value.keys())
        if lacking:
            raise RowError(f"it lacks '{lacking[0]}'")
        about = row.text(subject).strip()
        request = request_of(
            row.filled(prompt).rstrip(),
            about,
            row.filled(target).strip(),
            ground_truth=row.answers("ground_truth") if "ground_truth" in row else (),
        )
        return EditCase(
            request=request,
            probes=tuple(_probes(row, request)),
            meta={"subject": about},
        )


def _probes(row: Row, request: EditRequest) -> Iterator[Probe]:
    if "rephrase_prompt" in row and row.text("rephrase_prompt").strip():
        yield probe("rephrase", "", row.text("rephrase_prompt"), [request.target_new])
    for kind in ("portability", "locality"):
        if kind in row:
            yield from _asked(kind, row.row(kind))
    yield probe("generation", "", request.text)


def _asked(kind: str, families: Row) -> Iterator[Probe]:
    for family in families.value:
        for question in families.rows(family):
            prompt, answers = question.text("prompt"), question.answers("ground_truth")
            if prompt.strip() and (answers or kind == "locality"):
                yield probe(kind, family.lower(), prompt, answers)


FAMILIES = frozenset({"portability", "locality"})
recent = partial(Facts, "*recent_{}.json", FAMILIES)
counterfact = partial(Facts, "*{}_cf.json", FAMILIES | {"ground_truth"})
zsre = partial(Facts, "*ZsRE-{}-all.json", FAMILIES | {"ground_truth", "rephrase_prompt"})
wikibio = partial(Facts, "*wikibio-{}-all.json", {"locality"})
