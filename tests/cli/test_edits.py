"""Editing, asking, saving, taking back and exporting from the command line, on a toy."""

import contextlib
import json

import pytest
import torch
import yaml

from kedit_core.cli import main
from kedit_core.cli.edits import _leads
from kedit_core.corpus import Corpus
from kedit_core.editing import EditSession, ModelHost
from kedit_core.numerics.stats import collect
from kedit_core.stack import append_saved, read_stack
from kedit_core.testing.toys import toy_corpus, toy_facts, toy_folder

SETTINGS = ["--preset", "toy"]


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
def model():
    return str(toy_folder("llama"))


def edit_arguments(model, fact, method="rome"):
    return [
        *("edit", "--model", model, "--method", method, *SETTINGS),
        *("--corpus", toy_corpus(), "--prompt", fact.prompt),
        *("--subject", fact.subject, "--target", fact.target_new),
    ]


def test_an_edit_is_saved_asked_exported_and_taken_out(kedit, model, tmp_path):
    fact = toy_facts()[0]
    saved = tmp_path / "edits"
    code, out, err = kedit(*edit_arguments(model, fact), "--save", saved, "--json")
    assert code == 0, err
    answer = json.loads(out)["answers"][0]
    assert answer["before"]["text"].strip().startswith(fact.answer)
    assert answer["after"]["text"].strip().startswith(fact.target_new)

    prompt = fact.prompt.replace("{}", fact.subject)
    code, out, err = kedit("ask", prompt, "--model", model, "--edits", saved, "--json")
    assert code == 0, err
    answers = json.loads(out)
    assert answers["without"].strip().startswith(fact.answer)
    assert answers["with"].strip().startswith(fact.target_new)

    code, out, _ = kedit("stack", "show", saved, "--json")
    (patch,) = json.loads(out)["patches"]
    assert patch["requests"][0]["target_new"] == fact.target_new

    for to in ("hf", "peft"):
        code, _, err = kedit("export", saved, tmp_path / to, "--model", model, "--to", to)
        assert code == 0, err
    assert (tmp_path / "hf" / "config.json").is_file()
    assert (tmp_path / "peft" / "adapter_config.json").is_file()

    assert kedit("stack", "pop", saved)[0] == 0
    code, out, _ = kedit("stack", "show", saved, "--json")
    assert json.loads(out)["patches"] == []
    code, _, err = kedit("stack", "pop", saved)
    assert code == 1
    assert "holds no edit" in err


def test_a_requests_file_edits_all_of_its_facts(kedit, model, tmp_path):
    first, second = toy_facts()[0], toy_facts()[7]
    file = tmp_path / "facts.yaml"
    records = [
        {"prompt": f.prompt, "subject": f.subject, "target_new": f.target_new}
        for f in (first, second)
    ]
    file.write_text(yaml.safe_dump(records), "utf-8")
    code, out, err = kedit(
        *("edit", "--model", model, "--method", "ft-m", *SETTINGS),
        *("--requests", file, "--json"),
    )
    assert code == 0, err
    answers = json.loads(out)["answers"]
    assert [a["target"] for a in answers] == [first.target_new, second.target_new]
    assert all(a["after"]["text"].strip().startswith(a["target"]) for a in answers)
    assert [(a["before"]["leads"], a["after"]["leads"]) for a in answers] == [(False, True)] * 2


def test_a_blank_at_the_end_of_a_prompt_is_not_asked(kedit, model, tmp_path):
    fact, saved, answers = toy_facts()[0], tmp_path / "edits", {}
    code, _, err = kedit(*edit_arguments(model, fact), "--save", saved)
    assert code == 0, err
    for end in ("", " "):
        prompt = fact.prompt.replace("{}", fact.subject) + end
        told = json.loads(kedit("ask", prompt, "--model", model, "--edits", saved, "--json")[1])
        shown = kedit(
            "edit",
            "--model",
            model,
            "--method",
            "dola",
            *SETTINGS,
            "--prompt",
            prompt,
            "--target",
            fact.answer,
            "--edits",
            saved,
            "--json",
        )[1]
        (answer,) = json.loads(shown)["answers"]
        assert told.pop("prompt") == answer.pop("prompt") == prompt
        answers[end] = told, answer
    assert answers[""] == answers[" "]


def test_edits_that_changed_meanwhile_are_not_overwritten(kedit, model, tmp_path, monkeypatch):
    fact, saved = toy_facts()[0], tmp_path / "edits"
    command = [*edit_arguments(model, fact, "ft-m"), "--save", saved]
    assert kedit(*command)[0] == 0
    edit = EditSession.edit

    def while_another_saves(session, *args, **kwargs):
        append_saved(saved, session.stack[0], overlay=False)
        return edit(session, *args, **kwargs)

    for meddle, code, count in ((edit, 0, 2), (while_another_saves, 1, 3), (edit, 0, 4)):
        monkeypatch.setattr(EditSession, "edit", meddle)
        left, _, err = kedit(*command, "--edits", saved, "--force")
        assert left == code, err
        assert ("edits has changed since it was read" in err) == bool(code)
        assert len(read_stack(saved).entries) == count


