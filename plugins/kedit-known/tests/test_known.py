"""Known facts become cases in which nothing changes."""

from pathlib import Path

import pytest
from kedit_known.dataset import Known

from kedit_core import DataError
from kedit_core.testing.datasets import FAULTS, refuse_spoilt, rows_add_up

FILES = Path(__file__).parent / "files"


def test_the_attribute_is_target_and_former_answer():
    first, *_ = Known().cases(FILES / "known.json")

    assert first.request.text == "Halden Bridge is located in the south of"
    assert first.request.subject == "Halden Bridge"
    assert first.request.target_new == "Norway"
    assert first.request.ground_truth == ("Norway",)
    assert first.probes == ()
    assert first.meta == {
        "known_id": 7,
        "subject": "Halden Bridge",
        "relation_id": "P17",
        "prediction": " the south of Norway, near",
    }


def test_of_a_subject_that_stands_twice_the_last_is_meant():
    _, second, _ = Known().cases(FILES / "known.json")

    assert second.request.text == "The bird of Okon and Okon town is the"
    assert second.request.subject_span == (21, 25)


def test_a_row_without_an_attribute_is_left_out_with_its_line():
    *_, left = Known().cases(FILES / "known.json")

    assert (left.line, left.reason, left.malformed) == (4, "'attribute' is empty", False)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_file_is_refused_in_one_sentence(fault, tmp_path):
    refuse_spoilt(Known(), FILES / "known.json", fault, tmp_path)


def test_another_dataset_is_refused_with_what_is_missing(tmp_path):
    other = tmp_path / "other.json"
    other.write_text('[{"subject": "a", "prompt": "a b", "attribute": "c", "known": 1}]')

    with pytest.raises(DataError, match=r"line 1: no known format.*lacks 'known_id'"):
        list(Known().cases(other))


def test_the_public_file_is_read_whole(benchmark_data):
    cases, left = rows_add_up(Known(), benchmark_data / "ROME/known_1000.json")

    assert (len(cases), left) == (969, [])
    assert all(case.request.subject for case in cases)
