"""Questions and answers survive being stored, and what was not stored by us is refused."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedit_core import DataError
from kedit_core.ask import (
    Continue,
    Converse,
    Diverge,
    Divergence,
    Read,
    Sample,
    Score,
    Text,
    answer_from_json,
    answer_to_json,
    question_from_json,
    question_to_json,
)

FORMS = st.sampled_from(["bare", "task"])
IDS = st.lists(st.integers(0, 300_000), max_size=5).map(tuple)
NUMBERS = st.floats(allow_nan=False)  # two that are no numbers are never the same
COUNTS = st.integers(0, 10**9)

READS = st.builds(Read, st.text(), st.text(), FORMS, st.booleans(), st.booleans())
CONTINUES = st.builds(Continue, st.text(), COUNTS, FORMS)
CONVERSES = st.builds(Converse, st.lists(st.text(), min_size=1, max_size=3).map(tuple), COUNTS)
SAMPLES = st.builds(Sample, st.text(), COUNTS, COUNTS, st.integers())
DIVERGES = st.builds(Diverge, st.text(), st.text())


def score_of(question: Read) -> st.SearchStrategy[Score]:
    return st.builds(
        Score,
        st.just(question.prompt),
        st.just(question.target),
        tokens=IDS,
        logprobs=st.lists(NUMBERS, max_size=5).map(tuple),
        predicted=IDS,
        rank=COUNTS,
        merged=st.booleans(),
        cut=st.booleans(),
    )


def text_of(question: Continue | Converse | Sample) -> st.SearchStrategy[Text]:
    return st.builds(
        Text,
        st.just(question.prompt),
        st.text(),
        IDS,
        ended=st.booleans(),
        cut=st.booleans(),
        room=st.none() | COUNTS,
    )


ASKED = st.one_of(
    READS.flatmap(lambda q: st.tuples(st.just(q), score_of(q))),
    (CONTINUES | CONVERSES | SAMPLES).flatmap(lambda q: st.tuples(st.just(q), text_of(q))),
    st.tuples(DIVERGES, st.builds(Divergence, NUMBERS, COUNTS)),
)


@given(ASKED)
def test_a_question_and_its_answer_come_back_from_json_as_they_were(pair):
    question, answer = pair

    data = [question_to_json(question), answer_to_json(answer)]
    stored = json.dumps(data, ensure_ascii=False, allow_nan=False)
    asked, answered = json.loads(stored)

    assert question_from_json(asked) == question
    assert type(question_from_json(asked)) is type(question)
    assert answer_from_json(question, answered) == answer
    assert hash(answer_from_json(question, answered)) == hash(answer)


def test_what_a_broken_model_says_is_stored_too():
    for question, answer in (
        (Read("a", "b"), Score("a", "b", (7, 8), (math.nan, -math.inf), (0, 0))),
        (Diverge("a", "b"), Divergence(math.nan)),
        (Continue("a", 5), Text("a", "nan", (1,))),
    ):
        stored = json.dumps(answer_to_json(answer), allow_nan=False)

        assert str(answer_from_json(question, json.loads(stored))) == str(answer)


def test_what_the_question_says_is_not_stored_with_the_answer():
    score = Score("Anne lives in", "Rome", (7,), (-1.5,), (7,))

    assert question_to_json(Read("Anne lives in", "Rome")) == [
        *("read", "Anne lives in", "Rome", "bare", False, False)
    ]
    assert set(answer_to_json(score)) == {
        *("tokens", "logprobs", "predicted", "rank", "merged", "cut")
    }


QUESTIONS = [
    Read("a", "b"),
    Read("a", "b", form="task"),
    Read("a", "b", stop=True),
    Read("a", "b", exact=True),
    Read("b", "a"),
    Diverge("a", "b"),
    Continue("a", 5),
    Continue("a", 6),
    Continue("a", 5, form="task"),
    Converse(("a",), 5),
    Converse(("b", "a"), 5),
    Sample("a", 5),
    Sample("a", 5, seed=1),
    Sample("a", 5, top_k=6),
]


def test_different_questions_are_stored_differently():
    stored = {json.dumps(question_to_json(question)) for question in QUESTIONS}

    assert len(stored) == len(set(QUESTIONS)) == len(QUESTIONS)


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_an_older_version_did_not_store_has_its_default(question):
    kind, *said = question_to_json(question)
    needed = {"read": 2, "continue": 2, "converse": 2, "sample": 1, "diverge": 2}[kind]

    found = question_from_json(json.loads(json.dumps([kind, *said[:needed]])))

    assert (type(found), found.prompt) == (type(question), question.prompt)
    assert found == type(question)(*said[:needed])


def test_answers_of_an_older_version_lack_room_and_number_of_tokens():
    text = answer_from_json(Continue("a", 5), {"text": "x", "tokens": [1]})

    assert text == Text("a", "x", (1,), room=None)
    assert answer_from_json(Diverge("a", "b"), {"kl": 0.5}) == Divergence(0.5, tokens=1)


@pytest.mark.parametrize(
    "data",
    [
        [],
        ["reed", "a", "b"],
        ["read"],
        ["read", "a"],
        ["read", "a", "b", "bare", False, False, "more"],
        [["read"], "a", "b"],
        [None],
        {"kind": "read"},
        None,
        "read",
        7,
    ],
)
def test_what_is_no_question_is_refused(data):
    with pytest.raises(DataError, match="is no stored question"):
        question_from_json(data)


@pytest.mark.parametrize(
    ("question", "data"),
    [
        (Read("a", "b"), {}),
        (Read("a", "b"), {"text": "x", "tokens": [1]}),
        (Continue("a", 5), {"text": "x"}),
        (Continue("a", 5), {"kl": 0.0}),
        (Diverge("a", "b"), {"kl": 0.0, "more": 1}),
        (Diverge("a", "b"), {"kl": "much"}),
        (Diverge("a", "b"), {"kl": None}),
        (Sample("a"), {}),
    ],
)
def test_an_answer_to_another_question_is_refused(question, data):
    with pytest.raises(DataError, match="is no stored answer to "):
        answer_from_json(question, data)


def test_figures_of_a_score():
    score = Score("p", "t", (1, 2, 3, 4), (-1.0, -2.0, -3.0, -6.0), (1, 5, 3, 5))

    assert score.accuracy == 0.5
    assert score.mean_logprob == -3.0
    assert math.exp(4 * score.mean_logprob) == pytest.approx(math.exp(-12))
