"""CounterFact in the forms in which it goes round: ROME's, EasyEdit's additions, and flat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations

from kedit_core import (
    EditCase,
    EditRequest,
    Format,
    LeftOut,
    Probe,
    Row,
    Source,
    probe,
    read_cases,
    request_of,
)
from kedit_core.cases import probe_each
from kedit_counterfact.references import References

KEYS = frozenset(
    {
        *("case_id", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"),
        *("attribute_prompts", "generation_prompts"),
    }
)
ADDED = (
    *("distracting_neighborhood_prompts", "unrelated_relation", "portability"),
    "alternative_subject",
)
FLAT = frozenset(
    {
        *("case_id", "prompt", "subject", "target_new", "ground_truth", "rephrase_prompt"),
        *("locality_prompt", "locality_ground_truth"),
    }
)


class CounterFact:
    """A sentence to complete with a false target; two paraphrases; other subjects for which the
    true answer holds (kind `locality`, name `neighborhood`) or already the false one (kind
    `attribute`); and beginnings of texts about the subject (kind `generation`).

    EasyEdit's files add neighbours after the edit's own sentence (`locality`, `distracting`),
    another question about the subject (`locality`, `other_attribution`), a question that follows
    from the edit (`portability`, `one_hop`), or another name of the subject (`portability`,
    `subject_replace`).  Its flat form has one paraphrase and one neighbour.

    Where `attribute_snippets.json` lies beside the file, `meta["references"]` holds its texts
    about things of which the false target is true, and `meta["essence"]` those about the subject.
    """

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `counterfact.json`.

        Raises:
            DataError: the file, or the reference texts beside it, cannot be read, or it is not
                CounterFact.
        """
        assert source is not None, "the spec says that a path is needed"
        references = References(source)
        known = [
            Format(
                f"counterfact{' with ' if added else ''}{' and '.join(added)}",
                KEYS.union(added),
                partial(_case, references, added),
            )
            for count in range(len(ADDED), -1, -1)  # the most specific first
            for added in combinations(ADDED, count)
        ]
        yield from read_cases(source, [*known, Format("flat counterfact", FLAT, _flat_case)])


def _case(references: References, added: Sequence[str], row: Row) -> EditCase:
    rewrite = row.row("requested_rewrite")
    new, true = rewrite.row("target_new"), rewrite.row("target_true").text("str").strip()
    target, relation = new.filled("str").strip(), rewrite.text("relation_id")
    request = request_of(
        rewrite.filled("prompt"),
        rewrite.filled("subject"),
        target,
        ground_truth=[true],
        id=str(row.number("case_id")),
    )
    texts = {
        "references": references.of(relation, new.text("id")),
        "essence": references.about(rewrite.text("subject")),
    }
    return EditCase(
        request=request,
        probes=(
            *probe_each("rephrase", "", row.texts("paraphrase_prompts"), [target]),
            *probe_each("locality", "neighborhood", row.texts("neighborhood_prompts"), [true]),
            *_added(row, added, request, true),
            *probe_each("attribute", "", row.texts("attribute_prompts"), [target]),
            *probe_each("generation", "", dict.fromkeys(row.texts("generation_prompts"))),
        ),
        meta={
            "subject": rewrite.text("subject"),
            "relation_id": relation,
            "pararel_idx": row.number("pararel_idx") if "pararel_idx" in row else None,
            **{key: found for key, found in texts.items() if found},
        },
    )


def _added(row: Row, added: Sequence[str], request: EditRequest, true: str) -> Iterator[Probe]:
    """What EasyEdit's keys ask."""
    if "distracting_neighborhood_prompts" in added:
        prompts = row.texts("distracting_neighborhood_prompts")
        yield from probe_each("locality", "distracting", prompts, [true])
    if "unrelated_relation" in added:
        other = row.row("unrelated_relation")
        asked, answer = other.text("question"), other.text("object")
        yield from probe_each("locality", "other_attribution", [asked], [answer])
    if "portability" in added:
        hop = row.row("portability")
        asked, answer = hop.text("New Question"), hop.text("New Answer")
        yield from probe_each("portability", "one_hop", [asked] if answer.strip() else [], [answer])
    if "alternative_subject" in added:
        name = row.text("alternative_subject").strip()
        if name and request.subject:
            asked = request.before + name + request.after
            yield probe("portability", "subject_replace", asked, [request.target_new])


def _flat_case(row: Row) -> EditCase:
    target = row.filled("target_new").strip()
    near, answer = row.text("locality_prompt"), row.text("locality_ground_truth")
    return EditCase(
        request=request_of(
            row.filled("prompt"),
            row.filled("subject"),
            target,
            ground_truth=[row.text("ground_truth").strip()],
            id=str(row.number("case_id")),
        ),
        probes=(
            *probe_each("rephrase", "", [row.text("rephrase_prompt")], [target]),
            *probe_each("locality", "neighborhood", [near], [answer]),
        ),
        meta={"subject": row.text("subject")},
    )
