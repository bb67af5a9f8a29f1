"""Means are taken over scores of one protocol, by hand-computed examples."""

import math
import re
from dataclasses import asdict, replace
from types import ModuleType

import pytest

from kedit_bench.report import score_rows
from kedit_bench.scoring import (
    FINAL,
    IMMEDIATE,
    UNEDITED,
    Mean,
    Measurement,
    MetricError,
    MissingAnswerError,
    Protocol,
    Scorer,
    Tally,
    choose_metrics,
)
from kedit_core import hookimpl
from kedit_core.ask import Read
from kedit_core.errors import DataError, PluginError, SettingError, UnknownNameError
from kedit_core.plugins import discover
from kedit_core.protocols import CaseScore
from kedit_core.request import Probe
from kedit_core.spec import DatasetSpec, MetricSpec
from tests.bench.asked import case, perfect, score

WHERE = {"schedule": "single", "model": "m", "dtype": "float32", "dataset": "d"}
PROTOCOL = Protocol(
    metric="a@1", part="", probe="rewrite", decoding="greedy", scorer="s", reference="target",
    form="bare", moment=IMMEDIATE, **WHERE,
)  # fmt: skip


def mean_of(*measurements: Measurement) -> Mean:
    tally = Tally(PROTOCOL)
    for measurement in measurements:
        tally.add(measurement)
    return tally.mean()


def test_mean_and_standard_error_by_hand():
    found = mean_of(*(Measurement(PROTOCOL, value, 2) for value in (0.0, 1.0, 1.0, 0.0)))

    assert (found.mean, found.cases, found.probes) == (0.5, 4, 8)
    assert found.error == pytest.approx(math.sqrt(1 / 3 / 4))


def test_the_standard_error_of_one_case_is_unknown():
    assert mean_of(Measurement(PROTOCOL, 1.0, 1)).error is None
    assert mean_of(*[Measurement(PROTOCOL, 1.0, 1)] * 2).error == 0


def test_tables_show_no_error_where_it_is_unknown():
    one, two = (asdict(mean_of(*[Measurement(PROTOCOL, 1.0, 1)] * n)) for n in (1, 2))
    results = [{"label": label, "scores": [s]} for label, s in (("a", one), ("b", two))]

    _, ((*_, first, second),) = score_rows(results)

    assert (first, second) == ("1.000 (1)", "1.000 ± 0.000 (2)")


