"""The light commands: quick, without torch, and with the nearest word for a typo."""

import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

import kedit_core
from kedit_core import CommandSpec, MethodSpec, MetricSpec, hookimpl, plugins
from kedit_core.cli import main

LIGHT = ["list-methods", "list-datasets", "list-metrics", "list-models", "plugins"]
EDIT_WITH_ROME = ["edit", "--model", "x", "--method", "rome", "--prompt", "x", "--target", "y"]


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


def test_a_method_of_a_missing_plugin_names_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("kedit_core.plugins._entry_points", list)

    code, _, err = run(capsys, *EDIT_WITH_ROME)
    assert code == 2
    assert "pip install kedit-rome" in err


@pytest.fixture
def plugin(monkeypatch):
    """Adds a plugin module to those that are installed."""

    def add(module):
        point = SimpleNamespace(
            name=module.__name__,
            group="kedit.plugins.v1",
            dist=SimpleNamespace(name=f"kedit-{module.__name__}", version="1"),
            load=lambda: module,
        )
        installed = plugins._entry_points()
        monkeypatch.setattr("kedit_core.plugins._entry_points", lambda: [*installed, point])

    return add


def module_of(**specs):
    """A plugin module with these registrations."""
    module = ModuleType("odd")
    for kind, given in specs.items():
        setattr(module, f"kedit_register_{kind}", hookimpl(lambda given=given: given))
    return module


@pytest.mark.parametrize("command", LIGHT[:4])
def test_a_list_tells_which_plugins_do_not_work(capsys, plugin, command):
    assert run(capsys, command)[2] == ""
    plugin(module_of(methods=[MethodSpec("memit", "a:B", "Another one.")]))

    for arguments in ([command], [command, "--json"]):
        code, out, err = run(capsys, *arguments)
        assert code == 0
        assert "memit " not in out
        assert err == ("Plugins that do not work: kedit-memit, kedit-odd (see `kedit plugins`).\n")


def test_many_names_of_a_kind_are_counted_for_people_and_listed_for_programs(capsys, plugin):
    names = [f"n{number}/greedy@1" for number in range(5)]
    metrics = [MetricSpec(name, "a:B", "A metric.") for name in names]
    plugin(module_of(methods=[MethodSpec("odd", "a:B", "A method.")], metrics=metrics))

    _, out, _ = run(capsys, "plugins")
    (line,) = (line for line in out.splitlines() if line.startswith("odd "))
    assert line.endswith(" 1 method: odd; 5 metrics: n0/greedy@1, n1/greedy@1, n2/greedy@1, …")
    (entry,) = (e for e in json.loads(run(capsys, "plugins", "--json")[1]) if e["name"] == "odd")
    assert entry["offers"] == ["method odd", *(f"metric {name}" for name in names)]


def test_an_error_of_a_plugin_is_one_sentence_with_its_place(capsys, plugin, tmp_path, monkeypatch):
    (tmp_path / "luckless").mkdir()
    (tmp_path / "luckless" / "__init__.py").touch()
    (tmp_path / "luckless" / "command.py").write_text(
        "import json\n\ndef odd():\n    raise_it()\n\ndef raise_it():\n    json.loads('{')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module = module_of(commands=[CommandSpec("odd", "luckless.command:odd", "A command.")])
    module.__name__ = "luckless"
    plugin(module)

    code, out, err = run(capsys, "odd")

    assert (code, out) == (1, "")
    assert err == (
        "kedit: luckless failed in command.py:7 (JSONDecodeError: Expecting property name enclosed "
        "in double quotes: line 1 column 2 (char 1)). Add --debug to see the traceback.\n"
    )
    with pytest.raises(ValueError, match="Expecting property name"):
        main(["odd", "--debug"])


def test_an_error_of_kedit_itself_is_told_as_its_own(capsys, monkeypatch):
    monkeypatch.setattr("kedit_core.hparams.presets_of", lambda spec: spec.nothing)

    code, _, err = run(capsys, "presets", "rome")

    assert code == 1
    assert err.startswith("kedit: kedit failed in presets.py:")
    assert "AttributeError: 'MethodSpec' object has no attribute 'nothing'" in err


def test_a_method_that_the_environment_leaves_out_says_so():
    environment = os.environ | {"KEDIT_PLUGINS": "kedit"}
    done = subprocess.run(
        [sys.executable, "-c", "from kedit_core.cli import main; main()", *EDIT_WITH_ROME],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 2
    assert "'rome' is left out by the environment variable KEDIT_PLUGINS" in done.stderr
