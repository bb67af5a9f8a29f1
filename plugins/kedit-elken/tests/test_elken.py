"""An event becomes the facts that it changes, or a text to write."""

from pathlib import Path

import pytest
from kedit_elken.dataset import Elken

from kedit_core import DataError, EditCase, LeftOut
from kedit_core.testing.datasets import FAULTS, refuse_spoilt, rows_add_up

FILES = Path(__file__).parent / "files"
EVENT = "Halden Bank was bought by Tista Tea in 2031."
TEA = "How may the price of tea change?\n(A) Rise (B) Fall (C) Stay"
MOONS = "How may the number of moons change?\n(A) Rise   (B) Fall   (C) No change"


def asked(case, kind):
    return [(p.name, p.prompt, p.expected) for p in case.probes if p.kind == kind]


def test_each_fact_with_a_known_answer_is_a_request():
    first, *_ = Elken().cases(FILES / "elken.json")

    assert [(r.text, r.subject, r.target_new) for r in first.requests] == [
        ("Who owns Halden Bank?", "Halden Bank", "Tista Tea"),
        ("When did Tista Tea buy Halden Bank?", "Tista Tea", "2031"),
    ]
    assert first.meta == {
        "event": EVENT,
        "event_type": "acquire",
        "relations": ["P127", "acquire-time"],
    }


def test_tendencies_follow_from_the_facts_and_local_questions_do_not():
    first, *_ = Elken().cases(FILES / "elken.json")

    assert asked(first, "portability") == [("tendency", TEA, ("A", "(A)"))]
    assert asked(first, "locality") == [
        ("fact", "In which country is Tista Tea?", ("Norway", "Kingdom of Norway")),
        ("tendency", MOONS, ("C", "(C)")),
    ]


def test_the_event_itself_can_be_written_and_its_facts_asked():
    first, *_ = Elken(writes_event=True).cases(FILES / "elken.json")

    assert first.request.text == "Event:"
    assert (first.request.subject, first.request.target_new) == (None, EVENT)
    assert asked(first, "portability") == [
        ("fact", "Who owns Halden Bank?", ("Tista Tea", "Tista")),
        ("fact", "When did Tista Tea buy Halden Bank?", ("2031",)),
        ("tendency", TEA, ("A", "(A)")),
    ]
    assert len(asked(first, "locality")) == 2


def test_rows_without_a_fact_to_write_are_left_out_with_their_line():
    _, *left = Elken().cases(FILES / "elken.json")

    assert [(item.line, item.reason, item.malformed) for item in left] == [
        (3, "it has no fact with a known answer", False),
        (4, "it has no fact with a known answer", False),
        (5, "'event' is empty", False),
    ]


def test_an_event_without_facts_can_be_written_and_empty_questions_are_not_asked():
    _, second, third, left = Elken(writes_event=True).cases(FILES / "elken.json")

    assert [p.prompt for p in second.probes] == [
        "How may the wind change?\n(A) Rise (B) Fall (C) Stay"
    ]
    assert third.probes == ()
    assert isinstance(left, LeftOut)


@pytest.mark.parametrize("writes_event", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_file_is_refused_in_one_sentence(writes_event, fault, tmp_path):
    refuse_spoilt(Elken(writes_event), FILES / "elken.json", fault, tmp_path)


def test_another_dataset_is_refused_with_what_is_missing(tmp_path):
    other = tmp_path / "other.json"
    other.write_text('[{"event": "a", "event_type": "b", "fact": {}}]')

    with pytest.raises(DataError, match=r"line 1: no known format.*lacks 'tendency'"):
        list(Elken().cases(other))


PUBLIC = {"train.json": (4, 205), "test.json": (0, 110)}  # rows with facts to write, and without


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_files_are_read_whole(name, benchmark_data):
    facts, none = PUBLIC[name]

    cases, left = rows_add_up(Elken(), benchmark_data / "ELKEN" / name)
    events, left_of_events = rows_add_up(Elken(writes_event=True), benchmark_data / "ELKEN" / name)

    assert len(cases) == facts
    assert [item.reason for item in left] == ["it has no fact with a known answer"] * none
    assert (len(events), left_of_events) == (facts + none, [])
    assert all(isinstance(case, EditCase) and case.probes for case in events)
