"""Files of every kind become rows with their lines, and what is wrong is said, and where."""

from __future__ import annotations

import codecs
import csv
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedit_core import DataError, LeftOut
from kedit_core.records import (
    Row,
    RowError,
    UnfitRow,
    checked,
    files_in,
    read_rows,
)

RECORDS = [{"a": "x", "n": 1}, {"a": "Łódź\n", "n": 2}, {"a": '"', "n": 3}]
LINES = [json.dumps(record, ensure_ascii=False) for record in RECORDS]


def written(folder: Path, content: str | bytes) -> Path:
    file = folder / "rows"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def rows_of(folder: Path, content: str | bytes) -> list[tuple[int, Any]]:
    """Line and value of each record."""
    return [(row.line, row.value) for row in read_rows(written(folder, content))]


def problem(folder: Path, content: str | bytes) -> str:
    """The sentence with which a file is refused, without its name."""
    file = written(folder, content)
    with pytest.raises(DataError) as caught:
        list(read_rows(file))
    sentence = str(caught.value)
    assert sentence.startswith(f"{file}, ")
    assert "\n" not in sentence
    return sentence.removeprefix(f"{file}, ")


@pytest.fixture(params=[1, 5, 1 << 16], ids=lambda size: f"by {size}")
def chunk(request, monkeypatch) -> int:
    """How many characters are read at once."""
    monkeypatch.setattr("kedit_core.records._CHUNK", request.param)
    return request.param


# -- what is read ------------------------------------------------------------------------------

LAYOUTS = {
    "array on one line": ("[" + ", ".join(LINES) + "]", [1, 1, 1]),
    "array, a record on each line": ("[\n" + ",\n".join(LINES) + "\n]\n", [2, 3, 4]),
    "array, indented": (json.dumps(RECORDS, indent=2), [2, 6, 10]),
    "array after blank lines": ("\n \n[\n\n" + "\n,\n".join(LINES) + "]", [5, 7, 9]),
    "lines": ("\n".join(LINES), [1, 2, 3]),
    "lines, the last one ended": ("\n".join(LINES) + "\n", [1, 2, 3]),
    "lines with blank ones between": ("\n\n" + "\n\n".join(LINES) + "\n\n", [3, 5, 7]),
    "objects one after another": ("".join(LINES), [1, 1, 1]),
    "objects over several lines": (
        "\n".join(json.dumps(record, indent=1) for record in RECORDS),
        [1, 5, 9],
    ),
}


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["plain", "BOM"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_json_is_read_in_every_layout_with_the_lines_of_its_records(
    layout, mark, end, chunk, tmp_path
):
    text, lines = LAYOUTS[layout]

    found = rows_of(tmp_path, mark + text.replace("\n", end).encode())

    assert found == list(zip(lines, RECORDS, strict=True))


def test_one_object_is_one_record(chunk, tmp_path):
    nested = {"a": {"b": [1, 2.5, None, True]}, "c": "[{]}"}

    assert rows_of(tmp_path, json.dumps(nested, indent=3)) == [(1, nested)]


def test_an_empty_array_has_no_record(tmp_path):
    assert rows_of(tmp_path, "[\n]\n") == []


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
SPACE = st.text(" \t\n", max_size=3)


@settings(deadline=None, max_examples=60)
@given(
    records=st.lists(st.dictionaries(st.text(), JSON, max_size=3), min_size=1, max_size=4),
    as_array=st.booleans(),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 0, 2]),
    space=SPACE,
    size=st.integers(1, 40),
)
def test_ends_of_chunks_change_nothing(
    tmp_path_factory, records, as_array, ascii_only, indent, space, size
):
    texts = [json.dumps(r, ensure_ascii=ascii_only, indent=indent) for r in records]
    before = "[" + space if as_array else space
    between = f"{space},{space}" if as_array else space
    text, lines = before, []
    for n, record in enumerate(texts):
        text += between if n else ""
        lines.append(1 + text.count("\n"))
        text += record
    text += space + ("]" if as_array else "")

    with patch("kedit_core.records._CHUNK", size):
        found = rows_of(tmp_path_factory.getbasetemp(), text)

    assert found == list(zip(lines, map(json.loads, texts), strict=True))


