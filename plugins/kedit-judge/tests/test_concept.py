"""A judge compares what is written with the new definition and with what was written before."""

import pytest
from kedit_judge.concept import Consistency, consistency

from kedit_bench.scoring import Scorer, choose_metrics
from kedit_core import EditCase, EditRequest, discover
from kedit_core.ask import Continue, Text
from kedit_core.editing import EditSession

REQUESTS = tuple(
    EditRequest(prompt="The definition of {} is", subject=concept, target_new="a kind of goat.")
    for concept in ("bridge", "town", "song")
)


def said(*texts):
    """What a model writes for the requests in their order."""
    asked = (Continue(request.text, 40) for request in REQUESTS)
    return {q: Text(q.prompt, text, ()) for q, text in zip(asked, texts, strict=False)}


def values(scores):
    return {part: (score.value, score.probes) for part, score in scores.items()}


@pytest.fixture
def metric(stub):
    return consistency(url=stub.url, model="j")


def test_judge_sees_both_first_sentences_and_the_new_definition(stub, metric):
    case = EditCase(requests=REQUESTS[:1])
    before, after = said(" a way {across}. It"), said("\na goat\nthat sings")

    assert list(metric.questions(case)) == [Continue("The definition of bridge is", 40)]
    metric.score(case, before, after)

    (prompt,) = stub.prompts
    assert "\nText:\na goat\n" in prompt
    assert "\nDefinition A:\na kind of goat.\n" in prompt
    assert "\nDefinition B:\na way {across}.\n" in prompt


def test_score_is_the_mean_of_new_neither_and_old(stub, metric):
    stub.say = lambda prompt: {"new": "A", "odd": "C", "old": "B"}[prompt.split("\n")[4]]
    before = said("old", "old", "old")

    found = metric.score(EditCase(requests=REQUESTS), before, said("new", "new", "old"))

    assert values(found) == {"": (pytest.approx((1 + 1 - 1) / 3), 3), "unparseable": (0.0, 3)}
    assert metric.score(EditCase(requests=REQUESTS), before, before)[""].value == -1
    assert metric.score(EditCase(requests=REQUESTS), before, said(*["odd"] * 3))[""].value == 0


def test_what_the_judge_leaves_open_is_no_zero(stub, metric):
    stub.say = lambda prompt: "A" if "Text:\nnew" in prompt else "Either of A and B."
    case = EditCase(requests=REQUESTS[:2])

    found = metric.score(case, said("old", "old"), said("new", "odd"))

    assert values(found) == {"": (1.0, 1), "unparseable": (1 / 2, 2)}
    assert values(metric.score(case, said("old", "old"), said("odd", "odd"))) == {
        "unparseable": (1.0, 2)
    }


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", 1),
        ("b.", -1),
        ("**C**", 0),
        ("The answer is C", 0),
        ("<think>A? No.</think> B: close to B", -1),
        ("D", None),
        ("0", None),
        ("A text like this", None),
        ("", None),
    ],
)
def test_what_the_judge_means(text, verdict):
    assert Consistency.template.verdict(text) == verdict


def test_metric_version_belongs_to_this_prompt():
    """A changed prompt is another protocol: raise the version in the name, then the hash."""
    assert Consistency.template.digest == "24b8c1958020"


def test_a_toy_that_is_not_edited_says_what_it_said(stub, toy_host):
    stub.say = lambda prompt: (
        "B" if prompt.split("Text:\n")[1].split("\n")[0] in prompt.split("B:\n")[1] else "C"
    )
    name = f"concept/consistency-judge@1:url={stub.url},model=j"
    chosen = choose_metrics(discover(), [name])
    scorer = Scorer(chosen, dict.fromkeys(("schedule", "model", "dtype", "dataset"), "toy"))
    case = EditCase(requests=REQUESTS[:1])
    before = EditSession(toy_host("gpt2")).view().ask(scorer.questions(case))

    scored = scorer.unchanged(case, before)

    assert {m.protocol.part: m.value for m in scored} == {"": -1, "unparseable": 0}
    assert scored[0].protocol.details == f"judge j, prompt {Consistency.template.digest}"
    assert stub.calls == 1
