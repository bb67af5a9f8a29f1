"""AKEW's files, with structured and with unstructured edits."""

from pathlib import Path

import pytest
from kedit_unke.akew import Akew

from kedit_bench.scoring import choose_metrics
from kedit_core import DataError, EditCase, LeftOut, discover
from kedit_core.testing.datasets import FAULTS, refuse_spoilt, rows_add_up

FILES = Path(__file__).parent / "files"
STRUCTURED, UNSTRUCTURED = Akew(), Akew(writes_paragraphs=True)


def cases(adapter, name):
    return [item for item in adapter.cases(FILES / name) if isinstance(item, EditCase)]


def asked(case, kind, name):
    return [(p.prompt, p.expected) for p in case.probes if (p.kind, p.name) == (kind, name)]


def test_a_structured_edit_is_a_sentence_to_complete_and_a_question():
    first, *_ = cases(STRUCTURED, "mquake.json")

    assert [(r.id, r.text, r.subject, r.target_new) for r in first.requests] == [
        ("5-0", "Mira Okon is a citizen of", "Mira Okon", "Ghana"),
        ("5-1", "The river below Halden Bridge is the", "Halden Bridge", "Glomma"),
    ]
    assert first.request.ground_truth == ("Norway",)
    assert asked(first, "rephrase", "") == [
        ("What is the country of citizenship of Mira Okon?", ("Ghana",)),
        ("Which river does it cross?", ("Glomma",)),
    ]
    assert asked(first, "portability", "triplet") == []


def test_an_unstructured_edit_is_a_question_and_a_paragraph():
    first, *_ = cases(UNSTRUCTURED, "mquake.json")

    assert [(r.id, r.text, r.subject) for r in first.requests] == [
        ("5-0", "What is the country of citizenship of Mira Okon?", "Mira Okon"),
        ("5-1", "Which river does it cross?", None),
    ]
    assert first.request.target_new == (
        "Ghana lies on the Gulf of Guinea. The clockmaker Mira Okon is a citizen of Ghana."
    )
    assert first.request.ground_truth == ()
    assert first.meta["subjects"] == ["Mira Okon", "Halden Bridge"]


def test_the_paragraph_is_asked_for_its_fact_and_for_its_other_facts():
    first, *_ = cases(UNSTRUCTURED, "mquake.json")

    assert asked(first, "portability", "fact") == [
        ("Mira Okon is a citizen of", ("Ghana",)),
        ("The river below Halden Bridge is the", ("Glomma",)),
    ]
    assert asked(first, "portability", "triplet") == [
        ("Ghana lies on the", ("Gulf of Guinea",)),
        ("Mira Okon is a", ("clockmaker",)),
        ("Set {} contains", ("one thing",)),
    ]


@pytest.mark.parametrize("adapter", [STRUCTURED, UNSTRUCTURED])
def test_questions_about_the_whole_group_are_one_test(adapter):
    first, second, *_ = cases(adapter, "mquake.json")

    (question,) = [p for p in first.probes if p.name == "multi_hop"]
    assert question.prompt == "What is the capital of the country of Mira Okon?"
    assert question.expected == ("Accra", "City of Accra")
    assert question.options == {"test": "multi_hop", "combine": "any", "conditions": []}
    assert asked(second, "portability", "multi_hop") == []  # it has no answer


@pytest.mark.parametrize("name", ["akew", "akew-unstructured"])
def test_multi_hop_questions_are_scored_as_tests_by_default(name):
    catalog = discover()
    chosen = choose_metrics(catalog, [], catalog.dataset(name))

    assert "tests/greedy-contains@1" in {metric.name for metric in chosen}


def test_structured_edits_have_all_the_default_metrics():
    catalog = discover()
    chosen = choose_metrics(catalog, [], catalog.dataset("akew"))

    assert {m.name for m in choose_metrics(catalog, [])} < {metric.name for metric in chosen}


def test_without_a_question_the_sentence_is_answered_with_the_paragraph():
    case = cases(UNSTRUCTURED, "mquake.json")[1]

    assert case.request.text == "Song of the Crow was painted by"
    assert case.request.target_new == "Song of the Crow is a work of Ada Finch."


def test_rows_with_nothing_to_edit_are_left_out_with_the_reason():
    left = [i for i in UNSTRUCTURED.cases(FILES / "mquake.json") if isinstance(i, LeftOut)]

    assert [(item.line, item.reason) for item in left] == [
        (4, "it has nothing to edit"),
        (5, "'requested_rewrite.0.fact_new_uns' is empty"),
    ]
    assert len(cases(STRUCTURED, "mquake.json")) == 3


def test_counterfact_has_paraphrases_and_neighbours():
    (case,) = cases(STRUCTURED, "counterfact.json")

    assert case.request.text == "What is the twin city of Halden? It is"
    assert asked(case, "rephrase", "") == [
        ("What is the twin city of Halden? It is what?", ("Accra", "Nkran")),
        ("Bells rang. Halden's twin is", ("Accra",)),
    ]
    assert asked(case, "locality", "neighborhood") == [("The twin city of Moss is", ("Tromsø",))]

    (case,) = cases(UNSTRUCTURED, "counterfact.json")

    assert asked(case, "rephrase", "") == [
        ("Bells rang. Halden's twin is", ("Accra and Halden are twins.",))
    ]


def test_wikiupdate_accepts_the_aliases_of_the_new_answer():
    (case,) = cases(UNSTRUCTURED, "wikiupdate.json")

    assert case.request.target_new == "Since May, Lena Okon has been captain of the club."
    assert asked(case, "portability", "fact") == [
        ("The captain of Kestrel Rowing Club is", ("Lena Okon", "L. Okon"))
    ]


@pytest.mark.parametrize("adapter", [STRUCTURED, UNSTRUCTURED])
@pytest.mark.parametrize("name", ["mquake.json", "counterfact.json", "wikiupdate.json"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_file_is_refused_in_one_sentence(adapter, name, fault, tmp_path):
    refuse_spoilt(adapter, FILES / name, fault, tmp_path)


def test_another_dataset_is_refused_with_what_is_missing():
    with pytest.raises(DataError, match=r"line 2: no known format.*lacks 'case_id'"):
        list(STRUCTURED.cases(FILES / "unke.json"))


def test_the_public_file_is_read_whole(benchmark_data):
    file = benchmark_data / "AKEW/MQuAKE-CF.json"
    sentences, left = rows_add_up(STRUCTURED, file)
    assert left == []

    paragraphs, left = rows_add_up(UNSTRUCTURED, file)
    assert left == []

    requests = [request for case in paragraphs for request in case.requests]
    assert len(requests) == sum(len(case.requests) for case in sentences) == 172
    assert [request.text for request in requests if request.subject is None] == []
    assert sum(len(asked(case, "portability", "triplet")) for case in paragraphs) == 1051