def test_an_edit_that_does_not_write_its_fact_says_so(kedit, model, tmp_path):
    first, second = toy_facts()[:2]
    facts = [
        {"prompt": first.prompt, "subject": first.subject, "target_new": first.target_new},
        # The model goes on as before: after so small a step nothing has changed.
        {"prompt": second.prompt, "subject": second.subject, "target_new": second.answer},
        {"prompt": first.prompt, "subject": first.subject, "target_new": "Rome, " * 30},
    ]
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump(facts), "utf-8")
    still = ["--set", "lr=1e-12", "--set", "steps=1", "--set", "layers=[1]"]
    asked = ["edit", "--model", model, "--method", "ft-m", "--requests", tmp_path / "facts.yaml"]

    code, _, err = kedit(*asked, *still)

    assert code == 0, err
    assert "1 of 3 answers begin with their target." in err


@pytest.mark.parametrize(
    ("target", "text", "leads"),
    [("Rome", " Rome is", True), ("Rome", "", False), ("New Haven", " New", None)],
)
def test_an_answer_that_ends_inside_its_target_tells_nothing(target, text, leads):
    assert _leads(target, text) is leads


def test_edits_one_by_one_are_saved_each_and_go_on(kedit, model, tmp_path):
    facts = [
        {"prompt": f.prompt, "subject": f.subject, "target_new": f.target_new}
        for f in toy_facts()[:3]
    ]
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(facts[:2]), "utf-8")
    (tmp_path / "three.yaml").write_text(yaml.safe_dump(facts), "utf-8")
    saved = tmp_path / "edits"
    command = ["edit", "--model", model, "--method", "ft-m", *SETTINGS, "--batch", 1, "--json"]

    assert kedit(*command, "--requests", tmp_path / "two.yaml")[0] == 2
    for name, count in (("two", 2), ("three", 3), ("three", 3)):
        asked = ["--requests", tmp_path / f"{name}.yaml", "--save", saved]
        code, out, err = kedit(*command, *asked)
        assert code == 0, err
        answers = json.loads(out)["answers"]
        assert answers[-1]["after"]["probability"] > answers[-1]["before"]["probability"]
        listed = json.loads(kedit("stack", "show", saved, "--json")[1])["patches"]
        assert [p["requests"][0]["subject"] for p in listed] == [
            fact["subject"] for fact in facts[:count]
        ]

    code, _, err = kedit("stack", "remove", saved, 0)
    assert code == 1
    assert "may build on edit 0" in err
    inodes = [file.stat().st_ino for file in sorted(saved.glob("000[01]/*"))]
    assert kedit("stack", "remove", saved, 2)[0] == 0
    assert len(json.loads(kedit("stack", "show", saved, "--json")[1])["patches"]) == 2
    assert sorted(file.name for file in saved.iterdir()) == ["0000", "0001", "stack.json"]
    kept = [file.stat().st_ino for file in sorted(saved.glob("000[01]/*"))]
    assert kept == inodes  # the others are not written again


def test_one_by_one_goes_on_at_what_is_done_with_the_same_settings(
    kedit, model, tmp_path, monkeypatch
):
    facts = [
        {"prompt": f.prompt, "subject": f.subject, "target_new": f.target_new}
        for f in toy_facts()[:2]
    ]
    for count in (1, 2):
        (tmp_path / f"{count}.json").write_text(json.dumps(facts[:count]), "utf-8")
    begun = []

    def bar(total, *rest, initial):
        begun.append((initial, total))
        return contextlib.nullcontext(Bar())

    monkeypatch.setattr("kedit_core.progress.progress", bar)
    command = ["edit", "--model", model, "--method", "ft-m", *SETTINGS, "--batch", 1]
    command += ["--save", tmp_path / "edits", "--requests"]
    assert kedit(*command, tmp_path / "1.json")[0] == 0

    code, _, err = kedit(*command, tmp_path / "2.json", "--set", "steps=3")
    assert code == 2
    assert "another steps than" in err
    code, _, err = kedit(*command, tmp_path / "2.json")
    assert code == 0, err
    assert "ft-m: 1 edit(s)" in err
    assert begun == [(0, 1), (1, 2), (1, 2)]

    other = [*command, tmp_path / "2.json", "--dtype", "bfloat16"]
    code, _, err = kedit(*other)
    assert code == 2
    assert "computed on other weights" in err
    assert kedit(*other, "--force")[0] == 0


