"""ConceptEdit: definitions of concepts, and the instances that follow from them."""

from __future__ import annotations

from collections.abc import Iterator

from kedit_core import EditCase, Format, LeftOut, Probe, Row, Source, probe, read_cases, request_of
from kedit_core.cases import probe_each

KEYS = frozenset(
    {
        "label",
        "prompt",
        "phrase_prompt",
        "target_new_desc",
        "instance_prompt",
        "locality_prompt",
        "locality_answer",
    }
)


class ConceptEdit:
    """A concept and another definition of it, a paraphrase of the prompt (kind `rephrase`), a
    question about another concept (kind `locality`, name `neighborhood`), and for each instance
    whether it belongs to the concept (kind `instance`).

    The unedited model is expected to answer that with "Yes", and the edited one no longer.

    Rows without a definition to write are left out.
    """

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `final_gpt2_inter.json`.

        Raises:
            DataError: the file cannot be read or is not ConceptEdit.
        """
        yield from read_cases(source, [Format("ConceptEdit", KEYS, self._case)])

    def _case(self, row: Row) -> EditCase:
        target = row.filled("target_new_desc").strip()
        concept = row.filled("label").strip()
        meta = {"subject": concept}
        if "module_type" in row:
            meta["module_type"] = row.text("module_type")
        return EditCase(
            request=request_of(row.filled("prompt").rstrip(), concept, target),
            probes=tuple(self._probes(row, target)),
            meta=meta,
        )

    def _probes(self, row: Row, target: str) -> Iterator[Probe]:
        yield from probe_each("rephrase", "", [row.text("phrase_prompt")], [target])
        if row.text("locality_prompt").strip():
            asked, answers = row.text("locality_prompt"), row.answers("locality_answer")
            yield probe("locality", "neighborhood", asked, answers)
        yield from probe_each("instance", "", row.answers("instance_prompt"), ["Yes"])