TABLE = (
    "prompt,target\r\n"  # line 1
    'Anne lives in,"Paris, France"\r\n'  # 2
    '"She said ""no""\nand left to",Rome\r\n'  # 3 and 4
    "\r\n"  # 5, empty
    '"",x\r\n'  # 6
    "東京 is in,Japan"  # 7
)


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_a_table_is_read_with_quotes_newlines_and_empty_lines(mark, end, tmp_path):
    text = TABLE.replace("\r\n", end)

    assert rows_of(tmp_path, mark + text.encode()) == [
        (2, {"prompt": "Anne lives in", "target": "Paris, France"}),
        (3, {"prompt": 'She said "no"\nand left to', "target": "Rome"}),
        (6, {"prompt": "", "target": "x"}),
        (7, {"prompt": "東京 is in", "target": "Japan"}),
    ]


FIELD = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(FIELD, FIELD), max_size=5))
def test_a_table_comes_back_as_it_was_written(tmp_path_factory, records):
    out = io.StringIO()
    table = csv.writer(out, quoting=csv.QUOTE_ALL)
    table.writerows([("a", "b"), *records])

    found = rows_of(tmp_path_factory.getbasetemp(), out.getvalue())

    assert [(value["a"], value["b"]) for _, value in found] == records


def test_a_row_knows_its_file(tmp_path):
    file = written(tmp_path, LINES[0])

    assert [row.file for row in read_rows(str(file))] == [str(file)]


LARGE = {
    "array": ("[", ", ", "]"),
    "lines": ("", "\n", "\n"),
    "table": ("text,number\n", "\n", "\n"),
}


@pytest.mark.parametrize("layout", LARGE)
def test_a_large_file_is_read_in_little_memory(layout, tmp_path):
    count, text = 12_000, "word " * 50
    begin, between, end = LARGE[layout]
    file = tmp_path / "large"
    with file.open("w") as out:
        out.write(begin)
        for n in range(count):
            record = f"{text},{n}" if layout == "table" else f'{{"text": "{text}", "number": {n}}}'
            out.write((between if n else "") + record)
        out.write(end)
    assert file.stat().st_size > 3_000_000

    tracemalloc.start()
    try:
        read = sum(1 for _ in read_rows(file))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert read == count
    assert peak < 700_000  # a few chunks of 65536 characters, in a file of 50


def test_a_record_may_be_longer_than_many_chunks(monkeypatch, tmp_path):
    monkeypatch.setattr("kedit_core.records._CHUNK", 10)
    long = {"text": "word " * 20_000}

    assert rows_of(tmp_path, json.dumps([long, RECORDS[0]])) == [(1, long), (1, RECORDS[0])]


# -- what is refused ---------------------------------------------------------------------------

CUT = "the file ends in the middle"
RICH = json.dumps(
    [
        {"a": [True, False, None, -12.5e10, 1e-7], "b": {"c": "x\\ \u00e9 \U0001f600 \n"}},
        {"d": [], "e": {}, "f": "é東", "g": [float("nan"), float("-inf")]},
    ],
    indent=1,
)
UNESCAPED = '[{"a": "\U0001f600 é\\u00e9\\ud83d\\ude00", "b": "東"},\n {"n": -1.5E+7}]'


@pytest.mark.parametrize("text", [RICH, UNESCAPED], ids=["indented", "unescaped"])
def test_an_array_that_is_cut_off_anywhere_is_said_to_be_with_its_last_line(chunk, text, tmp_path):
    content = text.encode()
    for length in range(1, len(content)):
        sentence = problem(tmp_path, content[:length])

        line = 1 + content[:length].count(b"\n")
        assert sentence.startswith(f"line {line}: {CUT}"), content[:length]
        assert sentence.endswith(". Download or write it again.")


