"""`kedit eval` on a toy: tables, regimes, going on after a kill, other metrics afterwards."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from types import ModuleType

import pytest

from kedit_core import discover, hookimpl
from kedit_core.cli import main
from kedit_core.testing.toys import toy_facts, toy_folder

METRICS = ["--metric", "efficacy/teacher-forced@1", "--metric", "locality-agreement/greedy@1"]
SILENT = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


@pytest.fixture
def kedit(capsys):
    """Runs a command and returns its exit code, stdout and stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as leave:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return leave.value.code or 0, out, err

    return run


@pytest.fixture
def data(tmp_path):
    """Eight facts of the toys as a user's own file."""
    path = tmp_path / "facts.jsonl"
    records = [
        {
            "prompt": fact.prompt,
            "subject": fact.subject,
            "target_new": fact.target_new,
            "rephrase": list(fact.rephrases),
            "locality": [n.prompt for n in fact.neighborhood],
            "locality_answer": [n.answer for n in fact.neighborhood],
        }
        for fact in toy_facts()[:8]
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def asked(data):
    """The arguments that all evaluations here share."""
    return [
        *("eval", "--model", str(toy_folder("llama")), "--preset", "toy"),
        *("--dataset", "jsonl", "--data", str(data), *METRICS),
    ]


def scores(result: dict, moment: str) -> dict[str, float]:
    return {
        s["protocol"]["metric"]: s["mean"]
        for s in result["scores"]
        if s["protocol"]["moment"] == moment and not s["protocol"]["part"]
    }


def test_methods_stand_side_by_side_with_the_unedited_model(kedit, asked, tmp_path):
    out = tmp_path / "run"
    code, printed, err = kedit(
        *asked, "--method", "ft-m", "--method", "ft-m:steps=2", "--limit", 3, "--out", out
    )
    assert code == 0, err
    header, first, *_ = printed.splitlines()
    assert header.split() == ["metric", "moment", "unedited", "ft-m", "ft-m:steps=2"]
    assert first.startswith("efficacy/teacher-forced@1")

    result = json.loads((out / "ft-m" / "result.json").read_text())
    assert result["cases"] == 3
    assert scores(result, "immediate")["efficacy/teacher-forced@1"] == 1
    assert scores(result, "unedited")["locality-agreement/greedy@1"] == 1
    line = json.loads((out / "ft-m" / "answers.jsonl").read_text().splitlines()[0])
    assert {"before", "after"} <= line["answers"][0].keys()
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.split("</style>")[1]
    assert "| ft-m |" in (out / "report.md").read_text()


def test_observers_are_told_the_result_of_a_finished_cell(kedit, asked, tmp_path, monkeypatch):
    seen, module = [], ModuleType("observer")

    @hookimpl
    def kedit_cell_finished(event):
        seen.append(event)

    module.kedit_cell_finished = kedit_cell_finished
    observed = discover([("observer", module)])
    monkeypatch.setattr("kedit_bench.commands.discover", lambda: observed)
    out = tmp_path / "run"
    assert kedit(*asked, "--method", "ft-m", "--limit", 1, "--out", out)[0] == 0

    (event,) = seen
    assert event.folder == str(out / "ft-m")
    assert json.loads((out / "ft-m" / "result.json").read_text()) == event.result


def test_the_same_command_goes_on_and_another_one_is_refused(kedit, asked, tmp_path):
    out = tmp_path / "run"
    same = [*asked, "--method", "ft-m", "--limit", 2, "--out", out]
    assert kedit(*same)[0] == 0
    before = (out / "ft-m" / "answers.jsonl").read_bytes()

    assert kedit(*same)[0] == 0
    assert (out / "ft-m" / "answers.jsonl").read_bytes() == before
    code, _, err = kedit(*same, "--seed", 1)
    assert code == 2
    assert "its seed is 0, and 1 is asked for" in err


def test_the_device_and_the_libraries_belong_to_a_run_if_it_noted_them(kedit, asked, tmp_path):
    out = tmp_path / "run"
    same = [*asked, "--method", "ft-m", "--limit", 1, "--out", out]
    assert kedit(*same)[0] == 0
    noted = json.loads((out / "run.json").read_text())
    assert noted["device"] == "cpu"

    (out / "run.json").write_text(json.dumps({**noted, "torch": "1.0"}))
    code, _, err = kedit(*same)
    assert code == 2
    assert "its torch is '1.0'" in err
    earlier = {k: v for k, v in noted.items() if k not in ("device", "torch", "transformers")}
    (out / "run.json").write_text(json.dumps(earlier))
    assert kedit(*same)[0] == 0


def test_a_method_can_join_later(kedit, asked, tmp_path):
    out = tmp_path / "run"
    assert kedit(*asked, "--method", "ft-m", "--limit", 2, "--out", out)[0] == 0
    code, printed, _ = kedit(*asked, "--method", "ft-l", "--limit", 2, "--out", out, "--json")

    assert code == 0
    assert [r["method"] for r in json.loads(printed)["results"]] == ["ft-l"]
    assert "| metric | moment | unedited | ft-m | ft-l |" in (out / "report.md").read_text()
    assert "<th>ft-m</th><th>ft-l</th>" in (out / "report.html").read_text()


def test_a_sequence_is_scored_right_after_each_edit_and_at_the_end(kedit, asked, tmp_path):
    code, printed, err = kedit(
        *asked, "--method", "ft-m", "--regime", "sequential", "--limit", 4, "--json"
    )
    assert code == 0, err
    (result,) = json.loads(printed)["results"]

    assert scores(result, "immediate")["efficacy/teacher-forced@1"] == 1
    assert {s["protocol"]["moment"] for s in result["scores"]} == {
        *("unedited", "immediate", "after 1", "final"),
    }
    assert result["retention"]


def test_metrics_are_computed_from_what_was_kept(kedit, asked, tmp_path):
    out = tmp_path / "run"
    assert kedit(*asked, "--method", "ft-m", "--limit", 2, "--out", out)[0] == 0

    code, printed, err = kedit(
        "eval", "rescore", out, "--metric", "efficacy/all-tokens@1", "--json"
    )
    assert code == 0, err
    (result,) = json.loads(printed)["results"]
    assert scores(result, "immediate").keys() == {*METRICS[1::2], "efficacy/all-tokens@1"}
    assert json.loads((out / "ft-m" / "result.json").read_text()) == result
    report = (out / "report.md").read_text()
    assert all(f"| {name} | immediate |" in report for name in scores(result, "immediate"))
    again = kedit("eval", "rescore", out, "--metric", "efficacy/all-tokens@1", "--json")
    assert json.loads(again[1])["results"] == [result]

    code, _, err = kedit("eval", "rescore", out, "--metric", "fluency/*")
    assert code == 2
    assert "does not hold the answer" in err


def test_probes_of_another_dataset_are_asked_too(kedit, asked, tmp_path):
    goals = tmp_path / "piqa.jsonl"
    goals.write_text('{"goal": "How to lace a shoe?", "sol1": "Cross the ends.", "sol2": "No."}\n')
    (tmp_path / "piqa-labels.lst").write_text("0\n")
    code, printed, err = kedit(
        *(*asked, "--metric", "locality-agreement/teacher-forced@1", "--method", "ft-m"),
        *("--limit", 2, "--probes", f"commonsense={goals}", "--json"),
    )
    assert code == 0, err
    (result,) = json.loads(printed)["results"]

    parts = {s["protocol"]["part"] for s in result["scores"]}
    assert "commonsense" in parts


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "ftm"], "Did you mean 'ft-m'"),
        (["--method", "ft-m:step=2"], "steps"),
        (["--method", "ft-m", "--regime", "sequentiel"], "There is no regime"),
        (["--method", "ft-m", "--metric", "eficacy/greedy@1"], "Did you mean"),
        (["--method", "ft-m", "--data", "nowhere.json"], "does not exist"),
        (["--method", "ft-m", "--dataset", "jsonn"], "Did you mean 'jsonl'"),
        (["--method", "ft-m", "--dataset", "commonsense"], "Give it with --probes"),
        (["--method", "ft-m", "--probes", "commonsense"], "Write --probes NAME=PATH"),
        (["--method", "ft-m", "--probes", "commonsense="], "Write --probes NAME=PATH"),
        (["--method", "ft-m", "--probes", "commonsens=x"], "Did you mean 'commonsense'"),
        (["--method", "ft-m", "--probes", "commonsense=x.jsonl"], "x.jsonl does not exist"),
        (["--method", "ft-m", "--probes", "jsonl=pyproject.toml"], "Give it with --dataset"),
        ([], "--method is missing"),
    ],
)
def test_wrong_use_is_one_sentence_before_weights_are_read(
    kedit, asked, arguments, says, monkeypatch
):
    weights = "kedit_core.cli.options.open_session"
    monkeypatch.setattr(weights, lambda *args, **kwargs: pytest.fail("weights were read"))
    code, printed, err = kedit(*asked, *arguments)

    assert code == 2
    assert printed == ""
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_a_malformed_row_ends_it_with_file_and_line(kedit, asked, data):
    data.write_text(data.read_text() + '{"prompt": 3, "target_new": "x"}\n')
    code, _, err = kedit(*asked, "--method", "ft-m")

    assert code == 2
    assert f"{data}, line 9" in err