class Bar:
    def update(self, n):
        pass


@pytest.mark.parametrize("method", ["dola", "deco"])
def test_a_method_that_writes_no_facts_shows_an_answer(kedit, model, tmp_path, method):
    command = ["edit", "--model", model, "--method", method, *SETTINGS, "--save", tmp_path / "s"]
    for more in (["--batch", 1], ["--rephrase", "x"], ["--requests", tmp_path / "x.yaml"]):
        code, _, err = kedit(*command, *more)
        assert code == 2
        assert "writes no facts" in err

    code, out, err = kedit(*command, "--prompt", "Mira Voss lives in", "--json")
    assert code == 0, err
    (answer,) = json.loads(out)["answers"]
    assert answer["after"]["text"]
    assert answer["after"]["probability"] is None
    code, out, err = kedit(*command[:-2], "--prompt", "Mira Voss lives in", "--target", "Rome")
    assert code == 0, err
    assert "0 edit" not in err
    assert kedit("stack", "show", tmp_path / "s")[0] == 0


def test_saved_edits_are_cut_to_the_terminal_and_whole_in_a_pipe(
    kedit, model, tmp_path, monkeypatch
):
    prompt = "In the long and winding tale of the old town by the sea, {} lives in"
    arguments = ["--prompt", prompt, "--subject", "Mira Voss", "--target", "Port Sable"]
    command = ["edit", "--model", model, "--method", "ft-m", *SETTINGS, *arguments]
    code, _, err = kedit(*command, "--save", tmp_path / "s")
    assert code == 0, err
    fact = f"{prompt.replace('{}', 'Mira Voss')} → Port Sable"

    assert fact in kedit("stack", "show", tmp_path / "s")[1]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert f"{fact[:69]}…" in kedit("stack", "show", tmp_path / "s")[1]


def test_former_answers_reach_the_request(kedit, model, tmp_path):
    fact, saved = toy_facts()[0], tmp_path / "edits"
    known = ["--ground-truth", fact.answer, "--ground-truth", "another"]
    code, _, err = kedit(*edit_arguments(model, fact, "ft-m"), *known, "--save", saved)
    assert code == 0, err
    (patch,) = json.loads(kedit("stack", "show", saved, "--json")[1])["patches"]
    assert patch["requests"][0]["ground_truth"] == [fact.answer, "another"]


