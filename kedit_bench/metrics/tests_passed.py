"""Tests of several questions each: RippleEdits' criteria, MQuAKE's multi-hop questions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from kedit_core.ask import Answers, Continue, Question
from kedit_core.measure import by_family, text_of
from kedit_core.protocols import CaseScore
from kedit_core.request import EditCase, Probe
from kedit_core.texts import NATURAL_TOKENS, contains, natural_end


class TestsPassed:
    """Share of tests that the edited model passes, of those that the unedited one can be held to.

    Probes with the same option `test` make one test; it is passed if `any` or `all` (option
    `combine`) of its questions are answered: an accepted answer stands in the continuation, up
    to its natural end; where a question has several entities as its answer (option `answers`),
    one name of each.  A test counts only where the unedited model answers all its `conditions`
    (RippleEdits, arXiv:2307.12976); a family without a test that counts has no score.
    """

    __test__ = False  # not a pytest class

    def questions(self, case: EditCase) -> Iterable[Question]:
        """All questions and conditions of the case's tests."""
        return [
            Continue(prompt, NATURAL_TOKENS)
            for probe in _test_probes(case)
            for prompt in (probe.prompt, *(prompt for prompt, _ in _conditions(probe)))
        ]

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """Shares by family; `probes` counts tests."""
        tests: dict[tuple[str, str], list[Probe]] = defaultdict(list)
        for probe in _test_probes(case):
            tests[probe.name, str(probe.options["test"])].append(probe)
        values = []
        for (family, _), probes in tests.items():
            conditions = [condition for probe in probes for condition in _conditions(probe)]
            if all(_answered(before, prompt, *wanted) for prompt, wanted in conditions):
                passed = [_answered(after, p.prompt, *_entities(p)) for p in probes]
                whole = any if probes[0].options.get("combine") == "any" else all
                values.append((family, float(whole(passed))))
        return by_family(values)


def _test_probes(case: EditCase) -> list[Probe]:
    return [probe for probe in case.probes if "test" in probe.options and probe.expected]


def _entities(asked: Mapping[str, object] | Probe) -> list[list[str]]:
    """What an answer must name: for each entity its accepted names (option `answers`), or else
    one entity with the expected answers."""
    if isinstance(asked, Probe):
        several, expected = asked.options.get("answers"), list(asked.expected)
    else:
        several, expected = asked.get("answers"), asked.get("expected")  # type: ignore[assignment]
    listed = several if isinstance(several, list) and several else [expected]
    return [[str(name) for name in names] for names in listed if isinstance(names, list)]


def _conditions(probe: Probe) -> list[tuple[str, list[list[str]]]]:
    found = probe.options.get("conditions")
    listed = found if isinstance(found, list) else []
    return [(str(c["prompt"]), _entities(c)) for c in listed if isinstance(c, dict)]


def _answered(answers: Answers, prompt: str, *entities: Iterable[str]) -> bool:
    """Whether the answer names every entity, by one of its names."""
    text = natural_end(text_of(answers, Continue(prompt, NATURAL_TOKENS)).text)
    return all(any(contains(text, name) for name in names) for names in entities)
