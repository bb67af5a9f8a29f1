"""The light commands: quick, without torch, and with the nearest word for a typo."""

import json
import os
import subprocess
import sys

import pytest

import kedit_core
from kedit_core.cli import main

LIGHT = ["list-methods", "list-datasets", "list-metrics", "list-models", "plugins"]


def run(capsys, *arguments):
    """Exit code, stdout and stderr of one command."""
    with pytest.raises(SystemExit) as leave:
        main(list(arguments))
    out, err = capsys.readouterr()
    return leave.value.code or 0, out, err


@pytest.mark.parametrize("command", [*LIGHT, "presets rome"])
def test_light_commands_do_not_load_torch(command):
    code = (
        "import sys\n"
        "from kedit_core.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_methods_are_listed_as_json_for_programs(capsys):
    code, out, _ = run(capsys, "list-methods", "--json")
    methods = {entry["name"]: entry for entry in json.loads(out)}
    assert code == 0
    assert {"rome", "r-rome", "ft-l", "ft-m"} <= set(methods)
    assert methods["r-rome"]["variant_of"] == "rome"
    assert methods["rome"]["distribution"] == "kedit-rome"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--method rom --prompt x --target y", "There is no method 'rom'. Did you mean 'rome'?"),
        (
            "--method rome --prompt {}x --subject s --target y --set lyer=3",
            "Unknown setting 'lyer' of rome (set). Did you mean 'layer'?",
        ),
        (
            "--method rome --prompt {}x --subject s --target y --preset smollm2-135",
            "rome has no preset 'smollm2-135'. Did you mean 'smollm2-135m'?",
        ),
        (
            "--method rome --prompt {}x --subject s --target y --set steps=0",
            "Setting 'steps' = 0 of rome (set): input should be greater than 0.",
        ),
        ("--method rome --prompt x --subject s --target y", "is not in the prompt"),
        ("--method rome --prompt sxs --subject s --target y", "stands 2 times in the prompt"),
        (
            "--method kn --prompt {}x --subject s --target y",
            "former answer to 'sx'. Give --ground-truth, or `ground_truth` in the file.",
        ),
        ("--method rome --prompt x --target y", "Give --subject, or `subject` in the file."),
        ("--method dola --prompt x --ground-truth y", "takes no --requests, --rephrase, --ground-"),
        ("--method rome --prompt x", "Give --prompt, --subject and --target"),
    ],
)
def test_a_mistake_is_answered_with_one_sentence_before_the_model_is_loaded(
    capsys, arguments, sentence
):
    code, out, err = run(capsys, "edit", "--model", "smollm2-135m", *arguments.split())
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.strip().splitlines()) == 1


def test_a_model_that_is_not_known_is_answered_with_the_nearest(capsys):
    code, _, err = run(
        capsys,
        *["edit", "--model", "smollm2", "--method", "rome", "--prompt", "x", "--target", "y"],
    )
    assert code == 2
    assert "Did you mean 'smollm2-135m'?" in err


def test_the_version_is_shown(capsys):
    assert run(capsys, "--version") == (0, f"kedit {kedit_core.__version__}\n", "")


def test_an_unknown_command_is_wrong_use(capsys):
    code, _, err = run(capsys, "list-method")
    assert code == 2
    assert "list-methods" in err


def test_a_method_of_a_missing_plugin_names_what_to_install():
    environment = os.environ | {"KEDIT_PLUGINS": "kedit"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from kedit_core.cli import main; main()",
            *["edit", "--model", "x", "--method", "rome", "--prompt", "x", "--target", "y"],
        ],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 2
    assert "pip install kedit-rome" in done.stderr