@pytest.mark.parametrize(
    ("command", "goes_on"),
    [
        ("edit --method ft-m --prompt x --target y --batch 1 --save DIR/edits", True),
        ("edit --method ft-m --prompt x --target y --save DIR/edits", False),
        ("eval --method ft-m --dataset starter --out=DIR/results", True),
        ("eval --method ft-m --dataset starter", False),
        ("prepare --method rome --preset toy", True),
        ("ask x", False),
    ],
)
def test_an_interrupted_command_says_whether_it_goes_on(
    kedit, model, tmp_path, monkeypatch, command, goes_on
):
    def load(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("kedit_core.editing.ModelHost.load", load)
    words = command.replace("DIR", str(tmp_path)).split()
    then = " The same command goes on where it was." * goes_on
    preset = SETTINGS if "ft-m" in words else []
    assert kedit(*words, *preset, "--model", model) == (130, "", f"kedit: Stopped.{then}\n")


def test_what_cannot_work_is_refused_before_weights_are_read(kedit, model, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr("kedit_core.editing.ModelHost.load", load)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/diary.txt").write_text("dear")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "patch.json").write_text("{")
    command = edit_arguments(model, toy_facts()[0])
    swap = edit_arguments(model, toy_facts()[0], "lora")

    for arguments, named in (
        ([*command, "--corpus", tmp_path / "none.txt"], "none.txt does not exist"),
        ([*command, "--batch", 1, "--save", tmp_path / "other"], "something else"),
        ([*command, "--edits", damaged], "cannot be read"),
        (["ask", "x", "--model", model, "--edits", damaged], "cannot be read"),
        (["export", damaged, tmp_path / "out", "--model", model], "cannot be read"),
        ([*swap, "--overlay"], "changes no weights"),
    ):
        code, _, err = kedit(*arguments)
        assert code == 2, err
        assert named in err


def test_a_bad_line_of_a_requests_file_is_named(kedit, model, tmp_path):
    file = tmp_path / "facts.jsonl"
    good = {"prompt": "{} lives in", "subject": "A", "target_new": "B"}
    file.write_text(f"{json.dumps(good)}\n\n{json.dumps(good | {'target_new': ''})}\n", "utf-8")
    code, _, err = kedit(
        "edit", "--model", model, "--method", "rome", *SETTINGS, "--requests", file
    )
    assert code == 2
    assert "line 3" in err


def test_an_existing_folder_is_not_overwritten(kedit, model, tmp_path):
    code, _, err = kedit(*edit_arguments(model, toy_facts()[0]), "--save", tmp_path)
    assert code == 2
    assert "exists already" in err


def test_a_layer_that_does_not_exist_fails_with_a_sentence(kedit, model):
    code, _, err = kedit(*edit_arguments(model, toy_facts()[0]), "--set", "layer=99")
    assert code == 2
    assert "Layer 99 does not exist" in err


def test_edits_of_another_model_are_refused(kedit, model, tmp_path):
    saved = tmp_path / "edits"
    assert kedit(*edit_arguments(model, toy_facts()[0]), "--save", saved)[0] == 0
    code, _, err = kedit("ask", "x", "--model", toy_folder("gpt2"), "--edits", saved)
    assert code == 2
    assert "computed on other weights" in err


def test_statistics_are_prepared_ahead(kedit, model, tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(toy_corpus().parent))
    corpus = f"--corpus=~/{toy_corpus().name}"  # the shell leaves such a ~ alone
    code, _, err = kedit("prepare", "--model", model, "--method", "rome", *SETTINGS, corpus)
    assert code == 0, err
    assert list((tmp_path / "cache" / "artifacts" / "second-moment").iterdir())
    code, _, err = kedit("prepare", "--model", model, "--method", "ft-m", *SETTINGS)
    assert code == 2
    assert "nothing to prepare" in err


def test_statistics_of_other_code_are_the_corpus_of_an_edit(kedit, model, tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    fact, folder = toy_facts()[0], tmp_path / "wikipedia_stats"
    folder.mkdir()
    file = folder / "model.layers.1.mlp.down_proj_float32_mom2_100000.npz"
    arguments = ["prepare", "--model", model, "--method", "rome", *SETTINGS, "--corpus", folder]
    host = ModelHost.load(str(model))
    site = host.mlp_out(1)
    moment = collect(host, [site], Corpus(str(toy_corpus())), 1000, seed=0)[site].numpy()
    np.savez(file, **{"mom2.count": 100, "mom2.mom2": 100 * moment[1:, 1:]})

    code, _, err = kedit(*arguments)
    assert code == 2
    assert "is not of this model" in err

    np.savez(file, **{"mom2.count": 100, "mom2.mom2": 100 * moment[::-1, ::-1]})
    code, _, err = kedit(*arguments)
    assert code == 2
    assert "is of another model" in err

    np.savez(file, **{"mom2.count": 100, "mom2.mom2": 100 * moment})
    code, _, err = kedit(*arguments)
    assert code == 0, err
    edit = edit_arguments(model, fact)
    edit[edit.index(toy_corpus())] = folder
    code, out, err = kedit(*edit, "--json")
    assert code == 0, err
    assert json.loads(out)["answers"][0]["after"]["text"].strip().startswith(fact.target_new)
    (kept,) = (tmp_path / "cache" / "artifacts" / "second-moment").iterdir()
    assert file.name in (kept / "key.json").read_text("utf-8")


def test_a_model_is_inspected(kedit, model):
    code, out, err = kedit("inspect", model, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["type"] == "llama"
    assert "mlp_out" in found["anatomy"]


@pytest.mark.parametrize(("dtype", "each"), [("float32", 4), ("bfloat16", 2 + 4)])
def test_inspect_counts_all_that_an_edit_keeps(kedit, model, dtype, each):
    found = json.loads(kedit("inspect", model, "--dtype", dtype, "--json")[1])
    out, width = found["mlp_out_shape"]
    assert found["kept_per_edited_matrix_mb"] == round(out * width * each / 1e6, 2)


def test_a_quantised_model_is_inspected(kedit, model, monkeypatch):
    """Its weights are packed, as those of bitsandbytes are."""
    load = ModelHost.load

    def packed(*args, **kwargs):
        host = load(*args, **kwargs)
        for block in host.blocks:
            linear = host.module(block.mlp_out.module)
            codes = linear.weight.detach().to(torch.int8).reshape(-1, 1)
            linear.weight = torch.nn.Parameter(codes, requires_grad=False)
        return host

    shape = json.loads(kedit("inspect", model, "--json")[1])["mlp_out_shape"]
    monkeypatch.setattr("kedit_core.editing.ModelHost.load", packed)
    code, out, err = kedit("inspect", model, "--json")
    assert code == 0, err
    assert json.loads(out)["mlp_out_shape"] == shape
    assert "kept_per_edited_matrix_mb" not in json.loads(out)


def test_a_folder_without_tokenizer_is_refused_before_weights_are_read(kedit, tmp_path):
    (tmp_path / "config.json").write_text("{}", "utf-8")
    code, _, err = kedit("inspect", tmp_path)
    assert code == 2
    assert "has no tokenizer" in err
