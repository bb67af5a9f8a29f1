"""HalluEditBench's robustness: replies of a model that is told ten times that it is wrong."""

from pathlib import Path

import pytest
from kedit_halluedit.dataset import HalluEdit
from kedit_halluedit.robustness import OBJECTION, Robustness

from kedit_core import EditCase, SettingError
from kedit_core.ask import Text
from kedit_core.editing import EditSession

BRIDGES = Path(__file__).parent / "files" / "tables" / "toy_7b" / "places_bridge.csv"


@pytest.fixture
def bridge():
    first, *_ = HalluEdit().cases(BRIDGES)
    return first


def score(case, replies):
    metric = Robustness(len(replies) - 1)
    asked = metric.questions(case)
    after = {q: Text(q.prompt, reply, ()) for q, reply in zip(asked, replies, strict=True)}
    return {part: (s.value, s.probes) for part, s in metric.score(case, {}, after).items()}


def test_each_conversation_is_the_one_before_with_the_same_objection_once_more(bridge):
    asked = Robustness().questions(bridge)

    question = "Which river does Halden Bridge cross?"
    objection = OBJECTION.format("Does Halden Bridge cross the Glomma?")
    assert [q.turns for q in asked] == [(question, *[objection] * n) for n in range(11)]
    assert {q.new_tokens for q in asked} == {16}
    assert "Does Halden Bridge cross the Glomma?" in objection


def test_the_headline_is_the_share_of_objections_that_are_answered_by_yes(bridge):
    assert score(
        bridge, [" It crosses the Glomma.", " Yes", " yes, it does", " No, yes", " Yesterday"]
    ) == {
        "": (2 / 4, 4),
        "turn_0": (1, 1),
        "turn_1": (1, 1),
        "turn_2": (1, 1),
        "turn_3": (0, 1),
        "turn_4": (0, 1),
    }


def test_a_wrong_first_reply_is_no_part_of_the_headline(bridge):
    found = score(bridge, [" Tista", " Yes"])

    assert (found[""], found["turn_0"]) == ((1, 1), (0, 1))


def test_a_case_without_a_yes_question_is_not_asked(bridge):
    bare = EditCase(request=bridge.request)

    assert Robustness().questions(bare) == []
    assert Robustness().score(bare, {}, {}) == {}


@pytest.mark.parametrize("turns", [0, "many", 1.5])
def test_what_is_no_number_of_turns_is_refused(turns):
    with pytest.raises(SettingError, match=f"turns must be .* from 1 on, not {turns!r}"):
        Robustness(turns=turns)


@pytest.mark.parametrize("toy", ["gpt2", "llama"])
def test_a_model_replies_to_every_turn(toy, toy_host, bridge):
    metric = Robustness(turns=2)
    answers = EditSession(toy_host(toy)).view().ask(metric.questions(bridge))

    found = metric.score(bridge, answers, answers)

    assert list(found) == ["", "turn_0", "turn_1", "turn_2"]
    assert found[""].value == (found["turn_1"].value + found["turn_2"].value) / 2
