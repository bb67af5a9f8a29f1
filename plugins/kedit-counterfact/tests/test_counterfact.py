"""Every form of CounterFact becomes cases, and what is no case says why."""

import json
import shutil
from pathlib import Path

import pytest
from kedit_counterfact.dataset import CounterFact

from kedit_core import DataError, LeftOut
from kedit_core.records import checked
from kedit_core.testing.datasets import FAULTS, refuse_spoilt, rows_add_up

FILES = Path(__file__).parent / "files"


def asked(case, kind):
    return [(p.name, p.prompt, p.expected) for p in case.probes if p.kind == kind]


def first_of(name):
    return next(CounterFact().cases(FILES / name))


def spoilt_record(folder, change):
    """A file whose second record was changed, alone in its folder."""
    records = json.loads((FILES / "counterfact.json").read_text("utf-8"))[:2]
    change(records[1])
    file = folder / "counterfact.json"
    file.write_text(json.dumps(records), "utf-8")
    return file


def test_a_row_writes_the_false_target_in_place_of_the_true_one():
    case = first_of("counterfact.json")

    assert case.request.text == "Halden Bridge crosses the river"
    assert (case.request.subject, case.request.target_new) == ("Halden Bridge", "Glomma")
    assert case.request.ground_truth == ("Tista",)
    assert case.request.id == "7"
    assert (case.meta["relation_id"], case.meta["pararel_idx"]) == ("P177", 107)


def test_a_row_asks_paraphrases_neighbours_and_what_already_has_the_target():
    case = first_of("counterfact.json")

    assert asked(case, "rephrase") == [
        ("", "Rain fell all week.\n\nHalden Bridge leads over the", ("Glomma",)),
        ("", "He never wrote again. Halden Bridge spans the", ("Glomma",)),
    ]
    assert asked(case, "locality") == [  # the repeat counts twice, as published
        ("neighborhood", "Stone Arch crosses the river", ("Tista",)),
        ("neighborhood", "Mill Bridge crosses the river", ("Tista",)),
        ("neighborhood", "Stone Arch crosses the river", ("Tista",)),
    ]
    assert asked(case, "attribute") == [("", "Rope Bridge crosses the river", ("Glomma",))]


def test_a_text_is_begun_once_though_the_file_repeats_it():
    assert asked(first_of("counterfact.json"), "generation") == [
        ("", "Halden Bridge is best seen from", ()),
        ("", "Fishing below Halden Bridge,", ()),
    ]


def test_blanks_of_a_target_and_empty_questions_are_left_out():
    _, case, *_ = CounterFact().cases(FILES / "counterfact.json")

    assert case.request.target_new == "Danish"
    assert asked(case, "rephrase") == [("", "Mira Okon grew up speaking", ("Danish",))]


def test_rows_without_target_or_with_two_places_for_the_subject_are_left_out():
    found = list(CounterFact().cases(FILES / "counterfact.json"))

    empty, twice = (item for item in found if isinstance(item, LeftOut))
    assert (empty.line, empty.reason) == (4, "'requested_rewrite.target_new.str' is empty")
    assert twice.line == 5
    assert twice.reason.startswith("{} stands 2 times in the prompt")
    assert not empty.malformed
    assert not twice.malformed


def test_a_prompt_may_spell_the_subject_and_the_true_answer_may_be_unknown():
    *_, case = CounterFact().cases(FILES / "counterfact.json")

    assert case.request.text == "What Mira Okon speaks is"
    assert case.request.subject == "Mira Okon"
    assert case.request.ground_truth == ()
    assert asked(case, "locality")[0][2] == ()


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        (
            "one_hop.json",
            "portability",
            [
                (
                    "one_hop",
                    "At which town does the river that Halden Bridge crosses reach the sea?",
                    ("Fredrikstad",),
                )
            ],
        ),
        (
            "subject_replace.json",
            "portability",
            [("subject_replace", "The Old Bridge of Halden crosses the river", ("Glomma",))],
        ),
        (
            "other_attribution.json",
            "locality",
            [("other_attribution", "What is Halden Bridge made of?", ("stone",))],
        ),
        (
            "distracting_neighbor.json",
            "locality",
            [
                (
                    "distracting",
                    "Halden Bridge crosses the river Glomma. Stone Arch crosses the river",
                    ("Tista",),
                ),
                (
                    "distracting",
                    "Halden Bridge crosses the river Glomma. Mill Bridge crosses the river",
                    ("Tista",),
                ),
                ("other_attribution", "What is Halden Bridge made of?", ("stone",)),
            ],
        ),
    ],
)
def test_easyedits_files_ask_more(name, kind, expected):
    case = first_of(name)

    assert [item for item in asked(case, kind) if item[0] != "neighborhood"] == expected
    assert asked(case, "rephrase") == asked(first_of("counterfact.json"), "rephrase")


def test_distracting_neighbours_come_with_a_question_that_follows():
    assert [name for name, *_ in asked(first_of("distracting_neighbor.json"), "portability")] == [
        "one_hop"
    ]


@pytest.mark.parametrize("name", ["one_hop.json", "subject_replace.json"])
def test_a_question_without_answer_or_subject_is_left_out_alone(name):
    _, case = CounterFact().cases(FILES / name)

    assert asked(case, "portability") == []
    assert len(asked(case, "rephrase")) == 2


