"""Each case is joined with the one after it, and nothing changes its place."""

from __future__ import annotations

import pytest

from kedit_core import EditCase, EditRequest, LeftOut, Probe
from kedit_core.cases import asked_about, with_next


def items(letters: str):
    """Cases in upper case, and rows left out in lower case."""
    for letter in letters:
        if letter.islower():
            yield LeftOut("f", 1, letter)
        else:
            yield EditCase(request=EditRequest(prompt=letter, target_new="x"))


def pair(case: EditCase, after: EditCase) -> EditCase:
    return case.model_copy(update={"meta": {"next": after.request.prompt}})


def shown(found) -> list[str]:
    return [
        item.reason
        if isinstance(item, LeftOut)
        else item.request.prompt + str(item.meta.get("next"))
        for item in found
    ]


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("ABC", ["AB", "BC", "CA"]),
        ("aAbcBdCe", ["a", "AB", "b", "c", "BC", "d", "CA", "e"]),
        ("A", ["AA"]),
        ("aAb", ["a", "AA", "b"]),
        ("ab", ["a", "b"]),
        ("", []),
    ],
)
def test_each_case_meets_the_next_and_the_last_the_first(letters, expected):
    assert shown(with_next(items(letters), pair)) == expected


def test_no_more_is_read_ahead_than_the_next_case():
    read = []
    cases = (read.append(case.request.prompt) or case for case in items("ABC"))

    next(with_next(cases, pair))

    assert read == ["A", "B"]


def about(topic: str, same: list[str], other: list[str]) -> EditCase:
    opinion = Probe(kind="opinion", prompt="Q", options={"same": same, "other": other})
    request = EditRequest(prompt="What of {}?", subject=topic, target_new="good")
    return EditCase(request=request, probes=(opinion,))


def test_the_next_topic_is_asked_about_with_three_of_its_opinions():
    case = about("tea", ["a"], ["b"])

    joined = asked_about(case, about("snow", ["c", "d", "e"], ["f", "g"]))

    assert joined.probes == (
        *case.probes,
        Probe(
            kind="locality",
            name="other_topic",
            prompt="What of snow?",
            expected=("c", "d", "f"),
        ),
    )
    assert asked_about(case, about("tea", ["x"], ["y"])) == case