def test_lines_that_are_cut_off_give_the_rows_before(chunk, tmp_path):
    rows = read_rows(written(tmp_path, "\n".join(LINES)[:-3]))

    assert [next(rows).value, next(rows).value] == RECORDS[:2]
    with pytest.raises(DataError, match=rf"line 3: {CUT}"):
        next(rows)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('{"a": 1}\n{"a" 1}\n{"a": 1}\n', 2, "Expecting ':' delimiter"),
        ('[\n{"a": 1},\n{"a": 1 "b": 2}\n]', 3, "Expecting ',' delimiter"),
        ('[\n{"a": 1},\n{\n"a": nul}]', 4, "Expecting value"),
        ('{"a": 1}\n{"a": nul}\n', 2, "Expecting value"),
        ('{"a":\n1,}', 2, ""),  # the words differ between versions of Python
        ("{'a': 1}", 1, "Expecting property name enclosed in double quotes"),
        ('{"a": "never closed}\n{"b": 1}\n', 1, "Invalid control character at"),
        ('{"a": "C:\\data"}\n', 1, "Invalid \\escape"),
        ('{"a": 1}\n\nhello\n', 3, "Expecting value"),
        ('{"a": 1}\n}\n{"b": 2}\n', 2, "Expecting value"),
    ],
)
def test_what_is_no_json_is_shown_by_its_line_wherever_it_stands(
    chunk, text, line, reason, tmp_path
):
    far = text + '{"z": 1}\n' * 20 if not text.startswith("[") else text
    for content in (text, far):
        sentence = problem(tmp_path, content)

        assert sentence.startswith(f"line {line}: not JSON ({reason}"), content


@pytest.mark.parametrize("rest", ['[{"b": 2}]', '{"b": 2}', "]", "x"])
def test_nothing_after_the_end_of_an_array_is_dropped_in_silence(chunk, rest, tmp_path):
    sentence = problem(tmp_path, '[{"a": 1}]\n' + rest)

    assert sentence == "line 2: more follows the end of the array."


@pytest.mark.parametrize(
    ("text", "line", "shown"),
    [
        ('[{"a": 1}, [2]]', 1, "[2]"),
        ('[\n"only a text"\n]', 2, '"only a text"'),
        ('{"a": 1}\n"b"\n', 2, '"b"'),
        ('{"a": 1}\nnull\n', 2, "null"),
        ('["' + "long " * 20 + '"]', 1, '"' + "long " * 7 + "lon…"),
    ],
)
def test_a_record_is_a_mapping(text, line, shown, tmp_path):
    sentence = problem(tmp_path, text)

    assert sentence == f"line {line}: a record is a mapping, not {shown}."


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 50_000], ids=["digits", "brackets"])
def test_json_that_python_cannot_take_in_is_refused(value, tmp_path):
    assert problem(tmp_path, f'{{"a": 1}}\n{{"a": {value}').startswith("line 2: unreadable JSON")


@pytest.mark.parametrize(
    "page",
    [
        "<!DOCTYPE html>\n<html>",
        "\n\n  <!doctype HTML>",
        "<HTML><body>a, b</body>",
        '<?xml version="1.0"?><Error>',
    ],
)
def test_a_web_page_is_told_from_data(page, tmp_path):
    assert "line 1: a web page, not data" in f"{problem(tmp_path, page)}"[:40]


def test_the_pointer_of_a_large_file_is_told_from_the_file(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1, 2\n"

    assert problem(tmp_path, pointer).startswith("line 1: the pointer of a large file")
    assert "git lfs pull" in problem(tmp_path, pointer)


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", codecs.BOM_UTF8, codecs.BOM_UTF8 + b"\n"])
def test_an_empty_file_is_refused(content, tmp_path):
    assert problem(tmp_path, content) == "line 1: the file is empty. Download or write it again."


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('[\n{"a": "x"},\n{"a": "café au lait"}\n]'.encode("latin-1"), 3),
        ('{"a": "x"}\n{"a": "é"}\n'.encode("latin-1"), 2),
        ("a,b\n1,2\n3,Zoë\n".encode("latin-1"), 3),
        ('{"a": "x"}\n'.encode("utf-16"), 1),
    ],
    ids=["array", "lines", "table", "UTF-16"],
)
def test_another_encoding_is_shown_by_its_line(content, line, tmp_path):
    sentence = problem(tmp_path, content)

    assert sentence.startswith(f"line {line}: not UTF-8 (")
    assert "iconv" in sentence


