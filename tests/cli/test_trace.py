"""Tracing from the command line, on a toy: table, JSON, figures, and what is refused early."""

import json

import pytest

from kedit_core.cli import main, trace
from kedit_core.numerics import causal
from kedit_core.testing.toys import toy_facts, toy_folder

FACT = next(fact for fact in toy_facts() if not fact.prompt.endswith("{}"))
QUICK = ["--samples", 2, "--window", 2]


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


@pytest.fixture
def requests(tmp_path):
    """Three facts that the toys know, and one that they do not."""
    facts = toy_facts()[:4]
    answers = [*(fact.answer for fact in facts[:3]), facts[3].target_new]
    records = [
        {"prompt": f.prompt, "subject": f.subject, "target_new": "x", "ground_truth": answer}
        for f, answer in zip(facts, answers, strict=True)
    ]
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def one_fact(model, *options):
    return ["trace", "--model", model, "--prompt", FACT.prompt, "--subject", FACT.subject, *options]


def test_kinds_are_those_of_the_numerics():
    assert trace.KINDS == causal.KINDS


def test_a_fact_is_traced(kedit, model, tmp_path):
    figure = tmp_path / "fact.png"

    code, out, err = kedit(*one_fact(model, *QUICK, "--answer", FACT.answer, "--out", figure))

    assert code == 0, err
    header, *rows = out.splitlines()
    assert header.split() == ["token", "block", "layer", "mlp", "layer", "attn", "layer"]
    marked = [row.split()[0] for row in rows if row.split()[0].endswith("*")]
    assert "".join(marked).replace("*", "") == FACT.subject.replace(" ", "")
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "The model answers" not in err


def test_json_holds_every_score_and_depends_on_the_seed_alone(kedit, model, tmp_path):
    command = one_fact(model, *QUICK, "--kind", "mlp", "--json", "--out", tmp_path / "fact.svg")

    code, out, err = kedit(*command, "--answer", FACT.target_new)

    assert code == 0, err
    data = json.loads(out)
    assert not data["is_expected"]
    assert f"not {FACT.target_new!r}" in err
    assert list(data["kinds"]) == ["mlp"]
    scores = data["kinds"]["mlp"]["scores"]
    assert {len(row) for row in scores} == {len(data["tokens"])}
    assert data["low"] < data["high"] <= 1
    assert (tmp_path / "fact.svg").read_text("utf-8").lstrip().startswith("<?xml")
    again = json.loads(kedit(*command)[1])
    assert again["kinds"] == data["kinds"]
    assert json.loads(kedit(*command, "--seed", 1)[1])["low"] != data["low"]


def test_facts_of_a_file_are_averaged(kedit, model, requests, tmp_path):
    figure = tmp_path / "facts.png"
    command = ["trace", "--model", model, "--requests", requests, *QUICK, "--out", figure]

    code, out, err = kedit(*command)
    assert code == 0, err
    assert [line.split("  ")[0] for line in out.splitlines()[1:]] == list(causal.PLACES)
    assert err.count("Left out") == 1
    assert out.splitlines()[0].split("  ")[-3].strip() == "attn ± 95 %"
    told = {line.split("  ")[0]: line for line in out.splitlines()[1:]}
    assert told["last subject token"].count("±") == 3
    assert figure.read_bytes().startswith(b"\x89PNG")

    data = json.loads(kedit(*command, "--json", "--kind", "attn")[1])
    assert len(data["facts"]) == 4
    assert len(data["left_out"]) == 1
    assert data["averages"]["attn"]["places"]["last subject token"]["facts"] == 3


def test_one_fact_of_a_file_has_no_interval(kedit, model, requests, tmp_path):
    requests.write_text(requests.read_text("utf-8").splitlines()[0], "utf-8")
    command = ["trace", "--model", model, "--requests", requests, *QUICK, "--kind", "mlp"]

    code, out, err = kedit(*command, "--out", tmp_path / "fact.png")

    assert code == 0, err
    assert "±" not in "".join(out.splitlines()[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "no such", "--subject", "Nobody"], "not in the prompt"),
        (["--prompt", "{} is"], "--prompt and --subject"),
        (["--prompt", "{} is", "--subject", "A", "--requests", "x.yaml"], "one fact"),
        (["--requests", "missing.yaml"], "does not exist"),
        (["--prompt", "{} is", "--subject", "A", "--kind", "mpl"], "'mlp'"),
        (["--prompt", "{} is", "--subject", "A", "--out", "figure.jpg"], ".png or .svg"),
        (["--prompt", "{} is", "--subject", "A", "--noise", "0"], "positive"),
        (["--prompt", "{} is", "--subject", "A", "--window", "0"], "window"),
        (["--prompt", "{} is", "--subject", "A", "--samples", "0"], "samples"),
    ],
)
def test_what_is_wrong_is_told_before_weights_are_read(kedit, model, monkeypatch, options, message):
    monkeypatch.setattr("kedit_core.cli.options.open_session", None)

    code, _, err = kedit("trace", "--model", model, *options)

    assert code == 2
    assert message in err


def test_a_request_without_a_subject_is_refused(kedit, model, tmp_path):
    file = tmp_path / "facts.yaml"
    file.write_text("- prompt: It is\n  target_new: x\n", "utf-8")

    code, _, err = kedit("trace", "--model", model, "--requests", file)

    assert code == 2
    assert "request 1 has no subject" in err


@pytest.mark.parametrize("command", [["trace", "--prompt", "{} is", "--subject", "A", "--model"],
                                     ["inspect", "--trace"]])  # fmt: skip
def test_an_encoder_decoder_is_refused_before_weights_are_read(kedit, tmp_path, command):
    (tmp_path / "config.json").write_text('{"is_encoder_decoder": true}', "utf-8")
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")

    code, _, err = kedit(*command, tmp_path)

    assert code == 2
    assert "encoder-decoder" in err


def test_inspect_names_the_layers_that_carry_facts(kedit, model, requests):
    command = ["inspect", model, "--trace", "--requests", requests]

    code, out, err = kedit(*command)
    assert code == 0, err
    assert "effect of MLPs at the last subject token" in out
    assert "2301.04213" in err

    traced = json.loads(kedit(*command, "--json")[1])["traced"]
    effects = [entry["effect"] for entry in traced["layers"]]
    assert effects == sorted(effects, reverse=True)
    assert traced["facts"] == 3


def test_inspect_reads_requests_only_to_trace(kedit, model, requests):
    code, _, err = kedit("inspect", model, "--requests", requests)

    assert code == 2
    assert "--trace" in err
