"""CHED's rows become cases, and an edit succeeds where only the new answer is written."""

from pathlib import Path

import pytest
from kedit_core_edit.dataset import Ched
from kedit_core_edit.metric import EditingSuccess

from kedit_core import LeftOut, SettingError
from kedit_core.ask import Continue, Text
from kedit_core.testing.datasets import FAULTS, refuse_spoilt, rows_add_up

FILE = Path(__file__).parent / "files" / "CHED.json"


def asked(case, kind):
    return [(p.name, p.prompt, p.expected) for p in case.probes if p.kind == kind]


@pytest.fixture
def found():
    return list(Ched().cases(FILE))


def test_a_row_writes_the_edited_knowledge_over_the_fact(found):
    request = found[0].request

    assert (request.text, request.subject) == ("Halden Bridge, built by", "Halden Bridge")
    assert (request.target_new, request.ground_truth) == ("Vantec", ("Orlo",))
    assert (request.id, found[0].meta) == ("3", {"relation_id": "P176"})
    assert asked(found[0], "rephrase") == [
        ("", "He came home late. Halden Bridge was made by", ("Vantec",))
    ]
    assert asked(found[0], "locality") == [("neighborhood", "Vale Arch, built by", ("Orlo",))]


def test_each_sentence_stands_before_the_prompt(found):
    assert asked(found[0], "context") == [
        ("sbj_hop", "The mill makes good steel. Halden Bridge, built by", ("Vantec",)),
        ("sbj_hop", "They walk along the river. Halden Bridge, built by", ("Vantec",)),
        ("obj_old_hop", "The harbour has tall cranes. Halden Bridge, built by", ("Vantec",)),
        ("sbj", "Halden Bridge is long. Halden Bridge, built by", ("Vantec",)),
        ("obj_old", "Orlo has many workers. Halden Bridge, built by", ("Vantec",)),
        ("obj_new", "Vantec is known everywhere. Halden Bridge, built by", ("Vantec",)),
    ]


def test_a_row_may_lack_kinds_of_sentences_and_prompts(found):
    assert [name for name, _, _ in asked(found[1], "context")] == ["sbj_hop", "obj_new_hop"]
    assert {probe.kind for probe in found[1].probes} == {"context"}


def test_a_row_without_a_former_answer_is_left_out_with_its_line(found):
    (left,) = [item for item in found if isinstance(item, LeftOut)]

    assert (left.line, left.reason) == (22, "'fact_knowledge' is empty")


def test_every_row_makes_one_case_or_none():
    cases, left = rows_add_up(Ched(), FILE)

    assert (len(cases), len(left)) == (2, 1)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_file_is_refused_in_one_sentence(fault, tmp_path):
    refuse_spoilt(Ched(), FILE, fault, tmp_path)


def scores(case, text_after, **settings):
    metric = EditingSuccess(**settings)
    answers = {q: Text(q.prompt, text_after(q.prompt), ()) for q in metric.questions(case)}
    return metric.score(case, {}, answers)


def test_only_a_text_with_the_new_and_without_the_old_answer_succeeds(found):
    written = {
        "The mill makes good steel. Halden Bridge, built by": " VANTEC in 1960.",
        "They walk along the river. Halden Bridge, built by": " Vantec and Orlo.",
        "Halden Bridge, built by": " the Orlova brothers of Vantec.",
        "Vantec is known everywhere. Halden Bridge, built by": " Vantecs.",
    }

    found_scores = scores(found[0], lambda prompt: written.get(prompt, " nobody knows."))

    values = {part: (score.value, score.probes) for part, score in found_scores.items()}
    assert values == {
        "rewrite": (1.0, 1),
        "rephrase": (0.0, 1),
        "sbj_hop": (0.5, 2),
        "obj_old_hop": (0.0, 1),
        "sbj": (0.0, 1),
        "obj_old": (0.0, 1),
        "obj_new": (0.0, 1),
        "": (1.5 / 7, 8),
    }


def test_a_case_that_could_not_succeed_has_no_score(found):
    request = found[0].request
    impossible = request.model_copy(update={"target_new": "Vantec Orlo"})
    unknown = request.model_copy(update={"ground_truth": ()})

    for other in (impossible, unknown):
        case = found[0].model_copy(update={"requests": (other,), "probes": ()})
        assert scores(case, lambda prompt: " Vantec Orlo") == {}


def test_the_length_of_the_text_is_a_setting(found):
    assert {q.new_tokens for q in EditingSuccess(new_tokens=7).questions(found[0])} == {7}
    assert Continue("Mira Sund speaks", 50) in list(EditingSuccess().questions(found[1]))
    with pytest.raises(SettingError, match="new_tokens must be a whole number"):
        EditingSuccess(new_tokens=0)