def test_the_standard_error_of_large_values_that_lie_close_is_exact():
    values = [1e8 + x for x in (0.0, 1.0, 2.0)]  # their squares lose the difference

    assert mean_of(*(Measurement(PROTOCOL, v, 1) for v in values)).error == math.sqrt(1 / 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_never_averaged(value):
    with pytest.raises(DataError, match=rf"The value {value} of a@1 is not averaged"):
        mean_of(Measurement(PROTOCOL, 1.0, 1), Measurement(PROTOCOL, value, 1))


@pytest.mark.parametrize("field", ["moment", "form", "reference", "schedule", "dtype", "dataset"])
def test_scores_of_different_protocols_are_never_averaged(field):
    other = replace(PROTOCOL, **{field: "other"})

    with pytest.raises(DataError, match=f"not averaged: {field} is"):
        mean_of(Measurement(PROTOCOL, 1.0, 1), Measurement(other, 0.0, 1))


def scorer(*names: str) -> Scorer:
    return Scorer(choose_metrics(discover(), names), WHERE)


def test_each_question_is_asked_once_whatever_many_metrics_need_it():
    asked = case(Probe(kind="rephrase", prompt="Q", expected=("Rome",)))
    questions = scorer("*/teacher-forced@1", "*/all-tokens@1").questions(asked)

    assert len(questions) == len(set(questions)) == 2


def test_cases_without_probes_of_a_kind_do_not_count():
    with_probe = case(Probe(kind="rephrase", prompt="Q", expected=("Rome",)))
    several = scorer("*/teacher-forced@1")
    measurements = []
    for asked in (with_probe, case()):
        after = perfect(several.questions(asked), {})
        measurements += several.score(asked, dict(after), after, IMMEDIATE)

    cases = {m.protocol.metric: m.cases for m in several.summary(measurements)}

    assert cases == {"efficacy/teacher-forced@1": 2, "generalization/teacher-forced@1": 1}


def test_the_unedited_model_agrees_with_itself():
    asked = case(Probe(kind="locality", prompt="Q", expected=("Rome",)))
    both = scorer("locality-agreement/*", "opinion/divergence@1")
    before = perfect(both.questions(asked), {"Q": "Lima"})

    found = {m.protocol.metric: m.value for m in both.unchanged(asked, before)}

    assert {m.protocol.moment for m in both.unchanged(asked, before)} == {UNEDITED}
    assert found.pop("opinion/divergence@1") == 0
    assert set(found.values()) == {1.0}
    assert len(found) == 3


def test_answers_of_one_model_cannot_be_both_sides():
    asked = case()
    one = scorer("efficacy/teacher-forced@1")
    answers = perfect(one.questions(asked), {})

    with pytest.raises(DataError, match="are the same"):
        one.score(asked, answers, answers, IMMEDIATE)


def test_what_is_made_of_means_is_added_for_each_moment():
    asked = case(
        Probe(kind="rephrase", prompt="P"),
        Probe(kind="locality", name="neighborhood", prompt="N"),
    )
    contrast = scorer("counterfact/contrast@1")
    after = perfect(contrast.questions(asked), {})
    measurements = contrast.score(asked, dict(after), after, IMMEDIATE)
    measurements += contrast.score(asked, dict(after), after, FINAL)

    means = contrast.summary(measurements)

    headlines = [m for m in means if m.protocol.part == ""]
    assert {m.protocol.moment for m in headlines} == {IMMEDIATE, FINAL}
    assert all(m.error is None for m in headlines)


def test_a_figure_counts_the_cases_of_the_part_that_it_is_made_of():
    likelihood = scorer("portability/nll@1")
    measurements = []
    for names in (["hop", "hop", "hops"], ["hop"]):
        asked = case(
            *(Probe(kind="portability", name=name, prompt="Q", expected="Rome") for name in names)
        )
        after = perfect(likelihood.questions(asked), {})
        measurements += likelihood.score(asked, dict(after), after, IMMEDIATE)

    counted = {m.protocol.part: (m.cases, m.probes) for m in likelihood.summary(measurements)}

    assert counted["perplexity"] == counted[""] == (2, 4)
    assert counted["hop.perplexity"] == counted["hop"] == (2, 3)
    assert counted["hops.perplexity"] == counted["hops"] == (1, 1)


@pytest.mark.parametrize(
    "returned", [1.0, None, {"": 1.0}, [CaseScore(1.0)], {"": CaseScore("0.5")}]
)
def test_a_metric_that_returns_no_scores_is_one_sentence(returned):
    class Wrong:
        def questions(self, case):
            return []

        def score(self, case, before, after):
            return returned

    (chosen,) = scorer("efficacy/greedy@1").chosen
    wrong = Scorer([replace(chosen, name="mine@1", metric=Wrong())], WHERE)

    says = f"The metric mine@1 returned {returned!r}; score() must return a mapping from parts"
    with pytest.raises(MetricError, match=re.escape(says)):
        wrong.unchanged(case(), {})


class Mine:
    """A metric whose questions and scores are given."""

    def __init__(self, questions=(), score=None) -> None:
        self._questions, self._score = questions, score

    def questions(self, case):
        return self._questions

    def score(self, case, before, after):
        return self._score(before)


def with_mine(metric) -> Scorer:
    (chosen,) = scorer("efficacy/teacher-forced@1").chosen
    return Scorer([replace(chosen, name="mine@1", metric=metric), chosen], WHERE)


@pytest.mark.parametrize(
    ("questions", "reason"),
    [
        (None, "TypeError: 'NoneType' object is not iterable"),
        ("Q", "TypeError: 'Q' is no question"),
        (Read("Q", "Rome"), "TypeError: 'Read' object is not iterable"),
        ([Read("Q", "Rome"), "Q"], "TypeError: 'Q' is no question"),
    ],
)
def test_a_metric_that_cannot_ask_is_passed_over(questions, reason):
    both = with_mine(Mine(questions))

    assert both.questions(case()) == [Read("The Tower is in", "Rome")]
    told = f"The metric mine@1 failed in questions() for the case 'The Tower is in': {reason}."
    assert {name: str(error) for name, error in both.broken.items()} == {"mine@1": told}


def test_a_metric_that_fails_names_itself_and_the_case():
    def fails(before):
        raise ZeroDivisionError("division by zero")

    says = (
        "The metric mine@1 failed in score() for the case 'The Tower is in': ZeroDivisionError: "
        "division by zero."
    )
    with pytest.raises(MetricError, match=re.escape(says)):
        with_mine(Mine(score=fails)).unchanged(case(), {})


ASKED, OTHER = Read("Q", "Rome"), Read("Q", "Lima")


def test_an_answer_that_was_never_asked_for_is_not_one_that_was_not_kept():
    metric = Mine([ASKED], lambda before: {"": CaseScore(len(before[OTHER].tokens))})
    with pytest.raises(MetricError, match=r"mine@1 looked up the answer to .*Lima.*, which it did"):
        with_mine(metric).unchanged(case(), {ASKED: score()})

    metric = Mine([OTHER], metric._score)
    with pytest.raises(MissingAnswerError, match="does not hold the answers that mine@1 needs"):
        with_mine(metric).unchanged(case(), {ASKED: score()})


def test_what_has_neither_questions_and_scores_nor_measures_is_no_metric():
    plugin = ModuleType("plugin")
    spec = MetricSpec("mine/x@1", f"{__name__}:Unable", "Of a test.")
    plugin.kedit_register_metrics = hookimpl(specname="kedit_register_metrics")(lambda: [spec])

    with pytest.raises(PluginError, match=r"'mine/x@1' is no metric: .* has neither questions"):
        choose_metrics(discover([("plugin", plugin)]), ["mine/x@1"])


class Unable:
    def questions(self, case):
        return []


def test_metrics_are_chosen_by_name_pattern_dataset_or_default():
    catalog = discover()
    names = [c.name for c in choose_metrics(catalog, ["efficacy/greedy*"])]
    dataset = DatasetSpec("d", "m:C", "s", metrics=("fluency/*", "of-a-missing-plugin/*"))

    assert names == sorted(n for n in names if n.startswith("efficacy/greedy"))
    assert "efficacy/greedy-f1@1" in names
    assert [c.name for c in choose_metrics(catalog, [], dataset)] == ["fluency/ngram-entropy@1"]
    defaults = {c.name for c in choose_metrics(catalog, [])}
    assert {"efficacy/greedy@1", "locality-agreement/teacher-forced@1"} <= defaults
    assert not any(name.startswith(("counterfact", "fluency")) for name in defaults)


def test_settings_are_part_of_a_metrics_name():
    (chosen,) = choose_metrics(discover(), ["fluency/ngram-entropy@1:length=40,seed=3"])

    assert chosen.name == "fluency/ngram-entropy@1:length=40,seed=3"
    assert (chosen.metric.length, chosen.metric.seed) == (40, 3)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("eficacy/greedy@1", UnknownNameError, "Did you mean 'efficacy/greedy@1'"),
        ("nothing/*", UnknownNameError, "No metric is called like 'nothing/\\*'"),
        ("side-effects/perp*", SettingError, "No metric is left of side-effects/perp"),
        ("fluency/ngram-entropy@1:lenght=4", SettingError, "Did you mean 'length'"),
        ("side-effects/perplexity@1", SettingError, "needs the setting 'text'"),
    ],
)
def test_wrong_names_and_settings_are_one_sentence(name, error, says):
    with pytest.raises(error, match=says):
        choose_metrics(discover(), [name])
