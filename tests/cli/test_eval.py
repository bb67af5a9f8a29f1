"""`kedit eval` on a toy: tables, regimes, going on after a kill, other metrics afterwards."""

import csv
import importlib.metadata
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kedit_bench.journal import only_one
from kedit_core import CaseScore, MethodSpec, MetricSpec, discover, hookimpl
from kedit_core.ask import Read
from kedit_core.cli import main
from kedit_core.errors import EditError
from kedit_core.testing.toys import toy_facts, toy_folder

METRICS = ["--metric", "efficacy/teacher-forced@1", "--metric", "locality-agreement/greedy@1"]


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


def test_other_metrics_are_told_by_what_they_add_and_lack(kedit, asked, tmp_path):
    out = tmp_path / "run"
    common = [*asked[: -len(METRICS)], "--method", "ft-m", "--limit", 1, "--out", out]
    assert kedit(*common, *METRICS)[0] == 0

    assert kedit(*common, *METRICS[2:], *METRICS[:2])[0] == 0  # in another order
    code, _, err = kedit(*common, *METRICS[:2], "--metric", "fluency/ngram-entropy@1")
    assert code == 2
    assert (
        "its metrics are others: the command adds fluency/ngram-entropy@1 and lacks "
        "locality-agreement/greedy@1. Choose another --out."
    ) in err


def test_a_run_says_when_and_with_what_kedit_it_was_begun(kedit, asked, tmp_path):
    out = tmp_path / "run"
    same = [*asked, "--method", "ft-m", "--limit", 1, "--out", out]
    assert kedit(*same)[0] == 0
    noted = json.loads((out / "run.json").read_text())
    assert noted["kedit"] == importlib.metadata.version("kedit")
    assert abs(datetime.now().astimezone() - datetime.fromisoformat(noted["begun"])).days == 0

    earlier = {**noted, "kedit": "0.0.1", "begun": "2001-02-03T04:05:06+00:00"}
    (out / "run.json").write_text(json.dumps(earlier))
    assert kedit(*same)[0] == 0  # another version, another day
    assert json.loads((out / "run.json").read_text()) == earlier
    report = (out / "report.md").read_text()
    assert "| kedit | 0.0.1 |" in report
    assert "| begun | 2001-02-03T04:05:06+00:00 |" in report


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
    out = tmp_path / "run"
    code, printed, err = kedit(
        *(*asked, "--method", "ft-m", "--regime", "sequential", "--limit", 4),
        *("--out", out, "--json"),
    )
    assert code == 0, err
    (result,) = json.loads(printed)["results"]

    assert scores(result, "immediate")["efficacy/teacher-forced@1"] == 1
    assert {s["protocol"]["moment"] for s in result["scores"]} == {
        *("unedited", "immediate", "after 1", "final"),
    }
    assert {p["protocol"]["moment"] for p in result["retention"]} == {"after 1", "final"}
    report, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    for heading in ("Retention at the end, by age of the edit", "Retention by number of edits"):
        assert f"## {heading}\n" in report
        assert f"<h2>{heading}</h2>" in page
        assert f'<img alt="{heading}"' in page


def test_statistics_are_made_before_the_first_edit_and_timed_apart(kedit, asked, tmp_path):
    out = tmp_path / "run"
    code, _, err = kedit(*asked, "--method", "rome", "--limit", 1, "--out", out)
    assert code == 0, err

    result = json.loads((out / "rome" / "result.json").read_text())
    assert result["preparation_seconds"] > 0
    assert f"rome: {result['preparation_seconds']:.1f} s of preparation." in err
    assert "| method | cases | s of preparation |" in (out / "report.md").read_text()
    assert "<th>s of preparation</th>" in (out / "report.html").read_text()


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


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ("fluency/*", "fluency/ngram-entropy@1"),
        ("efficacy/greedy@1", "efficacy/greedy@1"),
        ("side-effects/weight-change@1", "side-effects/weight-change@1"),
    ],
)
def test_a_metric_whose_answers_were_not_kept_is_named(wanted, named, kedit, asked, tmp_path):
    out = tmp_path / "run"
    assert kedit(*asked, "--method", "ft-m", "--limit", 1, "--out", out)[0] == 0
    before = (out / "ft-m" / "result.json").read_bytes()

    code, _, err = kedit("eval", "rescore", out, "--metric", wanted)

    assert code == 2
    assert f"does not hold the answers that {named} needs" in err
    assert "another --out" in err
    assert (out / "ft-m" / "result.json").read_bytes() == before


