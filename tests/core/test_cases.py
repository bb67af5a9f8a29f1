"""Adapters turn rows into cases: which format, which subject, and what makes no case."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kedit_core import DataError, EditCase, EditRequest, LeftOut, Probe, RequestError
from kedit_core.cases import Format, probe, read_cases, request_of
from kedit_core.records import Row, UnfitRow


def written(folder: Path, content: str) -> Path:
    file = folder / "rows"
    file.write_text(content, "utf-8")
    return file


# -- formats -----------------------------------------------------------------------------------


def case_of(row: Row) -> EditCase:
    request = EditRequest(prompt=row.filled("prompt"), target_new=row.text("target"))
    return EditCase(request=request, meta={"format": "plain"})


def case_with_more(row: Row) -> EditCase:
    return EditCase(request=case_of(row).request, meta={"format": "more"})


PLAIN = Format("plain", frozenset({"prompt", "target"}), case_of)
MORE = Format("more", frozenset({"prompt", "target", "more"}), case_with_more)


def read(folder: Path, *records: dict[str, Any], formats: Any = (MORE, PLAIN)) -> list[Any]:
    return list(read_cases(written(folder, json.dumps(list(records), indent=0)), formats))


GOOD = {"prompt": "Anne lives in", "target": "Rome"}


def test_the_first_format_whose_keys_the_first_row_has_is_taken(tmp_path):
    (plain,) = read(tmp_path, GOOD)
    (more,) = read(tmp_path, {**GOOD, "more": 1, "and": 2})
    first, second = read(tmp_path, GOOD, {**GOOD, "more": 1})

    assert plain.meta == {"format": "plain"}
    assert more.meta == {"format": "more"}
    assert [case.meta["format"] for case in (first, second)] == ["plain", "plain"]


def test_an_unknown_format_is_compared_with_the_nearest(tmp_path):
    file = written(tmp_path, '\n{"prompt": "x", "targets": "y"}')

    with pytest.raises(DataError) as caught:
        list(read_cases(file, (MORE, PLAIN)))

    assert str(caught.value) == (
        f"{file}, line 2: no known format. It comes nearest to plain, but lacks 'target'. Did you "
        f"mean 'targets'?"
    )


def test_an_unknown_format_without_a_near_name_says_what_the_file_has(tmp_path):
    with pytest.raises(DataError, match=r"lacks 'target'\. The file has: case_id, prompt\.$"):
        read(tmp_path, {"prompt": "x", "case_id": 1})


def test_a_record_without_keys_has_no_format(tmp_path):
    with pytest.raises(DataError, match=r"lacks 'prompt', 'target'\. It is empty\."):
        read(tmp_path, {})


def test_rows_that_make_no_case_are_left_out_in_their_place(tmp_path):
    found = read(
        tmp_path,
        GOOD,
        {"prompt": "", "target": "x"},  # unfit
        {"prompt": "Zoë lives in", "target": ""},  # a request that is refused
        {"prompt": "Zoë lives in"},  # malformed
        {"prompt": 7, "target": "x"},  # malformed
        GOOD,
    )

    assert [isinstance(item, EditCase) for item in found] == [True, *[False] * 4, True]
    assert [(item.line, item.malformed) for item in found[1:5]] == [
        (6, False),
        (10, False),
        (14, True),
        (17, True),
    ]
    assert found[1].reason == "'prompt' is empty"
    assert found[2].reason.startswith("The target of the prompt 'Zoë lives in' is empty")
    assert not found[2].reason.endswith(".")
    assert found[3].reason == "it lacks 'target'"
    assert str(found[4]) == f"{tmp_path / 'rows'}, line 17: 'prompt' is 7, not a text"


def test_a_row_may_make_several_cases_probes_or_leave_some_out(tmp_path):
    def several(row: Row) -> Iterator[EditCase | LeftOut]:
        yield case_of(row)
        yield LeftOut(row.file, row.line, "its second half")
        yield case_of(row)

    def asked(row: Row) -> Probe:
        return probe("locality", "", row.text("prompt"), [row.text("target")])

    first, left, second = read(tmp_path, GOOD, formats=[Format("x", PLAIN.keys, several)])
    (question,) = read(tmp_path, GOOD, formats=[Format("x", PLAIN.keys, asked)])

    assert first == second == case_of(Row("", 1, GOOD))
    assert left.reason == "its second half"
    assert question.expected == ("Rome",)


def test_a_row_that_fails_half_way_makes_no_case_at_all(tmp_path):
    def half(row: Row) -> Iterator[EditCase]:
        yield case_of(row)
        raise UnfitRow("the rest is missing")

    (left,) = read(tmp_path, GOOD, formats=[Format("x", PLAIN.keys, half)])

    assert left == LeftOut(str(tmp_path / "rows"), 2, "the rest is missing")


def test_a_mistake_of_the_adapter_is_not_taken_for_one_of_the_data(tmp_path):
    def wrong(row: Row) -> EditCase:
        raise KeyError("oops")

    with pytest.raises(KeyError, match="oops"):
        read(tmp_path, GOOD, formats=[Format("x", PLAIN.keys, wrong)])


# -- requests and probes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "subject", "spelled", "text"),
    [
        ("Anne lives in", "Anne", "Anne", "Anne lives in"),
        ("ANNE lives in", "Anne", "ANNE", "ANNE lives in"),
        ("Anne lives in", "  Anne\n", "Anne", "Anne lives in"),
        ("anne said that Anne lives in", "Anne", "Anne", "anne said that Anne lives in"),
        ("{} lives in", "Anne", "Anne", "Anne lives in"),
        ("{} lives in", " Anne ", "Anne", "Anne lives in"),
        ("f(x) = (a+b)* is", "(A+B)*", "(a+b)*", "f(x) = (a+b)* is"),
        ("Zoë lives in", "Anne", None, "Zoë lives in"),
        ("Anne lives in", None, None, "Anne lives in"),
        ("Anne lives in", "", None, "Anne lives in"),
        ("Anne lives in", " ", None, "Anne lives in"),
    ],
)
def test_a_subject_is_taken_as_the_prompt_spells_it(prompt, subject, spelled, text):
    request = request_of(prompt, subject, "Rome")

    assert (request.subject, request.text) == (spelled, text)
    if spelled is not None:
        start, end = request.subject_span
        assert request.text[start:end] == spelled


@pytest.mark.parametrize("subject", ["Anne", "anne", " Anne"])
def test_of_a_subject_that_stands_there_often_the_last_is_meant(subject):
    request = request_of("Is Anne the Anne who knows Anne?", subject, "no")

    assert request.text == "Is Anne the Anne who knows Anne?"
    assert request.subject_span == (27, 31)


def test_empty_former_answers_are_dropped_and_the_name_is_kept():
    request = request_of("Anne lives in", "Anne", "Rome", ground_truth=["Paris", "", " "], id="7")

    assert (request.ground_truth, request.id) == (("Paris",), "7")


@pytest.mark.parametrize("subject", [None, "", " "])
def test_a_place_for_a_subject_that_is_missing_is_refused(subject):
    with pytest.raises(RequestError, match="no subject is given"):
        request_of("{} lives in", subject, "Rome")


def test_a_probe_has_a_prompt_and_stripped_answers():
    made = probe("locality", "nq", "who?", [" Ada ", "", "\n"], weight=2)

    assert made == Probe(
        kind="locality", name="nq", prompt="who?", expected=("Ada",), options={"weight": 2}
    )
    with pytest.raises(UnfitRow, match="a locality prompt is empty"):
        probe("locality", "nq", " \n", ["Ada"])
