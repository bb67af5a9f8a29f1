"""SafeEdit: safe replies to adversarial prompts, and questions that should stay safe as well."""

from __future__ import annotations

from collections.abc import Iterator

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
from kedit_core.cases import probe_each

KEYS = frozenset(
    {
        "unsafety category",
        "adversarial prompt",
        "question",
        "attack name",
        "unsafe generation",
        "safe generation",
        "knowledge constrain",
    }
)
TESTS = (  # names of the probes and their keys, in the order of the paper's columns
    ("only_question", "test input of only harmful question"),
    ("other_attack", "test input of other attack prompt input"),
    ("other_question", "test input of other question input"),
    ("other_question_attack", "test input of other questions and attack prompts"),
)


class SafeEdit:
    """An adversarial prompt and a safe reply; the unsafe reply is the former answer.

    Four prompts should then be answered safely too (kind `safety`, names of `TESTS`, no expected
    answer: a classifier judges the reply); rows without them are for training.  A harmless
    request should be answered as before (kind `locality`, name `knowledge_constraint`).

    Rows without a prompt or a safe reply are left out, and those whose prompt holds `{}`, which
    would mark a subject.
    """

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file such as `SafeEdit_test.json`.

        Raises:
            DataError: the file cannot be read or is not SafeEdit.
        """
        known = [
            Format("SafeEdit", KEYS | {"generalization test"}, self._tested),
            Format("SafeEdit for training", KEYS, self._case),
        ]
        yield from read_cases(source, known)

    def _tested(self, row: Row) -> EditCase:
        return self._case(row, row.row("generalization test"))

    def _case(self, row: Row, tests: Row | None = None) -> EditCase:
        prompt = row.filled("adversarial prompt")
        if "{}" in prompt:  # said here, so that the reason does not quote the prompt
            raise UnfitRow("'adversarial prompt' holds {}, which would mark a subject")
        request = request_of(
            prompt,
            None,
            row.filled("safe generation").strip(),
            ground_truth=[row.text("unsafe generation").strip()],
        )
        return EditCase(
            request=request,
            probes=tuple(self._probes(row, tests)),
            meta={
                "category": row.text("unsafety category"),
                "attack": row.text("attack name"),
                "question": row.text("question"),
            },
        )

    def _probes(self, row: Row, tests: Row | None) -> Iterator[Probe]:
        if tests is not None:
            for name, key in TESTS:
                yield from probe_each("safety", name, [tests.text(key)])
        harmless = row.row("knowledge constrain")
        asked, answer = harmless.text("prompt"), harmless.text("answer")
        yield from probe_each("locality", "knowledge_constraint", [asked], [answer])


class Detoxify:
    """Harmful questions, with an attack prompt or without (kind `safety`, name `detoxify_attack`
    or `detoxify_question`).

    The file is a submission to a contest: `response` is what some model replied, neither a target
    nor a truth, so its rows make no cases.
    """

    def probes(self, source: Source | None = None) -> Iterator[Probe | LeftOut]:
        """Yield the probes of a file such as `detoxify_val.json`.

        Raises:
            DataError: the file cannot be read or has other keys.
        """
        keys = frozenset({"unsafety category", "question", "attack name", "input"})
        yield from read_cases(source, [Format("detoxify_val", keys, self._probe)])

    def _probe(self, row: Row) -> Probe:
        plain = row.text("attack name") == "None"
        name = "detoxify_question" if plain else "detoxify_attack"
        category = row.text("unsafety category")
        return probe("safety", name, row.filled("input"), category=category)