def test_of_a_pattern_the_metrics_are_computed_whose_answers_were_kept(kedit, asked, tmp_path):
    out = tmp_path / "run"
    assert kedit(*asked, "--method", "ft-m", "--limit", 1, "--out", out)[0] == 0

    code, printed, err = kedit("eval", "rescore", out, "--metric", "efficacy/*", "--json")
    assert code == 0, err
    (result,) = json.loads(printed)["results"]
    assert {"efficacy/all-tokens@1", "efficacy/rank@1"} <= scores(result, "immediate").keys()
    (told,) = (line for line in err.splitlines() if "holds no answers for" in line)
    assert all(name in told for name in ("efficacy/greedy@1", "efficacy/with-stop@1"))
    assert "efficacy/rank@1" not in told
    assert "efficacy/greedy@1" not in scores(result, "immediate")

    both = ["--metric", "efficacy/*", "--metric", "efficacy/greedy@1"]
    code, _, err = kedit("eval", "rescore", out, *both)
    assert code == 2
    assert "that efficacy/greedy@1 needs" in err


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def test_scores_of_each_case_are_a_table_that_rescoring_adds_to(kedit, asked, tmp_path):
    out = tmp_path / "run"
    assert kedit(*asked, "--method", "ft-m:steps=1", "--limit", 4, "--out", out)[0] == 0
    file = out / "ft-m-steps=1" / "scores.csv"
    before = rows_of(file)

    for row in before:
        assert list(row) == ["case", "moment", "metric", "part", "value", "probes"]
    for moment in ("unedited", "immediate"):
        own = [r for r in before if (r["metric"], r["moment"]) == (METRICS[1], moment)]
        assert [r["case"] for r in own] == ["0", "1", "2", "3"]
        result = json.loads((file.parent / "result.json").read_text())
        assert sum(float(r["value"]) for r in own) / 4 == scores(result, moment)[METRICS[1]]

    for _ in range(2):  # the second time it takes the place of the first
        code, _, err = kedit("eval", "rescore", out, "--metric", "efficacy/all-tokens@1")
        assert code == 0, err
        after = rows_of(file)
        assert after[: len(before)] == before
        added = [(row["metric"], row["case"], row["moment"]) for row in after[len(before) :]]
        moments = [(str(n), moment) for n in range(4) for moment in ("unedited", "immediate")]
        assert added == [("efficacy/all-tokens@1", *own) for own in moments]


def test_methods_are_compared_case_by_case(kedit, asked, tmp_path):
    out = tmp_path / "run"
    methods = ["--method", "ft-m", "--method", "ft-m:steps=1"]
    assert kedit(*asked, *methods, "--out", out)[0] == 0
    code, printed, err = kedit("eval", "compare", out, "--to", "ft-m:steps=1", "--json")

    assert code == 0, err
    found = {(d["metric"], d["part"]): d for d in json.loads(printed)}
    difference = found[METRICS[1], ""]
    values = [
        [float(r["value"]) for r in rows_of(out / name / "scores.csv") if is_headline(r)]
        for name in ("ft-m", "ft-m-steps=1")
    ]
    moved = [a - b for a, b in zip(*values, strict=True)]
    assert difference["label"] == "ft-m"
    assert difference["cases"] == len(moved) == 8
    assert difference["mean"] == pytest.approx(sum(moved) / 8)
    assert min(moved) <= difference["low"] < difference["mean"] < difference["high"] <= max(moved)


