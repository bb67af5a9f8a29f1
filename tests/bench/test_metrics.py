"""Scores of a case are what docs/metrics.md says."""

import pytest

from kedit_bench.metrics import (
    begins_with,
    efficacy_greedy,
    generalization_teacher_forced,
    locality_greedy,
    locality_teacher_forced,
    probes_of,
)
from kedit_bench.single import Mean, summarise
from kedit_core.request import EditCase, EditRequest, Probe
from kedit_core.view import Answer, Score


def answer(text, predicted=(1,), tokens=(1,)):
    score = Score("p", "t", tuple(tokens), (-1.0,) * len(tokens), tuple(predicted))
    return Answer("p", text, (score,))


CASE = EditCase(
    request=EditRequest(prompt="The {} is in", subject="Tower", target_new="Rome"),
    probes=(
        Probe(kind="rephrase", prompt="The Tower stands in", expected=("Rome",)),
        Probe(kind="locality", prompt="The Louvre is in", expected=("Paris",)),
    ),
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" Rome, Italy", True),
        ("rome.", True),
        ("\nRome", True),
        (" Romeo and Juliet", False),
        (" the city of Rome", False),
        ("", False),
    ],
)
def test_an_answer_begins_a_text_as_a_whole_word(text, found):
    assert begins_with(text, "Rome") is found


def test_the_rewritten_prompt_comes_first():
    kinds = [probe.kind for probe in probes_of(CASE)]
    assert kinds == ["rewrite", "rephrase", "locality"]


def test_efficacy_reads_the_rewritten_prompt_only():
    before = [answer(" Paris"), answer(" Paris"), answer(" Paris")]
    after = [answer(" Rome."), answer(" Paris"), answer(" Rome")]
    assert efficacy_greedy().score(CASE, before, after) == {"efficacy/greedy@1": 1.0}


def test_teacher_forced_scores_are_shares_of_tokens():
    before = [answer("", (1, 2), (1, 2))] * 3
    after = [
        answer("", (1, 2), (1, 2)),
        answer("", (1, 9), (1, 2)),
        answer("", (1, 7), (1, 2)),
    ]
    found = generalization_teacher_forced().score(CASE, before, after)
    assert found == {"generalization/teacher-forced@1": 0.5}
    found = locality_teacher_forced().score(CASE, before, after)
    assert found == {"locality/teacher-forced@1": 0.5}


def test_locality_compares_with_the_unedited_model_not_with_the_truth():
    wrong_before_and_after = [answer(" London town")] * 3
    found = locality_greedy().score(CASE, wrong_before_and_after, wrong_before_and_after)
    assert found == {"locality/greedy@1": 1.0}
    changed = [answer(" Rome")] * 3
    assert locality_greedy().score(CASE, wrong_before_and_after, changed) == {
        "locality/greedy@1": 0.0
    }


def test_a_case_without_such_probes_has_no_score():
    case = EditCase(request=CASE.request)
    assert locality_greedy().score(case, [answer("")], [answer("")]) == {}


def test_a_probe_without_an_expected_answer_counts_only_where_none_is_needed():
    probes = (Probe(kind="locality", prompt="a"), Probe(kind="rephrase", prompt="b"))
    case = EditCase(request=CASE.request, probes=probes)
    before = [answer(" Paris"), Answer("a", " one two"), Answer("b", " one")]
    after = [answer(" Rome"), Answer("a", " one three"), Answer("b", " two")]
    assert locality_greedy().score(case, before, after) == {"locality/greedy@1": 1.0}
    assert locality_teacher_forced().score(case, before, after) == {}
    assert generalization_teacher_forced().score(case, before, after) == {}


def test_the_summary_gives_mean_and_standard_error():
    rows = [{"a": 1.0}, {"a": 0.0}, {"a": 1.0, "b": 1.0}, {"a": 0.0}]
    found = summarise(rows)
    assert found["a"].mean == 0.5
    assert found["a"].error == pytest.approx((1 / 3) ** 0.5 / 2)  # s/√n, s² = 4·¼/3
    assert found["b"] == Mean(1, 1.0, 0.0)