def test_a_file_cut_off_inside_a_character_is_not_said_to_be_in_another_encoding(tmp_path):
    sentence = problem(tmp_path, '{"a": 1}\n{"a": "東'.encode()[:-1])

    assert sentence == f"line 2: {CUT} of a character. Download or write it again."


def test_columns_without_a_name_may_be_several(tmp_path):
    (tmp_path / "rows.csv").write_text("a,,\n1,,\n")

    assert [row.value["a"] for row in read_rows(tmp_path / "rows.csv")] == ["1"]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a,b\n1,2\n3\n4,5\n", 3, "not as many fields as the header has"),
        ("a,b\n1,2\n3,4,5\n", 3, "not as many fields as the header has"),
        ('a,b\n1,"2\n2"\n\n3\n', 5, "not as many fields as the header has"),
        ('a,b\n1,2\n3,"4', 3, "no table (unexpected end of data)"),
        ('a,b\n1,2\n"3"3,4\n', 3, "no table ("),
        ('"a"a,b\n1,2\n', 1, "no table ("),
        ("only words\nin lines\n", 1, "neither JSON nor a table with a header"),
        ("42\n", 1, "neither JSON nor a table with a header"),
        ("a,b,c,b\n1,2,3,4\n", 1, "more than one column is called 'b'"),
        ("a;b\n1;2\n", 1, "the columns are parted by ';', not by commas"),
        ("a\tb\n1\t2\n", 1, "the columns are parted by tabs, not by commas"),
    ],
)
def test_what_is_no_table_is_shown_by_its_line(text, line, reason, tmp_path):
    assert problem(tmp_path, text).startswith(f"line {line}: {reason}")


def test_what_cannot_be_opened_is_said(tmp_path):
    with pytest.raises(DataError, match=r"none does not exist\. Give the dataset's file\."):
        list(read_rows(tmp_path / "none"))
    with pytest.raises(DataError, match=r"is a folder\. Give one of its files\."):
        list(read_rows(tmp_path))


# -- a row -------------------------------------------------------------------------------------

ROW = Row(
    "f.json",
    3,
    {
        "text": "Rome",
        "blank": " \n",
        "number": 7,
        "share": 0.5,
        "yes": True,
        "none": None,
        "list": ["a", "b"],
        "mixed": ["a", 1],
        "deep": ["a", ["b", ["a", " ", "c"]]],
        "map": {"inner": "x", "maps": [{"k": "v"}, {}]},
    },
)


def test_a_row_gives_what_it_holds():
    assert (ROW.text("text"), ROW.filled("text"), ROW.number("number")) == ("Rome", "Rome", 7)
    assert ROW.text("blank") == " \n"
    assert ROW.texts("list") == ("a", "b")
    assert ROW.row("map").text("inner") == "x"
    assert [inner.value for inner in ROW.row("map").rows("maps")] == [{"k": "v"}, {}]
    assert "text" in ROW
    assert "other" not in ROW


def test_answers_are_flat_filled_and_different():
    assert ROW.answers("text") == ("Rome",)
    assert ROW.answers("deep") == ("a", "b", "c")
    assert ROW.answers("blank") == ()


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda r: r.text("other"), "it lacks 'other'"),
        (lambda r: r.answers("other"), "it lacks 'other'"),
        (lambda r: r.text("number"), "'number' is 7, not a text"),
        (lambda r: r.text("none"), "'none' is null, not a text"),
        (lambda r: r.filled("list"), '\'list\' is ["a", "b"], not a text'),
        (lambda r: r.number("share"), "'share' is 0.5, not a whole number"),
        (lambda r: r.number("yes"), "'yes' is true, not a whole number"),
        (lambda r: r.number("text"), "'text' is \"Rome\", not a whole number"),
        (lambda r: r.texts("mixed"), "'mixed' is no list of texts"),
        (lambda r: r.texts("text"), "'text' is \"Rome\", not a list"),
        (lambda r: r.answers("mixed"), "'mixed' holds 1 among its answers"),
        (lambda r: r.row("list"), '\'list\' is ["a", "b"], not a mapping'),
        (lambda r: r.rows("list"), "'list' is no list of mappings"),
        (lambda r: r.row("map").text("other"), "it lacks 'map.other'"),
        (lambda r: r.row("map").rows("maps")[1].text("k"), "it lacks 'map.maps.1.k'"),
    ],
)
def test_a_row_says_what_it_lacks_and_where(ask, sentence):
    with pytest.raises(RowError) as caught:
        ask(ROW)
    assert str(caught.value) == sentence