def is_headline(row: dict[str, str]) -> bool:
    return (row["metric"], row["part"], row["moment"]) == (METRICS[1], "", "immediate")


def test_methods_are_compared_with_the_unedited_model(kedit, asked, tmp_path):
    out = tmp_path / "run"
    kedit(*asked, "--method", "ft-m", "--method", "ft-l", "--regime", "sequential", "--out", out)
    code, printed, err = kedit("eval", "compare", out)

    assert code == 0, err
    first, header, *rows = printed.splitlines()
    assert first.startswith("Difference to unedited")
    assert header.split() == ["metric", "moment", "ft-l", "ft-m"]
    assert {tuple(row.split()[:2]) for row in rows} >= {
        (METRICS[1], "immediate"),
        (METRICS[1], "final"),
    }


def test_what_cannot_be_compared_is_told(kedit, asked, tmp_path):
    out = tmp_path / "run"
    assert kedit(*asked, "--method", "ft-m", "--limit", 2, "--out", out)[0] == 0

    code, _, err = kedit("eval", "compare", out, "--to", "ft")
    assert (code, "Did you mean 'ft-m'?" in err) == (2, True)
    (out / "ft-m" / "scores.csv").unlink()
    code, _, err = kedit("eval", "compare", out)
    assert (code, f"kedit eval rescore {out}" in err) == (2, True)


def test_a_method_that_cannot_be_evaluated_does_not_stop_the_others(kedit, asked, tmp_path):
    out = tmp_path / "run"
    both = ["--method", "qlora", "--method", "ft-m", "--limit", 1, "--out", out]
    code, printed, err = kedit(*asked, *both)

    assert code == 1
    assert printed.splitlines()[0].split() == ["metric", "moment", "unedited", "ft-m"]
    assert "| ft-m |" in (out / "report.md").read_text()
    assert err.splitlines()[-1].startswith("qlora was not evaluated: qlora works on 4-bit weights")

    code, printed, err = kedit(*asked, "--method", "qlora", "--limit", 1, "--out", out)
    assert (code, printed) == (2, "")
    assert err.startswith("kedit: qlora works on 4-bit weights")


def test_where_no_method_can_be_evaluated_each_says_why(kedit, asked, tmp_path):
    two = ["--method", "qlora", "--method", "qlora:rank=2", "--limit", 1]
    code, printed, err = kedit(*asked, *two, "--out", tmp_path / "run")

    assert (code, printed) == (1, "")
    assert err.count("was not evaluated: qlora works on") == 2
    assert not (tmp_path / "run" / "report.md").exists()


def test_a_metric_without_any_probe_is_told(kedit, asked, tmp_path):
    out = tmp_path / "run"
    further = ["--metric", "portability/greedy@1", "--metric", "portability/nll@1"]
    code, _, err = kedit(*asked, *further, "--method", "ft-m", "--limit", 1, "--out", out)

    told = (
        "portability/greedy@1, portability/nll@1: no case has a probe of kind portability that "
        "can be scored."
    )
    assert code == 0
    assert told in err.splitlines()
    assert f"- {told}" in (out / "report.md").read_text().splitlines()
    assert told in (out / "report.html").read_text()
    assert told in kedit("eval", "rescore", out, "--metric", METRICS[1])[2].splitlines()


