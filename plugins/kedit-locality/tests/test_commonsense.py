"""PIQA's records become probes, with their labels where there are any."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from kedit_locality.commonsense import Commonsense

from kedit_core import DataError, LeftOut, ProbeSource
from kedit_core.records import checked, read_rows
from kedit_core.testing.datasets import FAULTS, refuse_spoilt

FILES = Path(__file__).parent / "files"


@pytest.fixture
def unlabelled(tmp_path):
    """The records alone."""
    return Path(shutil.copy(FILES / "piqa.jsonl", tmp_path))


def test_a_goal_is_asked_with_its_two_ways(unlabelled):
    first, *_ = Commonsense().probes(unlabelled)

    assert (first.kind, first.name) == ("locality", "commonsense")
    assert first.prompt == "How do I dry wet boots?"
    assert first.expected == ()  # which of them is right is not known
    assert first.options == {"ways": ["Stuff them with newspaper.", "Stuff them with wet clay."]}


def test_labels_beside_the_file_say_which_way_is_right():
    found = list(Commonsense().probes(FILES / "piqa.jsonl"))

    answers = [(p.expected, p.options) for p in found if not isinstance(p, LeftOut)]
    assert answers == [  # the labels of what is left out are passed over
        (("Stuff them with newspaper.",), {"other": "Stuff them with wet clay."}),
        (("put it into a box.",), {"other": "leave it in the rain."}),
        (("Heat it in a pot.",), {"other": "Cool it in a pot."}),
    ]


def test_records_without_two_different_ways_are_left_out(unlabelled):
    found = list(Commonsense().probes(unlabelled))

    left = [item for item in found if isinstance(item, LeftOut)]
    assert [(item.line, item.reason, item.malformed) for item in left] == [
        (3, "'sol1' is empty", False),
        (4, "both ways are the same", False),
    ]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("0\n1\n1\n0\n", r"-labels\.lst has no label for the record in line 5 of .*piqa\.jsonl\.$"),
        ("0\n1\n1\n0\n0\n1\n", r"-labels\.lst has more labels than .*piqa\.jsonl has records\.$"),
        ("0\n1\ntrue\n0\n0\n", r"-labels\.lst, line 3: a label is 0 or 1, not 'true'\.$"),
        ("", r"-labels\.lst has no label for the record in line 1 of .*piqa\.jsonl\.$"),
    ],
)
def test_labels_of_another_file_are_refused(labels, message, unlabelled):
    unlabelled.with_name("piqa-labels.lst").write_text(labels)

    with pytest.raises(DataError, match=message):
        list(Commonsense().probes(unlabelled))


def test_the_first_records_can_be_taken_alone():
    probes = Commonsense().probes(FILES / "piqa.jsonl")

    assert [len(next(probes).expected), len(next(probes).expected)] == [1, 1]


def test_it_is_a_source_of_probes():
    assert isinstance(Commonsense(), ProbeSource)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_file_is_refused_in_one_sentence(fault, tmp_path):
    adapter = SimpleNamespace(cases=Commonsense().probes)

    refuse_spoilt(adapter, FILES / "piqa.jsonl", fault, tmp_path)


def test_a_later_record_without_a_way_is_malformed(tmp_path):
    file = tmp_path / "piqa.jsonl"
    file.write_text(
        '{"goal": "a", "sol1": "b", "sol2": "c"}\n{"goal": "a", "sol1": "b"}\n', "utf-8"
    )

    with pytest.raises(DataError, match=r"piqa\.jsonl, line 2: it lacks 'sol2'"):
        list(checked(Commonsense().probes(file)))


def test_the_public_file_is_read_whole(benchmark_data):
    file = benchmark_data / "locality/piqa_valid.jsonl"
    probes = list(Commonsense().probes(file))

    assert len(probes) == sum(1 for _ in read_rows(file)) == 1000
    assert not [item for item in probes if isinstance(item, LeftOut)]
    labelled = file.with_name("piqa_valid-labels.lst").exists()
    assert all(len(probe.expected) == labelled for probe in probes)
