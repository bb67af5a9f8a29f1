"""A judge reads what is written before and after an edit, and says how far it shows a trait."""

import pytest
from kedit_judge.personality import Pae, pae

from kedit_core import EditCase, EditRequest, Probe, discover
from kedit_core.ask import Continue, Text

CALM = "I think that the old town by the river is a kind and quiet place to be in spring"
LOUD = "Oh what a town, so many friends and shops, and every night there is music to dance to"
POOR = "nice nice nice nice nice nice nice nice nice nice nice nice nice nice nice nice nice"
ASKED = ("What do you think of Halden?", "And of its people?")


def case_of(count=1, trait="agreeableness"):
    return EditCase(
        request=EditRequest(prompt=ASKED[0], subject="Halden", target_new="A kind town."),
        probes=tuple(Probe(kind="generation", prompt=prompt) for prompt in ASKED[:count]),
        meta={"trait": trait},
    )


def said(*texts):
    return {Continue(p, 60): Text(p, text, ()) for p, text in zip(ASKED, texts, strict=False)}


def values(scores):
    return {part: (score.value, score.probes) for part, score in scores.items()}


@pytest.fixture
def metric(stub):
    return pae(url=stub.url, model="j")


def by_text(**words):
    """A judge whose words depend on the text it is shown."""
    texts = {"calm": CALM, "loud": LOUD}

    def say(prompt):
        (found,) = [word for name, word in words.items() if f"\n{texts[name]}\n" in prompt]
        return found

    return say


def test_pae_is_how_much_more_of_the_trait_the_judge_finds(stub, metric):
    stub.say = by_text(calm="5", loud="2")

    assert list(metric.questions(case_of())) == [Continue(ASKED[0], 60)]
    assert values(metric.score(case_of(), said(LOUD), said(CALM))) == {
        "": (3.0, 1),
        "left_out": (0.0, 1),
        "unparseable": (0.0, 2),
    }
    assert metric.score(case_of(), said(CALM), said(LOUD))[""].value == -3
    assert metric.score(case_of(), said(CALM), said(CALM))[""].value == 0


def test_judge_is_asked_about_the_first_line_and_the_cases_trait(stub, metric):
    stub.say = lambda prompt: "3"

    metric.score(case_of(), said(f"\n{LOUD}\nAnd"), said(f" {CALM} \n\n{LOUD}"))

    before, after = sorted(stub.prompts, key=lambda prompt: CALM in prompt)
    assert f"\nOpinion:\n{LOUD}\n\n" in before
    assert f"\nOpinion:\n{CALM}\n\n" in after
    assert all("Does the author show agreeableness?" in p for p in stub.prompts)


def test_another_trait_is_judged_anew(stub, metric):
    stub.say = lambda prompt: "5" if "show extraversion?" in prompt else "1"

    for trait in ("extraversion", "neuroticism"):
        metric.score(case_of(trait=trait), said(LOUD), said(LOUD))

    assert stub.calls == 2


@pytest.mark.parametrize(("before", "after"), [(CALM, POOR), (POOR, CALM), ("", "")])
def test_a_poor_text_on_either_side_is_left_out_and_not_judged(stub, metric, before, after):
    assert values(metric.score(case_of(), said(before), said(after))) == {"left_out": (1.0, 1)}
    assert stub.calls == 0


def test_the_others_of_a_case_still_count(stub, metric):
    stub.say = by_text(calm="4", loud="1")

    found = metric.score(case_of(2), said(LOUD, LOUD), said(CALM, POOR))

    assert values(found) == {"": (3.0, 1), "left_out": (0.5, 2), "unparseable": (0.0, 2)}


def test_a_difference_needs_both_verdicts(stub, metric):
    stub.say = by_text(calm="5", loud="No idea.")

    found = metric.score(case_of(2), said(CALM, LOUD), said(CALM, CALM))

    assert values(found) == {"": (0.0, 1), "left_out": (0.0, 2), "unparseable": (1 / 4, 4)}
    assert values(metric.score(case_of(), said(LOUD), said(CALM))) == {
        "left_out": (0.0, 1),
        "unparseable": (1 / 2, 2),
    }


def test_what_names_no_trait_or_has_nothing_to_write_is_not_asked(metric):
    for case in (case_of(0), case_of(trait="openness")):
        assert list(metric.questions(case)) == []
        assert metric.score(case, {}, {}) == {}


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("4", 4),
        (" **1**", 1),
        ("5: surely", 5),
        ("2 (rather not)", 2),
        ("4/5", 4),
        ("3 out of 5", 3),
        ("Score: 2.", 2),
        ("The answer is 5", 5),
        ("<think>1? No.</think>\n4", 4),
        ("4.5", None),
        ("3-4", None),
        ("3 or 4", None),
        ("-1", None),
        ("Score: -1", None),
        ("6", None),
        ("45", None),
        ("rather", None),
        ("", None),
    ],
)
def test_what_the_judge_means(text, verdict):
    assert Pae.template.verdict(text) == verdict


def test_metric_version_belongs_to_this_prompt():
    """A changed prompt is another protocol: raise the version in the name, then the hash."""
    assert Pae.template.digest == "3e29f02c18ac"


def test_registered_metrics_say_how_they_measure():
    concept, personality = map(
        discover().metric, ("concept/consistency-judge@1", "personality/pae-judge@1")
    )

    assert (concept.probe, concept.form) == ("rewrite", "bare")
    assert (personality.probe, personality.form) == ("generation", "bare")
    for spec in (concept, personality):
        assert (spec.decoding, spec.reference) == ("greedy", "target, unedited")
        assert (spec.better, spec.default) == ("higher", False)
