"""`kedit data check`: what is in a dataset's file, and what is wrong with it, without a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kedit_core import DatasetSpec, EditCase, EditRequest, LeftOut, Probe, discover, hookimpl
from kedit_core.cli import data, main

FILES = Path(__file__).parents[2] / "plugins/kedit-zsre/tests/files"
ZSRE = str(FILES / "zsre.json")
ROW = {
    "subject": "Anne",
    "src": "Where does Anne live?",
    "rephrase": "Anne lives where?",
    "alt": "Rome",
    "answers": ["Paris"],
    "loc": "nq question: who wrote it",
    "loc_ans": "Ada",
}


def check(capsys, *arguments):
    """Exit code, stdout and stderr of `kedit data check`."""
    with pytest.raises(SystemExit) as leave:
        main(["data", "check", *map(str, arguments)])
    out, err = capsys.readouterr()
    return leave.value.code or 0, out, err


def cells(table: str) -> dict[str, str]:
    """First and last column of the printed table."""
    lines = [line.rsplit(maxsplit=1) for line in table.splitlines()]
    return dict(lines)


def written(folder: Path, *rows: dict) -> Path:
    file = folder / "rows.json"
    file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]")
    return file


def test_a_table_counts_cases_probes_and_rows_left_out(capsys):
    code, out, err = check(capsys, "zsre", ZSRE)

    assert code == 0
    assert cells(out) == {
        "what": "count",
        "cases": "3",
        "requests": "3",
        "requests without a subject": "1",
        "rephrase": "3",
        "locality/nq": "3",
        "rows left out": "1",
        "malformed rows": "0",
    }
    assert err == f"{ZSRE}, line 3: 'alt' is empty\n"


def test_json_has_the_same_and_nothing_else_is_on_stdout(capsys):
    code, out, err = check(capsys, "zsre", ZSRE, "--json")

    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "cases": 3,
        "requests": 3,
        "requests without a subject": 1,
        "probes_by_kind": {"rephrase": 3, "locality/nq": 3},
        "left_out": [
            {"file": ZSRE, "line": 3, "reason": "'alt' is empty", "malformed": False},
        ],
        "malformed": 0,
    }


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("zsre_one_hop.json", {"rephrase": 1, "locality/nq": 1, "portability/one_hop": 1}),
        ("zsre_subject_replace.json", {"rephrase": 1, "portability/subject_replace": 1}),
        ("zsre_inverse_relation.json", {"rephrase": 1, "portability/inverse_relation": 1}),
    ],
)
def test_each_kind_of_probe_is_counted(capsys, name, kinds):
    code, out, _ = check(capsys, "zsre", FILES / name, "--json")

    assert (code, json.loads(out)["probes_by_kind"]) == (0, kinds)


def test_a_setting_changes_what_is_read(capsys):
    _, plain, _ = check(capsys, "zsre", ZSRE, "--json")
    code, true, _ = check(capsys, "zsre:writes_truth=true", ZSRE, "--json")
    _, variant, _ = check(capsys, "zsre-true", ZSRE, "--json")

    assert code == 0
    assert json.loads(true) == json.loads(variant)
    assert (json.loads(plain)["cases"], json.loads(true)["cases"]) == (3, 4)


def test_a_path_may_begin_with_a_tilde(capsys, tmp_path, monkeypatch):
    written(tmp_path, ROW)
    monkeypatch.setenv("HOME", str(tmp_path))

    assert check(capsys, "zsre", "~/rows.json")[0] == 0
    assert "~/none.json does not exist" in check(capsys, "zsre", "~/none.json")[2]


def test_a_dataset_that_ships_with_its_plugin_needs_no_path(capsys):
    code, out, _ = check(capsys, "starter")

    assert code == 0
    assert int(cells(out)["cases"]) > 0


def test_malformed_rows_are_all_shown_first_and_make_the_check_fail(capsys, tmp_path):
    lacks = {key: value for key, value in ROW.items() if key != "rephrase"}
    file = written(tmp_path, ROW, {**ROW, "alt": ""}, lacks, {**ROW, "src": 7})

    code, out, err = check(capsys, "zsre", file)

    assert code == 2
    assert (cells(out)["cases"], cells(out)["malformed rows"]) == ("1", "2")
    assert cells(out)["rows left out"] == "1"
    assert [line.removeprefix(f"{file}, ") for line in err.splitlines()] == [
        "line 4: it lacks 'rephrase'",
        "line 5: 'src' is 7, not a text",
        "line 3: 'alt' is empty",
        "kedit: 2 of the rows are malformed.",
    ]

    code, out, err = check(capsys, "zsre", file, "--json")
    found = json.loads(out)
    assert (code, found["malformed"], len(found["left_out"])) == (2, 2, 3)
    assert err == "kedit: 2 of the rows are malformed.\n"


def test_requests_that_stand_twice_or_contradict_are_counted(capsys, tmp_path):
    wanted = [("Peru", "Oslo"), ("Peru", "Oslo"), ("Peru", "Lima"), ("Chile", "Oslo")]
    rows = [{"prompt": f"Capital of {of}:", "target_new": new} for of, new in wanted]
    file = written(tmp_path, *rows)

    code, out, err = check(capsys, "jsonl", file)

    assert code == 0
    assert cells(out)["requests that stand several times"] == "1"
    assert cells(out)["prompts with several targets"] == "1"
    assert err.splitlines() == [
        "requests that stand several times: 1, first 'Capital of Peru:'",
        "prompts with several targets: 1, first 'Capital of Peru:'",
    ]

    found = json.loads(check(capsys, "jsonl", file, "--json")[1])
    assert found["prompts with several targets"] == 1


def test_long_lists_of_rows_are_cut_for_people_only(capsys, tmp_path):
    file = written(tmp_path, ROW, *[{**ROW, "alt": ""}] * (data.SHOWN + 3))

    code, _, err = check(capsys, "zsre", file)
    assert code == 0
    assert len(err.splitlines()) == data.SHOWN + 1
    assert err.splitlines()[-1] == "… and 3 more; --json has them all."

    _, out, _ = check(capsys, "zsre", file, "--json")
    assert len(json.loads(out)["left_out"]) == data.SHOWN + 3


@pytest.mark.parametrize("rows", [(), ({**ROW, "alt": ""},)], ids=["no row", "all left out"])
def test_a_file_without_a_case_fails_the_check(capsys, tmp_path, rows):
    code, _, err = check(capsys, "zsre", written(tmp_path, *rows))

    assert code == 2
    assert err.splitlines()[-1] == "kedit: There is no case in it."


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["zsree", ZSRE], "There is no dataset 'zsree'. Did you mean 'zsre'?"),
        (["zsre:x=1", ZSRE], "'zsre' has no setting 'x'. Known: writes_truth."),
        (["zsre:write_truth=true", ZSRE], "Did you mean 'writes_truth'?"),
        (["zsre:writes_truth", ZSRE], "'writes_truth' in 'zsre:writes_truth' is no setting."),
        (["zsre:writes_truth=flase", ZSRE], "'flase' is neither true nor false"),
        (["zsre"], "The dataset 'zsre' needs its file or folder."),
        (["zsre", "nowhere.json"], "nowhere.json does not exist."),
        (["zsre", str(FILES)], "is a folder. Give one of its files."),
        (["zsre", __file__], "line 1: "),
    ],
)
def test_a_mistake_is_answered_with_one_sentence(capsys, arguments, sentence):
    code, out, err = check(capsys, *arguments)

    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_a_file_that_is_cut_off_is_refused_with_its_line(capsys, tmp_path):
    file = tmp_path / "cut.json"
    file.write_bytes(Path(ZSRE).read_bytes().rstrip()[:-20])

    code, out, err = check(capsys, "zsre", file, "--json")

    assert (code, out) == (2, "")
    assert (
        err == f"kedit: {file}, line 5: the file ends in the middle. Download or write it again.\n"
    )


def installed(monkeypatch, *specs: DatasetSpec) -> None:
    """Let a plugin of the test offer datasets."""
    plugin = ModuleType("plugin")
    plugin.kedit_register_datasets = hookimpl(specname="kedit_register_datasets")(lambda: specs)
    catalog = discover([("plugin", plugin)])
    monkeypatch.setattr(data, "discover", lambda: catalog)


class Asked:
    """A dataset of questions alone."""

    def probes(self, source=None):
        yield Probe(kind="locality", prompt=f"who wrote {source}?")
        yield LeftOut("asked", 2, "it is empty")
        yield Probe(kind="locality", prompt="who?")


def test_a_dataset_of_probes_is_asked_for_them(capsys, monkeypatch):
    spec = DatasetSpec("asked", f"{__name__}:Asked", "", needs_path=False, holds="probes")
    installed(monkeypatch, spec)

    code, out, _ = check(capsys, "asked")

    assert code == 0
    assert cells(out)["probes"] == "2"
    assert cells(out)["rows left out"] == "1"


REQUEST = EditRequest(prompt="The {} is in", subject="Tower", target_new="Rome")


class Broken:
    """A dataset that gives what it is told to."""

    def __init__(self, returned=None) -> None:
        self.cases = lambda source: returned


class GivesDicts(Broken):
    def __init__(self) -> None:
        super().__init__([{"prompt": "The Tower is in", "target_new": "Rome"}])


class GivesRequests(Broken):
    def __init__(self) -> None:
        super().__init__([REQUEST])


class GivesProbes(Broken):
    def __init__(self) -> None:
        super().__init__([Probe(kind="rephrase", prompt="Where is it?")])


class GivesNothing(Broken):
    """Forgets to return what it has."""


class CannotBeRead:
    pass


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        (GivesDicts, "The dataset gave an item of type dict, and EditCase or LeftOut are wanted"),
        (GivesRequests, "gave an item of type EditRequest, and EditCase or LeftOut are wanted"),
        (GivesProbes, "gave an item of type Probe, and EditCase or LeftOut are wanted"),
        (GivesNothing, "The dataset returned None, from which no item can be read."),
        (CannotBeRead, f"'{__name__}:CannotBeRead' has no cases(source)."),
    ],
)
def test_an_adapter_that_gives_something_else_is_one_sentence(
    capsys, monkeypatch, adapter, sentence
):
    installed(
        monkeypatch, DatasetSpec("mine", f"{__name__}:{adapter.__name__}", "", needs_path=False)
    )

    code, out, err = check(capsys, "mine")

    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1


class Rephrasings(Broken):
    def __init__(self) -> None:
        kinds = ("rephrase", "rephrasing", "quiz", "quiz")
        super().__init__(
            [EditCase(request=REQUEST, probes=[Probe(kind=k, prompt="Where?") for k in kinds])]
        )


def test_probes_that_no_metric_counts_are_told(capsys, monkeypatch):
    installed(monkeypatch, DatasetSpec("mine", f"{__name__}:Rephrasings", "", needs_path=False))

    code, _, err = check(capsys, "mine")

    assert code == 0
    first, second = err.splitlines()
    assert first == "1 probe of kind 'rephrasing' is counted by no metric. Did you mean 'rephrase'?"
    assert second.startswith("2 probes of kind 'quiz' are counted by no metric. ")


def test_no_model_library_is_loaded():
    code = (
        "import sys\n"
        "from kedit_core.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as leave:\n"
        "    assert not leave.code, leave.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "check", "zsre", ZSRE], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "cases" in done.stdout