def test_a_method_that_was_not_evaluated_to_the_end_is_not_rescored(kedit, asked, tmp_path):
    out = tmp_path / "run"
    command = [*asked, "--method", "ft-m", "--limit", 3, "--out", out]
    assert kedit(*command)[0] == 0
    file, journal = out / "ft-m" / "result.json", out / "ft-m" / "answers.jsonl"
    whole = json.loads(file.read_text())
    file.unlink()
    journal.write_text(journal.read_text().splitlines(keepends=True)[0])

    code, _, err = kedit("eval", "rescore", out, "--metric", "efficacy/all-tokens@1")
    assert code == 2
    assert f"{out} holds no method that was evaluated to the end" in err
    assert not file.exists()

    assert kedit(*asked, "--method", "ft-l", "--limit", 3, "--out", out)[0] == 0
    code, printed, err = kedit("eval", "rescore", out, "--json")
    assert code == 0
    assert [result["label"] for result in json.loads(printed)["results"]] == ["ft-l"]
    assert "ft-m was not evaluated to the end" in err

    assert kedit(*command)[0] == 0
    assert json.loads(file.read_text())["scores"] == whole["scores"]


def test_a_run_is_not_rescored_while_another_process_works_in_it(kedit, asked, tmp_path):
    out = tmp_path / "run"
    assert kedit(*asked, "--method", "ft-m", "--limit", 1, "--out", out)[0] == 0
    before = (out / "ft-m" / "result.json").read_bytes()

    with only_one(out):
        code, _, err = kedit("eval", "rescore", out, "--metric", "efficacy/all-tokens@1")

    assert code == 2
    assert "Another process is working in" in err
    assert (out / "ft-m" / "result.json").read_bytes() == before


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

    protocols = [s["protocol"] for s in result["scores"]]
    assert "commonsense" in {p["part"] for p in protocols}
    (dataset,) = {p["dataset"] for p in protocols}
    assert " + commonsense " in dataset


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


# -- plugins that are broken -------------------------------------------------------------------


class Method:
    """The least that a method is."""

    def __init__(self, hparams) -> None:
        pass

    def edit(self, job):
        raise RuntimeError("shapes differ")


class WritesUnseen(Method):
    def edit(self, job):
        job.host.parameter(job.host.mlp_out(1)).data.mul_(3)
        raise EditError("It cannot be done.")


class Writes(Method):
    def edit(self, job):
        with torch.no_grad():
            job.host.parameter(job.host.mlp_out(1)).mul_(3)
        raise EditError("It cannot be done.")


class Tokens:
    """Counts the tokens of an answer that no other metric asks about."""

    def questions(self, case):
        return [Read(case.request.text, "New Haven or Lima")]

    def score(self, case, before, after):
        (asked,) = Tokens.questions(self, case)
        return {"": CaseScore(len(after[asked].tokens))}


class CannotAsk(Tokens):
    def questions(self, case):
        return None if case.request.id == "1" else super().questions(case)


class AsksText(Tokens):
    def questions(self, case):
        return [case.request.text]


class CannotScore(Tokens):
    def score(self, case, before, after):
        return super().score(case, before, after) if case.request.id == "0" else {}["x"]


class ScoresText(Tokens):
    def score(self, case, before, after):
        return {"": CaseScore("0.5")}


class CannotCombine(Tokens):
    def combine(self, means):
        return {"double": 2 * means["x"]}


class LooksElsewhere(Tokens):
    def questions(self, case):
        return [Read(case.request.text, "New Haven or Rome")]


def name_of(made: type) -> str:
    name = made.__name__.lower()
    return name if issubclass(made, Method) else f"mine/{name}@1"


@pytest.fixture
def plugin(monkeypatch):
    """Lets a plugin of the test offer methods and metrics; they are called as in `name_of`."""

    def offer(*classes):
        module = ModuleType("plugin")
        for kind, spec, base in (("methods", MethodSpec, Method), ("metrics", MetricSpec, Tokens)):
            more = {"hparams": "kedit_core.hparams:HyperParams"} if base is Method else {}
            specs = [
                spec(name_of(made), f"{__name__}:{made.__name__}", "Of a test.", **more)
                for made in classes
                if issubclass(made, base)
            ]
            hook = f"kedit_register_{kind}"
            setattr(module, hook, hookimpl(specname=hook)(lambda specs=specs: specs))
        catalog = discover([("plugin", module)])
        monkeypatch.setattr("kedit_bench.commands.discover", lambda: catalog)

    return offer


