"""Adapters that do not look at what they read are found out."""

import json

import pytest

from kedit_core import EditCase, EditRequest, Format, read_cases
from kedit_core.testing.datasets import FAULTS, refuse_spoilt

RECORDS = [{"prompt": f"{town} is in", "answer": "Norway", "id": town, "far": 1} for town in "abc"]


class Towns:
    """Reads what it needs by `read`."""

    def __init__(self, read) -> None:
        self.read = read

    def cases(self, source):
        yield from read_cases(source, [Format("towns", frozenset({"prompt"}), self._case)])

    def _case(self, row):
        answer, id = self.read(row)
        return EditCase(request=EditRequest(prompt=row.text("prompt"), target_new=answer, id=id))


def careful(row):
    return row.filled("answer"), row.text("id") if "id" in row else ""


def takes_any_type(row):
    return str(row.value["answer"]), row.text("id")


def dies_of_a_missing_key(row):
    return row.filled("answer"), row.value["id"]


class Hasty(Towns):
    """Passes over rows that lack an answer."""

    def _case(self, row):
        return super()._case(row) if "answer" in row else ()


@pytest.fixture(params=["array", "lines"])
def file(request, tmp_path):
    path = tmp_path / "towns.json"
    lines = "\n".join(map(json.dumps, RECORDS))
    path.write_text(lines if request.param == "lines" else json.dumps(RECORDS))
    return path


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "spoilt"
    made.mkdir()
    return made


@pytest.mark.parametrize("fault", FAULTS)
def test_a_careful_adapter_passes(fault, file, folder):
    refuse_spoilt(Towns(careful), file, fault, folder)


def test_an_adapter_that_takes_any_type_is_found_out(file, folder):
    with pytest.raises(AssertionError, match="a wrong type was read"):
        refuse_spoilt(Towns(takes_any_type), file, "wrong types", folder)


def test_an_adapter_that_dies_of_a_later_record_is_found_out(file, folder):
    with pytest.raises(KeyError, match="id"):
        refuse_spoilt(Towns(dies_of_a_missing_key), file, "missing keys", folder)


def test_an_adapter_that_passes_over_a_record_is_found_out(file, folder):
    with pytest.raises(AssertionError, match="a row that lacks a key was lost"):
        refuse_spoilt(Hasty(careful), file, "missing keys", folder)
