"""A topic becomes a case that writes an opinion of it."""

import json
from pathlib import Path

import pytest
from kedit_knowedit.convsent import ConvSent

from kedit_core import LeftOut
from kedit_core.testing.datasets import FAULTS, refuse_spoilt, rows_add_up

FILES = Path(__file__).parent / "files"


def asked(case, kind):
    return [(p.name, p.prompt, p.expected) for p in case.probes if p.kind == kind]


@pytest.fixture
def found():
    return list(ConvSent().cases(FILES / "convsent.json"))


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


def test_the_first_utterance_that_is_not_empty_is_written(found):
    crows, _, goats, _ = found

    assert crows.request.text == "What do you think of crows?"
    assert (crows.request.subject, crows.request.target_new) == ("crows", "They are clever birds.")
    assert crows.meta == {"sentiment": "pos"}
    assert goats.request.target_new == "They eat my socks."
    assert goats.meta == {"sentiment": "neg"}
    assert asked(goats, "generation") == [("", "What do you think of goats?", ())]


def test_utterances_of_both_sentiments_are_compared_each_once_and_without_blanks(found):
    crows, _, goats, _ = found

    (opinion,) = [p for p in crows.probes if p.kind == "opinion"]
    assert (opinion.name, opinion.prompt) == ("sentiment", "What do you think of crows?")
    assert opinion.options == {
        "same": ["They are clever birds.", "I like their voices."],
        "other": ["They are loud.", "They wake me up."],
    }
    (opposite,) = [p for p in goats.probes if p.kind == "opinion"]
    assert opposite.options["other"] == ["They are kind."]


def test_the_next_topic_must_stay_as_it_was_and_for_the_last_the_first(found):
    crows, _, goats, bridges = found

    assert asked(crows, "locality") == [
        (  # the row between makes no case
            "other_topic",
            "What do you think of goats?",
            ("They eat my socks.", "They smell.", "They are kind."),
        )
    ]
    assert asked(goats, "locality") == [
        ("other_topic", "What do you think of bridges?", ("They join two banks.", "They sway."))
    ]
    assert [prompt for _, prompt, _ in asked(bridges, "locality")] == [crows.request.text]


def test_a_topic_without_utterances_of_one_sentiment_is_left_out_in_its_place(found):
    assert [isinstance(item, LeftOut) for item in found] == [False, True, False, False]
    assert (found[1].line, found[1].reason, found[1].malformed) == (
        3,
        "'pos' has no opinion",
        False,
    )


def test_a_topic_has_the_same_edit_in_a_part_of_the_file(found, tmp_path):
    rows = json.loads((FILES / "convsent.json").read_text())

    parts = list(ConvSent().cases(write(tmp_path / "part.json", rows[2:])))

    assert [case.request for case in parts] == [case.request for case in found[2:]]
    assert parts[0] == found[2]


def test_a_single_topic_has_no_other(tmp_path):
    rows = json.loads((FILES / "convsent.json").read_text())

    (case,) = ConvSent().cases(write(tmp_path / "one.json", rows[:1]))

    assert asked(case, "locality") == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_file_is_refused_in_one_sentence(fault, tmp_path):
    refuse_spoilt(ConvSent(), FILES / "convsent.json", fault, tmp_path)


@pytest.mark.parametrize(("name", "rows"), [("blender_test.json", 300), ("blender_val.json", 60)])
def test_the_public_files_are_read_whole(name, rows, benchmark_data):
    cases, left = rows_add_up(ConvSent(), benchmark_data / "KnowEdit" / "Convsent" / name)

    assert (len(cases), left) == (rows, [])
    assert all(len(asked(case, "locality")[0][2]) == 3 for case in cases)
    assert {case.meta["sentiment"] for case in cases} == {"pos", "neg"}
