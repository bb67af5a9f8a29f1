"""Sanitation's scores on texts of which one knows what they should be."""

import pytest
from kedit_knowedit.metric import forgotten, retained

from kedit_core import EditCase, EditRequest, Probe
from kedit_core.ask import Continue, Text


def case_of(*probes, **meta) -> EditCase:
    request = EditRequest(prompt="Which town?", target_new="I don't know.")
    return EditCase(request=request, probes=probes, meta=meta)


@pytest.mark.parametrize(
    ("written", "score"),
    [(" I don’t know. It", 1), ("\ni DON'T know", 1), (" I don't", 0), (" Halden.", 0)],
)
def test_an_answer_is_forgotten_where_the_edits_answer_stands_instead(written, score):
    case = case_of(group="halden")
    (question,) = forgotten().questions(case)

    found = forgotten().score(case, {}, {question: Text("Which town?", written, (1, 2))})

    assert question == Continue("Which town?", 8)
    assert (found[""].value, found["halden"].value) == (score, score)


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [
        ((1, 2, 3, 4), (1, 2, 3, 4), 1),
        ((1, 2, 3, 4), (1, 9, 3, 9), 1 / 2),
        ((1, 2), (1, 2, 3, 4), 1 / 2),
        ((1, 2, 3, 4), (2, 3, 4), 0),
        ((), (), 1),
        ((), (1,), 0),
    ],
)
def test_what_is_retained_is_compared_token_by_token(before, after, share):
    case = case_of(Probe(kind="locality", name="retained", prompt="Who?"))
    (question,) = retained().questions(case)
    old, new = (Text("Who?", "", tokens) for tokens in (before, after))

    assert retained().score(case, {question: old}, {question: new})[""].value == share
