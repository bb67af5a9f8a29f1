"""`kedit tune` on a toy: a preset that is no worse, within its budget, also after a kill."""

from __future__ import annotations

import json

import pytest
import yaml

from kedit_bench.journal import Journal
from kedit_bench.search import Found
from kedit_core.cli import main
from kedit_core.editing import ModelHost
from kedit_core.testing.toys import toy_facts, toy_folder


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
def asked(tmp_path):
    """Six facts of the toys as a user's own file, and what all commands here share."""
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
        for fact in toy_facts()[:6]
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [
        *("tune", "ft-m", "--model", toy_folder("gpt2"), "--preset", "toy"),
        *("--dataset", "jsonl", "--data", path),
    ]


SEARCH = [
    *("--search", "layers=[1]", "--search", "lr=0.003", "--set", "lr=0.0001", "--trials", 3),
]


def test_a_preset_is_written_that_is_better_than_the_start_and_can_be_used(kedit, asked, tmp_path):
    out = tmp_path / "tuned.yaml"
    code, printed, err = kedit(*asked, *SEARCH, "--out", out)
    assert code == 0, err
    lines = printed.splitlines()
    assert lines[0].split()[:4] == ["trial", "settings", "facts", "score"]
    assert lines[1].split()[:2] == ["1", "start"]
    (kept,) = [line for line in lines if line.endswith("kept")]
    assert "lr=0.003" in kept
    preset = yaml.safe_load(out.read_text())
    assert preset["methods"] == ["ft-m"]
    assert preset["fits"] == {"model_type": "gpt2", "hidden_size": 48, "num_hidden_layers": 4}
    assert preset["settings"]["lr"] == 0.003  # with steps of 0.0001 nothing is written
    assert preset["settings"]["steps"] == 20  # of the preset
    assert out.read_text().startswith("# Tuned: 4 facts of jsonl for tuning, 2 held out")

    fact = toy_facts()[0]
    code, printed, err = kedit(
        *("edit", "--model", toy_folder("gpt2"), "--method", "ft-m", "--hparams", out, "--json"),
        *("--prompt", fact.prompt, "--subject", fact.subject, "--target", fact.target_new),
    )
    assert code == 0, err
    assert json.loads(printed)["settings"] == preset["settings"]


def test_a_method_that_needs_matrices_begins_by_itself_without_a_preset(kedit, asked, tmp_path):
    out = tmp_path / "tuned.yaml"
    model, data = toy_folder("gpt2"), asked[asked.index("--dataset") :]
    code, printed, err = kedit(
        *("tune", "ultraedit", "--model", model, *data, "--set", "lr=0.01"),
        *("--trials", 3, "--out", out, "--json"),
    )

    assert code == 0, err
    tried = [trial["change"] for trial in json.loads(printed)["trials"]]
    blocks = [{}, {"matrices": {"mlp_out": [2, 3]}}]
    assert tried[:2] == blocks
    assert tried[2]["matrices"] == {"mlp_out": [3], "attention_out": [2, 3]}
    assert yaml.safe_load(out.read_text())["settings"]["matrices"]


def test_the_file_says_that_the_start_is_kept_where_the_best_does_worse_elsewhere(
    kedit, asked, tmp_path, monkeypatch
):
    monkeypatch.setattr(Found, "keeps_start", True)
    out = tmp_path / "tuned.yaml"
    code, _, err = kedit(*asked, *SEARCH, "--out", out)
    assert code == 0, err
    assert "so the start is kept" in err
    text = out.read_text()
    assert "so the start is kept" in text
    assert yaml.safe_load(text)["settings"]["lr"] == 0.0001
    scores = [line.split()[:4] for line in text.splitlines() if line.startswith("# best")]
    assert [line[:3] for line in scores] == [["#", "best", "tuning"], ["#", "best", "held"]]
    assert float(scores[0][3]) > 0  # of the best settings, though they are not kept


def test_a_search_that_is_killed_at_any_edit_ends_like_one_that_is_not(kedit, asked, tmp_path):
    def tune(name):
        return kedit(*asked, *SEARCH, "--out", tmp_path / name, "--json")

    code, whole, err = tune("whole.yaml")
    assert code == 0, err
    edits = []
    for _ in range(8):
        with pytest.MonkeyPatch.context() as patch:
            edits.append(die_after_two(patch))
            code, killed, err = tune("killed.yaml")
        if code == 0:
            break

    assert [len(made) for made in edits] == [2, 2, 1]
    whole, killed = json.loads(whole), json.loads(killed)
    assert killed["settings"] == whole["settings"]
    assert [without_time(t) for t in killed["trials"]] == [without_time(t) for t in whole["trials"]]
    assert whole["tuning"]["best"]["value"] >= whole["tuning"]["start"]["value"]
    code, _, err = kedit(*asked, "--search", "lr=0.1", "--out", tmp_path / "whole.yaml")
    assert code == 2
    assert "holds another search" in err


def die_after_two(patch) -> list:
    """Let two edits into the journal and end the command at the next; returns the edits."""
    append, made = Journal.append, []

    def dying(self, *records):
        if "trial" in records[0]:
            if len(made) == 2:
                raise KeyboardInterrupt
            made.append(records)
        append(self, *records)

    patch.setattr(Journal, "append", dying)
    return made


def without_time(trial: dict) -> dict:
    score = {k: v for k, v in trial["score"].items() if k not in ("seconds", "cost")}
    return {**trial, "score": score}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--search", "lear=0.1"], "Did you mean 'lr'"),
        (["--search", "lr=0.1,-3"], "greater than 0"),
        (["--search", "lr"], "--search 'lr': write KEY=A,B,C"),
        (["--search", "lr=[0.1"], "is not a value"),
        (["--set", "lr"], "write KEY=VALUE"),
        (["--data", "nowhere.json"], "does not exist"),
        (["--dataset", "starte"], "Did you mean 'starter'"),
        (["--out", __file__], "exists already"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_wrong_use_is_one_sentence_before_weights_are_read(
    kedit, asked, monkeypatch, arguments, says
):
    monkeypatch.setattr(ModelHost, "load", lambda *args, **kwargs: pytest.fail("it was loaded"))
    code, printed, err = kedit(*asked, *arguments)

    assert code == 2
    assert printed == ""
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_a_method_that_writes_no_facts_is_refused(kedit, asked):
    code, _, err = kedit("tune", "dola", *asked[2:])

    assert code == 2
    assert "dola writes no facts" in err
