"""A user's own file becomes cases, whatever its columns are called."""

import json
import logging
from pathlib import Path

import pytest
from kedit_jsonl.dataset import Jsonl

from kedit_core import DataError, LeftOut
from kedit_core.records import checked
from kedit_core.testing.datasets import FAULTS, refuse_spoilt, rows_add_up

FILES = Path(__file__).parent / "files"
OWN = {
    "id": "no",
    "prompt": "question",
    "subject": "about",
    "target_new": "answer",
    "ground_truth": "former",
    "rephrase": "other words",
    "locality": "near",
    "locality_answer": "near answer",
}


def asked(case, kind):
    return [(p.prompt, p.expected) for p in case.probes if p.kind == kind]


def only_case(folder, **record):
    """What a file with one record makes."""
    file = folder / "own.jsonl"
    file.write_text(json.dumps({"prompt": "a b is", "target_new": "c"} | record), "utf-8")
    (found,) = checked(Jsonl().cases(file))
    return found


def test_a_record_with_every_column():
    case = next(Jsonl().cases(FILES / "edits.jsonl"))

    assert case.request.id == "17"
    assert case.request.text == "Which river does Halden Bridge cross?"
    assert (case.request.subject, case.request.target_new) == ("Halden Bridge", "Glomma")
    assert case.request.ground_truth == ("Tista", "Tista river")
    assert asked(case, "rephrase") == [
        ("Halden Bridge crosses which river?", ("Glomma",)),
        ("What flows under Halden Bridge?", ("Glomma",)),
    ]
    assert asked(case, "locality") == [
        ("Which river does Stone Arch cross?", ("Tista",)),
        ("Who built Stone Arch?", ("Ada Finch", "A. Finch")),
    ]
    assert asked(case, "portability") == [
        (
            "At which town does the river under Halden Bridge end?",
            ("Fredrikstad", "Fredrikstad, Norway"),
        )
    ]
    assert case.meta == {"subject": "Halden Bridge"}


def test_one_text_may_stand_for_a_list_and_a_slot_for_the_subject():
    _, case, *_ = Jsonl().cases(FILES / "edits.jsonl")

    assert case.request.id == "mira"
    assert case.request.text == "Mira Okon lives in"
    assert case.request.ground_truth == ("Lagos",)
    assert asked(case, "rephrase") == [("The home of Mira Okon is in", ("Accra",))]


def test_only_a_question_that_follows_needs_an_answer():
    _, case, *_ = Jsonl().cases(FILES / "edits.jsonl")

    assert asked(case, "locality") == [("Lena Okon lives in", ())]
    assert asked(case, "portability") == [("Mira Okon lives in the country", ("Ghana",))]


def test_prompt_and_target_are_enough():
    *_, case, _, _ = Jsonl().cases(FILES / "edits.jsonl")

    assert (case.request.subject, case.probes, case.meta) == (None, (), {})
    assert len(case.request.id) == 12  # a hash


def test_records_without_target_or_with_two_slots_are_left_out():
    _, left = rows_add_up(Jsonl(), FILES / "edits.jsonl")

    assert [item.line for item in left] == [4, 5]
    assert left[0].reason == "'target_new' is empty"
    assert left[1].reason.startswith("{} stands 2 times in the prompt")


def test_a_list_of_records_is_read_too():
    cases, _ = rows_add_up(Jsonl(), FILES / "edits.json")

    assert [case.request.target_new for case in cases] == ["Glomma", "Crow Tower"]


def test_a_table_with_columns_of_its_own():
    cases, left = rows_add_up(Jsonl(**OWN), FILES / "edits.csv")
    first, second, third = cases

    assert left == []
    assert first.request.text == 'Which river does "Halden Bridge" cross?'
    assert (first.request.id, first.request.subject) == ("1", "Halden Bridge")
    assert (first.request.target_new, first.request.ground_truth) == ("Glomma", ("Tista",))
    assert asked(first, "rephrase") == []
    assert asked(first, "locality") == [("Who built Stone Arch, the bridge?", ("Ada Finch",))]
    assert asked(second, "rephrase") == [("Mira Okon lives where?", ("Accra",))]
    assert asked(second, "locality") == []
    assert asked(third, "locality") == [("Where is Moss?", ())]