def test_the_flat_form_has_one_paraphrase_and_one_neighbour():
    case = first_of("flat.json")

    assert (case.request.text, case.request.subject) == (
        "Halden Bridge crosses the river",
        "Halden Bridge",
    )
    assert (case.request.target_new, case.request.ground_truth) == ("Glomma", ("Tista",))
    assert case.request.id == "7"
    assert asked(case, "rephrase") == [("", "Rain fell.\nHalden Bridge spans the", ("Glomma",))]
    assert asked(case, "locality") == [("neighborhood", "Stone Arch crosses the river", ("Tista",))]


def test_a_flat_row_lacks_a_target_a_subject_in_its_prompt_or_a_paraphrase():
    _, left, no_subject, no_paraphrase = CounterFact().cases(FILES / "flat.json")

    assert (left.line, left.reason) == (3, "'target_new' is empty")
    assert no_subject.request.subject is None
    assert no_subject.meta["subject"] == "Halden Bridge"
    assert asked(no_paraphrase, "rephrase") == []
    assert asked(no_paraphrase, "locality")[0][2] == ()


# -- reference texts -----------------------------------------------------------------------------


def test_texts_of_the_relation_and_the_new_target_are_the_references():
    first, second, *_ = CounterFact().cases(FILES / "counterfact.json")

    assert first.meta["references"] == [
        "Fossum Bridge is a bridge over the Glomma.",
        "The Rope Bridge hangs over the Glomma.",
    ]
    assert "references" not in second.meta


def test_texts_about_the_subject_itself_are_found_under_any_relation():
    first, second, *_ = CounterFact().cases(FILES / "counterfact.json")

    assert first.meta["essence"] == ["Halden Bridge takes a toll."]
    assert "essence" not in second.meta


def test_without_the_file_there_are_no_references(tmp_path):
    shutil.copy(FILES / "counterfact.json", tmp_path)

    case = next(CounterFact().cases(tmp_path / "counterfact.json"))

    assert "references" not in case.meta


def test_broken_references_are_refused_with_file_and_line(tmp_path):
    shutil.copy(FILES / "counterfact.json", tmp_path)
    shutil.copy(FILES / "flat.json", tmp_path)
    snippets = tmp_path / "attribute_snippets.json"
    snippets.write_text('[\n{"relation_id": "P1", "samples": []}]', "utf-8")

    message = r"attribute_snippets\.json, line 2: it lacks 'target_id'\.$"
    with pytest.raises(DataError, match=message):
        next(CounterFact().cases(tmp_path / "counterfact.json"))
    assert next(CounterFact().cases(tmp_path / "flat.json"))  # has no use for them


# -- broken files --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["counterfact.json", "flat.json"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_file_is_refused_in_one_sentence(fault, name, tmp_path):
    refuse_spoilt(CounterFact(), FILES / name, fault, tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("paraphrase_prompts", None),
        ("neighborhood_prompts", "one text"),
        ("generation_prompts", [1]),
        ("requested_rewrite", {"prompt": "{} is"}),
        ("case_id", "8"),
    ],
)
def test_a_row_with_another_type_is_malformed(key, value, tmp_path):
    file = spoilt_record(tmp_path, lambda record: record.update({key: value}))

    with pytest.raises(
        DataError, match=r"counterfact\.json, line 1: .*'(requested|.*_prompts|case)"
    ):
        list(checked(CounterFact().cases(file)))


def test_a_later_row_without_what_the_first_one_has_is_malformed(tmp_path):
    file = tmp_path / "one_hop.json"
    first, second = json.loads((FILES / "one_hop.json").read_text("utf-8"))
    del second["portability"]
    file.write_text(json.dumps([first, second]), "utf-8")

    _, left = CounterFact().cases(file)

    assert left.malformed
    assert left.reason == "it lacks 'portability'"


def test_another_dataset_is_refused_with_what_is_missing(tmp_path):
    other = tmp_path / "other.json"
    other.write_text('[{"case_id": 1, "requested_rewrite": [], "questions": [], "answer": "a"}]')

    with pytest.raises(DataError, match=r"line 1: no known format.*lacks 'attribute_prompts'"):
        list(CounterFact().cases(other))


# -- the public files ----------------------------------------------------------------------------

PUBLIC = {  # cases, and probes of each kind
    "counterfact/counterfact.json": (892, {"rephrase": 1784, "neighborhood": 8920}),
    "counterfact/counterfact-edit.json": (3000, {"rephrase": 3000, "neighborhood": 3000}),
    "counterfact/counterfact-train.json": (1000, {"rephrase": 1000, "neighborhood": 1000}),
    "counterfact/counterfact-val.json": (300, {"rephrase": 300, "neighborhood": 300}),
    "portability/counterfact_portability_gpt4.json": (300, {"one_hop": 300}),
    "portability/counterfact_subject_replace.json": (171, {"subject_replace": 171}),
    "locality/counterfact_distracting_neighbor.json": (
        250,
        {"distracting": 2500, "other_attribution": 250, "one_hop": 250},
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_files_are_read_whole(name, benchmark_data):
    cases, left = rows_add_up(CounterFact(), benchmark_data / name)

    count, probes = PUBLIC[name]
    assert (len(cases), left) == (count, [])
    assert all(case.request.subject for case in cases)
    names = [p.name or p.kind for case in cases for p in case.probes]
    assert {found: names.count(found) for found in probes} == probes


def test_the_public_prompts_are_begun_two_or_three_times(benchmark_data):
    cases, _ = rows_add_up(CounterFact(), benchmark_data / "counterfact/counterfact.json")

    counts = [len(asked(case, "generation")) for case in cases]
    assert (counts.count(3), counts.count(2)) == (837, 55)