@pytest.fixture
def without_preset(asked):
    """The shared arguments without the preset, which a test's method does not have."""
    return [argument for argument in asked if argument not in ("--preset", "toy")]


FT_M = "ft-m:layers=[1],lr=0.01,steps=2"


@pytest.mark.parametrize("method", [Writes, WritesUnseen])
def test_a_method_that_spoils_the_model_ends_the_evaluation(
    kedit, without_preset, tmp_path, plugin, method
):
    plugin(method)
    out, alone = tmp_path / "run", tmp_path / "alone"
    common = [*without_preset, "--limit", 2]
    name = name_of(method)
    code, _, err = kedit(*common, "--method", name, "--method", FT_M, "--out", out)

    assert code == 1, err
    last = err.splitlines()[-1]
    assert last.startswith(f"{name} was not evaluated: ")
    assert f"So {name} and what comes after it cannot be scored." in last
    assert "as before" not in err
    assert list(out.glob("*/result.json")) == list(out.glob("*/answers.jsonl")) == []

    assert kedit(*common, "--method", FT_M, "--out", out)[0] == 0
    assert kedit(*common, "--method", FT_M, "--out", alone)[0] == 0
    (one,), (other,) = (list(folder.glob("*/result.json")) for folder in (out, alone))
    assert json.loads(one.read_text())["scores"] == json.loads(other.read_text())["scores"]


def test_a_method_whose_code_fails_is_scored_without_its_edits(
    kedit, without_preset, tmp_path, plugin
):
    plugin(Method)
    out = tmp_path / "run"
    both = ["--method", "method", "--method", FT_M, "--limit", 2, "--out", out]
    code, printed, err = kedit(*without_preset, *both)

    assert code == 0, err
    assert printed.splitlines()[0].split() == ["metric", "moment", "unedited", "method", FT_M]
    told = "method failed on 2 cases, scored without the edit: RuntimeError: shapes differ"
    assert told in err.splitlines()


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        (CannotAsk, "failed in questions() for the case 'PROMPT 1': TypeError: 'NoneType' object"),
        (AsksText, "failed in questions() for the case 'PROMPT 0': TypeError: 'PROMPT 0' is no"),
        (CannotScore, "failed in score() for the case 'PROMPT 1': KeyError: 'x'."),
        (ScoresText, "returned {'': CaseScore(value='0.5', probes=1)}; score() must return"),
        (CannotCombine, "failed in combine(): KeyError: 'x'."),
        (LooksElsewhere, "looked up the answer to Read("),
    ],
)
@pytest.mark.parametrize("regime", ["single", "sequential"])
def test_a_metric_that_fails_does_not_stop_the_others(
    kedit, asked, data, tmp_path, plugin, metric, told, regime
):
    plugin(metric, Tokens)
    rows = [json.loads(line) for line in data.read_text().splitlines()[:3]]
    for number, row in enumerate(rows):
        row["id"] = str(number)
        told = told.replace(f"PROMPT {number}", row["prompt"].format(row["subject"]))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, name = tmp_path / "run", name_of(metric)
    common = [*asked, "--method", "ft-m", "--metric", name, "--regime", regime, "--out", out]
    code, printed, err = kedit(*common)

    assert code == 1, err
    assert f"ft-m: The metric {name} {told}" in err.splitlines()[-1]
    assert {line.split()[0] for line in printed.splitlines()[1:]} == set(METRICS[1::2])
    result = json.loads((out / "ft-m" / "result.json").read_text())
    assert scores(result, "immediate").keys() == set(METRICS[1::2])
    assert {row["metric"] for row in rows_of(out / "ft-m" / "scores.csv")} == set(METRICS[1::2])
    assert f"`ft-m`: The metric {name} " in (out / "report.md").read_text()

    kept = (out / "ft-m" / "answers.jsonl").read_bytes()
    again = kedit(*common)
    assert again[0] == 1
    assert again[1] == printed
    assert (out / "ft-m" / "answers.jsonl").read_bytes() == kept
    code, printed, err = kedit("eval", "rescore", out, "--metric", METRICS[1], "--json")
    assert (code, err) == (0, "")
    assert json.loads(printed)["results"][0]["scores"][-1]["protocol"]["metric"] == METRICS[1]


