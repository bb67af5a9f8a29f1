"""ZsRE in the forms in which it goes round: MEND's, and EasyEdit's with portability questions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from kedit_core import (
    EditCase,
    Format,
    LeftOut,
    Probe,
    Row,
    Source,
    UnfitRow,
    probe,
    read_cases,
    request_of,
)

KEYS = frozenset({"subject", "src", "rephrase", "alt", "answers"})


class Zsre:
    """A question, a paraphrase of it, a question that has nothing to do with it (kind `locality`,
    name `nq`), and in EasyEdit's files a question that follows from the edit (kind `portability`,
    name `one_hop`, `subject_replace` or `inverse_relation`).

    Args:
        writes_truth: write the first true answer instead of the false one.  Consequences of the
            false answer are then not asked.

    Rows without an answer to write are left out.
    """

    def __init__(self, writes_truth: bool = False) -> None:
        self.writes_truth = writes_truth

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `zsre_mend_eval.json`.

        Raises:
            DataError: the file cannot be read or is not ZsRE.
        """
        unrelated = {"loc", "loc_ans"}
        known = {
            "zsre with one-hop questions": KEYS | unrelated | {"portability"},
            "zsre": KEYS | unrelated,
            "zsre with replaced subjects": KEYS | {"alternative_subject", "alter_subject_question"},
            "zsre with inverse questions": KEYS | {"inverse question"},
        }
        yield from read_cases(source, [Format(n, keys, self._case) for n, keys in known.items()])

    def _case(self, row: Row) -> EditCase:
        truths = row.answers("answers")
        if self.writes_truth and not truths:
            raise UnfitRow("it has no true answer")
        target = truths[0] if self.writes_truth else row.filled("alt")
        request = request_of(
            row.filled("src"),
            row.filled("subject"),
            target.strip(),
            ground_truth=() if self.writes_truth else truths,
        )
        accepted = truths if self.writes_truth else (target,)
        return EditCase(
            request=request,
            probes=tuple(self._probes(row, accepted)),
            meta={"subject": row.text("subject")},
        )

    def _probes(self, row: Row, accepted: tuple[str, ...]) -> Iterator[Probe]:
        yield probe("rephrase", "", row.filled("rephrase"), accepted)
        if "loc" in row:
            yield probe("locality", "nq", row.filled("loc"), [row.text("loc_ans")])
        if "alter_subject_question" in row:
            asked = row.filled("alter_subject_question")
            yield probe("portability", "subject_replace", asked, accepted)
        if self.writes_truth:
            return
        if "portability" in row:
            hop = row.row("portability")
            asked, answer = hop.filled("New Question"), hop.filled("New Answer")
            yield probe("portability", "one_hop", asked, [answer])
        if "inverse question" in row:
            asked = row.filled("inverse question")
            yield probe("portability", "inverse_relation", asked, [row.text("subject")])


counterfactual = partial(Zsre, writes_truth=False)
true = partial(Zsre, writes_truth=True)
