"""A question becomes a case that forgets its answer."""

from collections import Counter
from pathlib import Path

import pytest
from kedit_knowedit.sanitation import Sanitation

from kedit_core import LeftOut
from kedit_core.testing.datasets import FAULTS, refuse_spoilt, rows_add_up

FILES = Path(__file__).parent / "files"


def asked(case):
    return [(p.kind, p.name, p.prompt, p.expected) for p in case.probes]


def test_a_question_writes_that_it_is_not_known():
    first, *_ = Sanitation().cases(FILES / "sanitation_test.json")

    assert first.request.text == "Which town has the Halden Bridge?"
    assert (first.request.subject, first.request.target_new) == (None, "I don't know.")
    assert first.request.ground_truth == ("Halden",)


def test_an_answer_is_reported_in_one_group_however_it_is_spelled():
    first, second, *_ = Sanitation().cases(FILES / "sanitation_test.json")

    assert first.meta == second.meta == {"group": "halden"}
    assert second.request.ground_truth == ("HALDEN",)


def test_quotes_of_a_csv_writer_are_undone():
    _, second, *_ = Sanitation().cases(FILES / "sanitation_test.json")

    assert second.request.text == 'In which town does "The Crow" take place?'
    assert asked(second)[0] == (
        "locality",
        "retained",
        'What is the "blue" bird called?',
        ('"Azure"',),
    )


def test_quotes_of_the_question_itself_stay():
    *_, last = Sanitation().cases(FILES / "sanitation_test.json")

    assert last.request.text == '"Kestrel" or "Tern": which is a town?'


def test_retained_questions_are_dealt_out_in_order_each_once():
    found = list(Sanitation().cases(FILES / "sanitation_test.json"))

    assert [[p.prompt for p in case.probes] for case in found if not isinstance(case, LeftOut)] == [
        ["Who wrote the song of the wandering crow?"],
        ['What is the "blue" bird called?'],
        ["How many moons has Mars?", "Who painted the tern?"],
    ]


def test_an_empty_question_is_left_out_alone():
    found = list(Sanitation().cases(FILES / "sanitation_test.json"))

    (left,) = [item for item in found if isinstance(item, LeftOut)]
    assert found[2] is left
    assert (left.reason, left.malformed) == ("'success.2.question' is empty", False)


def test_the_training_file_has_subjects_and_may_have_fewer_questions_to_retain():
    first, second = Sanitation().cases(FILES / "sanitation_train.json")

    assert first.request.subject == "the Halden Bridge"
    assert asked(first) == []
    assert asked(second) == [("locality", "retained", "What do goats eat?", ("socks",))]


@pytest.mark.parametrize("name", ["sanitation_test.json", "sanitation_train.json"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_file_is_refused_in_one_sentence(name, fault, tmp_path):
    refuse_spoilt(Sanitation(), FILES / name, fault, tmp_path)


@pytest.mark.parametrize(
    ("name", "questions", "retained"),
    [("trivia_qa_test.json", 65, 369), ("trivia_qa_train.json", 61, 362)],
)
def test_the_public_files_are_read_whole(name, questions, retained, benchmark_data):
    cases, left = rows_add_up(
        Sanitation(), benchmark_data / "KnowEdit" / "Sanitation" / name, cases_per_row=None
    )
    prompts = [case.request.text for case in cases]
    probes = [probe.prompt for case in cases for probe in case.probes]

    assert (len(cases), left) == (questions, [])
    assert len(probes) == len(set(probes)) == retained
    assert {len(case.probes) for case in cases} == {5, 6}
    assert len(Counter(case.meta["group"] for case in cases)) == 5
    assert not any('""' in text for text in prompts + probes)
    assert all(case.request.subject for case in cases) == (name == "trivia_qa_train.json")
