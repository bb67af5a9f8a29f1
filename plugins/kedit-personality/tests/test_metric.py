"""A classifier reads what a model says before and after the edit."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest
from kedit_personality.dataset import TRAITS, Personality
from kedit_personality.metric import Accuracy, Tpei

from kedit_bench.scoring import Scorer, choose_metrics
from kedit_core import EditCase, MetricSpec, Probe, SettingError
from kedit_core.ask import Continue, Text
from kedit_core.named import create
from kedit_core.plugins import discover
from kedit_core.protocols import CaseScore

FILES = Path(__file__).parent / "files"
CALM = "I think that the old town by the river is a kind and quiet place to be in spring"
LOUD = "Oh what a town, so many friends and shops, and every night there is music to dance to"
POOR = "nice nice nice nice nice nice nice nice nice nice nice nice nice nice nice nice nice"
QUESTION = "What do you think of Halden?"
HALDEN = Continue(QUESTION, 60)


class Known:
    """Says of each text what is known of it: probabilities in the order of the traits."""

    def __init__(self, **known):
        self.known = {CALM: (0.1, 0.7, 0.2), LOUD: (0.1, 0.2, 0.7), **known}

    def classify(self, texts):
        return [dict(zip(TRAITS, self.known[text], strict=True)) for text in texts]


@pytest.fixture(autouse=True)
def classifiers(monkeypatch):
    """What was made of `sequence-classifier`; its model is never read."""
    made = []

    def make(model, labels=""):
        made.append((model, labels))
        return SimpleNamespace(labels=tuple(labels.split("+")))

    monkeypatch.setattr("kedit_classifier.sequence.SequenceClassifier", make)
    return made


@pytest.fixture
def halden() -> EditCase:
    """Its trait is agreeableness."""
    return next(iter(Personality().cases(FILES / "personality_test.json")))


def metric(cls, **known):
    made = cls()
    made.classifier = Known(**known)
    return made


def said(text):
    return {HALDEN: Text(QUESTION, text, ())}


@pytest.mark.parametrize(("text", "right"), [(CALM, 1.0), (LOUD, 0.0)])
def test_accuracy_asks_whether_the_target_trait_is_the_most_probable(halden, text, right):
    assert list(metric(Accuracy).questions(halden)) == [HALDEN]

    found = metric(Accuracy).score(halden, said(LOUD), said(text))

    assert found == {"": CaseScore(right), "left_out": CaseScore(0.0)}


def test_tpei_is_the_fall_of_the_traits_cross_entropy(halden):
    found = metric(Tpei).score(halden, said(LOUD), said(CALM))
    back = metric(Tpei).score(halden, said(CALM), said(LOUD))

    assert found[""].value == pytest.approx(math.log(0.7) - math.log(0.2))
    assert back[""].value == -found[""].value
    assert metric(Tpei).score(halden, said(CALM), said(CALM))[""].value == 0


def test_a_probability_of_zero_stays_finite(halden):
    found = metric(Tpei, **{LOUD: (0.0, 0.0, 1.0)}).score(halden, said(LOUD), said(CALM))

    assert 600 < found[""].value < 1000


@pytest.mark.parametrize("cls", [Accuracy, Tpei])
def test_only_the_first_line_is_read(cls, halden):
    plain = metric(cls).score(halden, said(LOUD), said(CALM))

    assert metric(cls).score(halden, said(f"\n {LOUD}\nAnd"), said(f" {CALM} \n\n.")) == plain


@pytest.mark.parametrize("cls", [Accuracy, Tpei])
@pytest.mark.parametrize(
    ("before", "after"), [(CALM, POOR), (POOR, CALM), (CALM, "Nice."), ("", "")]
)
def test_a_case_with_a_poor_text_on_either_side_is_left_out_and_counted(cls, halden, before, after):
    assert metric(cls).score(halden, said(before), said(after)) == {"left_out": CaseScore(1.0)}


def test_the_others_of_a_case_still_count(halden):
    second = Probe(kind="generation", prompt="And of Halden's people?")
    case = halden.model_copy(update={"probes": (*halden.probes, second)})
    first, other = metric(Accuracy).questions(case)

    found = metric(Accuracy).score(
        case,
        {first: Text("", LOUD, ()), other: Text("", LOUD, ())},
        {first: Text("", CALM, ()), other: Text("", POOR, ())},
    )

    assert found == {"": CaseScore(1.0, 1), "left_out": CaseScore(0.5, 2)}


def test_what_names_no_trait_or_has_nothing_to_write_is_not_asked(halden):
    trained, *_ = Personality().cases(FILES / "personality_train.json")
    opinionless = halden.model_copy(update={"meta": {}})

    for case in (trained, opinionless):
        assert list(metric(Tpei).questions(case)) == []
        assert metric(Tpei).score(case, {}, {}) == {}


def test_both_are_chosen_by_default_with_the_published_classifier(classifiers, halden):
    catalog = discover()
    chosen = choose_metrics(catalog, [], catalog.dataset("personality"))
    where = {"schedule": "single", "model": "m", "dtype": "float32", "dataset": "personality"}
    scorer = Scorer([c for c in chosen if c.name.startswith("personality")], where)
    for one in scorer.chosen:
        one.metric.classifier = Known()

    scored = scorer.score(halden, said(LOUD), said(CALM), "immediate")

    assert classifiers == [("shai-msy/per-classifier", "+".join(TRAITS))] * 2
    assert {(m.protocol.metric, m.protocol.part): m.value for m in scored} == {
        ("personality/accuracy@1", ""): 1.0,
        ("personality/accuracy@1", "left_out"): 0.0,
        ("personality/tpei@1", ""): pytest.approx(math.log(0.7) - math.log(0.2)),
        ("personality/tpei@1", "left_out"): 0.0,
    }


def test_the_dataset_names_metrics_that_there_are_and_none_that_costs_money():
    names = {spec.name for spec in discover().all(MetricSpec)}
    wanted = discover().dataset("personality").metrics
    chosen = {name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)}

    assert {"personality/accuracy@1", "personality/tpei@1", "opinion/score@1"} <= chosen
    assert not any("judge" in name for name in chosen)


@pytest.mark.parametrize(
    ("before", "after", "read"),
    [(LOUD, POOR, []), (f"{LOUD}\n{POOR}", f"\n{CALM} ", [LOUD, CALM])],
)
def test_a_judge_reads_the_texts_that_a_classifier_reads(halden, before, after, read):
    judged = create(discover().metric("personality/pae-judge@1"), {"url": "http://h", "model": "j"})
    seen = []
    judged.judge.verdicts = lambda items: [seen.append(item["text"]) or 3.0 for item in items]
    classified = metric(Tpei)  # its classifier knows no other text

    found = [m.score(halden, said(before), said(after)) for m in (judged, classified)]

    assert list(judged.questions(halden)) == list(classified.questions(halden))
    assert seen == read
    assert found[0]["left_out"] == found[1]["left_out"]


def test_another_model_needs_the_traits_as_labels(classifiers):
    with pytest.raises(SettingError, match="no label 'neuroticism'") as caught:
        Accuracy(model="mine", labels="sad+kind+loud")

    assert "labels=neuroticism+agreeableness+extraversion" in str(caught.value)
    Accuracy(model="mine", labels="extraversion+agreeableness+neuroticism")
    assert classifiers[-1] == ("mine", "extraversion+agreeableness+neuroticism")