def test_a_subject_that_is_not_in_the_prompt_is_kept_beside_it(tmp_path):
    case = only_case(tmp_path, subject="Mira Okon")

    assert case.request.subject is None
    assert case.meta == {"subject": "Mira Okon"}


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"prompt": "qestion"}, r"line 2: .*lacks 'qestion'\. Did you mean 'question'\?$"),
        ({"rephrase": "rephrase"}, r"line 2: .*lacks 'rephrase'\."),  # named, so it must exist
        ({"target_new": "goal"}, r"line 2: .*lacks 'goal'\. The file has: about, answer, former,"),
    ],
)
def test_a_column_that_is_not_there_is_refused_with_the_nearest(named, message):
    with pytest.raises(DataError, match=message):
        list(Jsonl(**(OWN | named)).cases(FILES / "edits.csv"))


@pytest.mark.parametrize("column", [False, 2024, ""])  # as `no` and 2024 are read without quotes
def test_the_name_of_a_column_is_a_text(column):
    with pytest.raises(TypeError, match="id is the name of a column in quotes, not"):
        Jsonl(id=column)


def test_a_column_that_was_not_named_may_be_missing():
    named = {"prompt": "question", "target_new": "answer"}
    case = next(Jsonl(**named).cases(FILES / "edits.csv"))

    assert (case.request.subject, case.probes) == (None, ())


def test_columns_that_are_not_read_are_told_once(tmp_path, caplog):
    file = tmp_path / "own.jsonl"
    record = {"question": "a", "target_new": "b", "rephrse": "c", "prompt": "d", "zzz": 1}
    file.write_text(f"{json.dumps(record)}\n" * 2 + json.dumps(record | {"localty": "e"}), "utf-8")

    with caplog.at_level(logging.WARNING):
        assert len(list(Jsonl(prompt="question").cases(file))) == 3

    assert [record.getMessage() for record in caplog.records] == [
        f"{file}, line 1: columns that are not read: 'rephrse' (did you mean 'rephrase'?), "
        f"'prompt', 'zzz'.",
        f"{file}, line 3: columns that are not read: 'localty' (did you mean 'locality'?).",
    ]


def test_where_every_column_is_read_nothing_is_told(tmp_path, caplog):
    only_case(tmp_path, rephrase=["d"], id="x")

    assert not caplog.records


def test_a_later_record_without_a_named_column_is_malformed(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text(
        '{"prompt": "a", "target_new": "b", "also": "c"}\n{"prompt": "a", "target_new": "b"}\n',
        "utf-8",
    )

    _, left = Jsonl(rephrase="also").cases(file)
    assert isinstance(left, LeftOut)
    assert (left.line, left.reason, left.malformed) == (2, "it lacks 'also'", True)

    _, case = Jsonl().cases(file)
    assert case.probes == ()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": 7}, "line 1: 'prompt' is 7, not a text"),
        ({"target_new": None}, "line 1: 'target_new' is null, not a text"),
        ({"subject": ["a"]}, "line 1: 'subject' is"),
        ({"id": 1.5}, "line 1: 'id' is 1.5, not a text"),
        ({"id": True}, "line 1: 'id' is true, not a whole number"),
        ({"rephrase": [1]}, "line 1: 'rephrase' holds 1 among its answers"),
        ({"locality": 0}, "line 1: 'locality' is 0, not a text"),
        (
            {"locality": ["d"], "locality_answer": "e"},
            "'locality' is a list, but",
        ),
        (
            {"locality": ["d"], "locality_answer": []},
            "'locality' is a list, but",
        ),
        ({"portability": "d"}, "line 1: it has 'portability', but lacks 'portability_answer'"),
    ],
)
def test_a_malformed_record_is_refused_with_its_line(record, message, tmp_path):
    with pytest.raises(DataError, match=message):
        only_case(tmp_path, **record)


@pytest.mark.parametrize("name", ["edits.jsonl", "edits.json"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_file_is_refused_in_one_sentence(fault, name, tmp_path):
    refuse_spoilt(Jsonl(), FILES / name, fault, tmp_path)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "wrong types"])
def test_a_spoilt_table_is_refused_in_one_sentence(fault, tmp_path):
    refuse_spoilt(Jsonl(**OWN), FILES / "edits.csv", fault, tmp_path)


PUBLIC = {
    "counterfact/counterfact-val.json": (
        {
            "rephrase": "rephrase_prompt",
            "locality": "locality_prompt",
            "locality_answer": "locality_ground_truth",
            "id": "case_id",
        },
        300,
    ),
    "HalluEditBench/llama_2_7b_chat_hf/health_medication.csv": (
        {"prompt": "question", "target_new": "object", "rephrase": "paraphrased_question"},
        21,
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_files_are_read_by_their_columns(name, benchmark_data):
    named, count = PUBLIC[name]
    cases, left = rows_add_up(Jsonl(**named), benchmark_data / name)

    assert (len(cases), left) == (count, [])
    assert all(len(asked(case, "rephrase")) == 1 for case in cases)