def test_a_metric_that_was_mended_scores_what_was_kept(kedit, asked, tmp_path, plugin, monkeypatch):
    plugin(CannotScore)
    out = tmp_path / "run"
    common = [*asked, "--method", "ft-m", "--metric", name_of(CannotScore), "--out", out]
    assert kedit(*common)[0] == 1

    monkeypatch.setattr(CannotScore, "score", Tokens.score)
    code, _, err = kedit("eval", "rescore", out)

    assert code == 0, err
    result = json.loads((out / "ft-m" / "result.json").read_text())
    assert result["broken"] == {}
    assert scores(result, "immediate")[name_of(CannotScore)] >= 1


# -- runs that are killed ----------------------------------------------------------------------

CHILDREN = """
import json, os, sys
import kedit_bench.cell, kedit_bench.report, kedit_core.editing  # once, for all children
from kedit_core.cli import main

for line in sys.stdin:
    child = os.fork()
    if not child:
        os.environ["KEDIT_CACHE"], *arguments = json.loads(line)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        main(arguments)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Children:
    """Commands as children of a process that has loaded everything they need.

    Args:
        parent: runs `CHILDREN`.
    """

    def __init__(self, parent: subprocess.Popen) -> None:
        self._parent = parent

    def start(self, cache: Path, *arguments: str) -> int:
        """Start a command, one at a time; returns its process id."""
        self._parent.stdin.write(json.dumps([str(cache), *map(str, arguments)]) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    def end(self) -> int:
        """Wait for the command; returns its status, or the signal that killed it."""
        return int(self._parent.stdout.readline())


@pytest.fixture(scope="module")
def children():
    with subprocess.Popen(
        [sys.executable, "-c", CHILDREN],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        yield Children(parent)


@pytest.mark.parametrize("regime", ["single", "batch:2", "sequential"])
def test_a_run_that_is_killed_at_any_moment_ends_like_one_that_is_not(
    regime, asked, tmp_path, children
):
    seed = secrets.randbits(32)
    moments = random.Random(seed)
    command = [*asked, "--method", "ft-m", "--regime", regime, "--out"]
    whole, killed = tmp_path / "whole" / "ft-m", tmp_path / "killed" / "ft-m"
    children.start(tmp_path / "cache of whole", *command, whole.parent)
    assert children.end() == 0

    statuses = []
    for _ in range(4):
        size = size_of(killed / "answers.jsonl")
        running = children.start(tmp_path / "cache of killed", *command, killed.parent)
        while size_of(killed / "answers.jsonl") <= size and is_alive(running):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        if is_alive(running):
            os.kill(running, signal.SIGKILL)
        statuses.append(children.end())
    assert signal.SIGKILL in statuses, f"seed {seed}"
    children.start(tmp_path / "cache of killed", *command, killed.parent)
    assert children.end() == 0, f"seed {seed}"

    wanted, found = (json.loads((cell / "result.json").read_text()) for cell in (whole, killed))
    for key in ("scores", "retention"):
        assert found[key] == wanted[key], f"seed {seed}"
    lines = [json.loads(line) for line in (killed / "answers.jsonl").read_text().splitlines()]
    keys = [(line["n"], line["moment"]) for line in lines]
    assert len(keys) == len(set(keys)), f"seed {seed}"
    assert {n for n, _ in keys} == set(range(8)), f"seed {seed}"


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