@pytest.mark.parametrize("regime", ["single", "sequential"])
def test_a_run_that_is_killed_at_any_moment_ends_like_one_that_is_not(
    regime, asked, tmp_path, shared_cache
):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = "from kedit_core.cli import main; main()"
    command = [sys.executable, "-c", start, *asked, "--method", "ft-m"]
    command += ["--regime", regime, "--json", "--out"]
    whole = subprocess.run(
        [*command, str(tmp_path / "whole")], env=environment, capture_output=True, check=True
    )
    moments = random.Random(regime)
    killed = tmp_path / "killed"
    for _ in range(4):
        running = subprocess.Popen([*command, str(killed)], env=environment, **SILENT)
        _wait_for(killed / "run.json", running)
        time.sleep(moments.uniform(0, 0.4))
        running.send_signal(signal.SIGKILL)
        running.wait()
    ended = subprocess.run(
        [*command, str(killed)], env=environment, capture_output=True, check=True
    )

    wanted, found = (json.loads(run.stdout)["results"][0] for run in (whole, ended))
    assert found["scores"] == wanted["scores"]
    lines = [json.loads(x) for x in (killed / "ft-m" / "answers.jsonl").read_text().splitlines()]
    keys = [(line["n"], line["moment"]) for line in lines]
    assert len(keys) == len(set(keys))
    assert {n for n, _ in keys} == set(range(8))


def _wait_for(file, process) -> None:
    while not file.exists() and process.poll() is None:
        time.sleep(0.01)