def test_an_empty_text_makes_a_row_unfit_not_malformed():
    with pytest.raises(UnfitRow, match=r"^'blank' is empty$"):
        ROW.filled("blank")
    with pytest.raises(UnfitRow, match=r"^'map\.empty' is empty$"):
        Row("f", 1, {"map": {"empty": ""}}).row("map").filled("empty")


# -- what is left out ----------------------------------------------------------------------------


def test_checking_lets_unfit_rows_pass_and_ends_at_a_malformed_one():
    unfit, malformed = LeftOut("f", 1, "empty"), LeftOut("f", 2, "it lacks 'a'", malformed=True)
    found = checked([unfit, malformed, unfit])

    assert next(found) == unfit
    with pytest.raises(DataError) as caught:
        next(found)
    assert str(caught.value) == (
        "f, line 2: it lacks 'a'. See all such rows with `kedit data check`."
    )


# -- files of a folder -------------------------------------------------------------------------


def test_files_of_a_folder_are_found_by_pattern_in_order(tmp_path):
    for name in ("b.json", "a.json", "c.csv", "deep/a.json", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.json").mkdir()

    found = [file.relative_to(tmp_path).as_posix() for file in files_in(tmp_path, "*.json", "a.*")]

    assert found == ["a.json", "b.json", "deep/a.json"]
    assert files_in(str(tmp_path / "note.txt"), "*.json") == [tmp_path / "note.txt"]


def test_a_folder_without_such_files_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no file like \*\.json or \*\.csv\."):
        files_in(tmp_path, "*.json", "*.csv")
    with pytest.raises(DataError, match=r"none does not exist"):
        files_in(tmp_path / "none", "*.json")


# -- datasets that a library loads -------------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path) -> Path:
    """A folder that the library takes for a dataset of two splits."""
    pytest.importorskip("datasets", reason="the package 'datasets' reads hub: names")
    folder = tmp_path / "animals"
    folder.mkdir()
    train = '{"name": "tern", "legs": 2, "seen": null}\n{"name": "ant", "legs": 6, "seen": "x"}\n'
    (folder / "train.jsonl").write_text(train)
    (folder / "test.jsonl").write_text('{"name": "eel", "legs": 0, "seen": "y"}\n')
    return folder


def test_a_dataset_is_read_through_the_library(hub_folder):
    name = f"hub:{hub_folder}"

    assert list(read_rows(name)) == [
        Row(name, 1, {"name": "tern", "legs": 2}),  # what is null is not there
        Row(name, 2, {"name": "ant", "legs": 6, "seen": "x"}),
    ]
    assert [row.value["name"] for row in read_rows(f"{name}:test")] == ["eel"]


def test_a_split_that_does_not_exist_is_refused(hub_folder):
    with pytest.raises(DataError, match=r":dev' cannot be loaded: .*dev") as caught:
        list(read_rows(f"hub:{hub_folder}:dev"))
    assert "\n" not in str(caught.value)


def test_a_name_that_cannot_be_loaded_is_one_sentence(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the package 'datasets' reads hub: names")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    with pytest.raises(DataError) as caught:
        list(read_rows("hub:nobody/has-this"))

    assert str(caught.value).startswith("'hub:nobody/has-this' cannot be loaded: ")
    assert "\n" not in str(caught.value)


def test_a_name_needs_the_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)

    with pytest.raises(DataError, match=r"'hub:a/b' is read with .*: pip install datasets\."):
        list(read_rows("hub:a/b"))


def test_no_name_at_all_is_refused():
    pytest.importorskip("datasets", reason="the package 'datasets' reads hub: names")
    with pytest.raises(DataError, match=r"'hub:' names no dataset\. Write hub:OWNER/NAME\."):
        list(read_rows("hub:"))
