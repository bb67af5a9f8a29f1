"""CHED: facts to edit, and sentences that may stand before them."""

from __future__ import annotations

from collections.abc import Iterator

from kedit_core import EditCase, Format, LeftOut, Probe, Row, Source, probe, read_cases, request_of

KEYS = frozenset({"prompt", "subject", "fact_knowledge", "edited_knowledge", "rephrased_prompt"})
ABOUT = ("sbj_hop", "obj_old_hop", "obj_new_hop", "sbj", "obj_old", "obj_new")  # sentences


class Ched:
    """The prompt after sentences about the subject, the old or the new object, or about something
    one hop from one of them (kind `context`, with what the sentence is about as its name); a
    rephrased prompt (`rephrase`); another subject (`locality`, `neighborhood`).

    Rows need not have all kinds of sentences, nor a prompt of the last two kinds.
    """

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of `CHED.json`.

        Raises:
            DataError: the file cannot be read or is not CHED.
        """
        yield from read_cases(source, [Format("CHED", KEYS, self._case)])

    def _case(self, row: Row) -> EditCase:
        request = request_of(
            row.filled("prompt").rstrip(),
            row.filled("subject"),
            row.filled("edited_knowledge").strip(),
            ground_truth=[row.filled("fact_knowledge").strip()],
            id=row.text("case_id") if "case_id" in row else "",
        )
        meta = {"relation_id": row.text("relation_id")} if "relation_id" in row else {}
        probes = tuple(self._probes(row, request.text, request.target_new))
        return EditCase(request=request, probes=probes, meta=meta)

    def _probes(self, row: Row, prompt: str, target: str) -> Iterator[Probe]:
        if row.text("rephrased_prompt").strip():
            yield probe("rephrase", "", row.text("rephrased_prompt"), [target])
        if "locality_prompt" in row and row.text("locality_prompt").strip():
            asked, answer = row.text("locality_prompt"), row.text("locality_ground_truth")
            yield probe("locality", "neighborhood", asked, [answer])
        for name in ABOUT:
            key = f"{name}_sentence"
            for sentence in row.texts(key) if key in row else ():
                if sentence.strip():
                    yield probe("context", name, f"{sentence.strip()} {prompt}", [target])
