"""`new_plugin` writes a plugin that works as it is."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib

import pytest

from kedit_core import MethodSpec, PluginError, discover, scaffold
from kedit_core.cli import main
from kedit_core.hparams import presets_of
from kedit_core.scaffold import new_plugin
from kedit_core.testing import run_checks, toy_folder

CASES = "tests/files/example.jsonl"
SHARED = ("__init__.py", "plugin.py", "py.typed")


@pytest.fixture
def imported(monkeypatch):
    """Puts a folder's `src` on the path and imports its plugin; forgets both afterwards."""
    packages = []

    def load(folder, package):
        packages.append(package)
        monkeypatch.syspath_prepend(folder / "src")
        return importlib.import_module(f"{package}.plugin")

    yield load
    for name in [n for n in sys.modules if n.partition(".")[0] in packages]:
        del sys.modules[name]


def test_the_rendered_files_have_their_names(tmp_path):
    folder = new_plugin("method", "my-idea", tmp_path)

    assert folder == tmp_path / "kedit-my-idea"
    files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    package = "src/kedit_my_idea"
    assert files == {
        "pyproject.toml",
        "README.md",
        "tests/test_conformance.py",
        f"{package}/__init__.py",
        f"{package}/plugin.py",
        f"{package}/hparams.py",
        f"{package}/method.py",
        f"{package}/py.typed",
        f"{package}/presets/__init__.py",
        f"{package}/presets/toy.yaml",
    }
    texts = [(folder / file).read_text("utf-8") for file in files]
    assert not [text for text in texts if "{{" in text or "jinja" in text]
    assert [p.name for p in tmp_path.iterdir()] == ["kedit-my-idea"]


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("dataset", {"tests/test_dataset.py", CASES, "src/kedit_my_idea/dataset.py"}),
        ("metric", {"tests/test_metric.py", "src/kedit_my_idea/metric.py"}),
    ],
)
def test_datasets_and_metrics_have_their_own_files(tmp_path, kind, own):
    folder = new_plugin(kind, "my-idea", tmp_path)

    package = folder / "src" / "kedit_my_idea"
    files = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    shared = {"pyproject.toml", "README.md", *(f"src/kedit_my_idea/{f}" for f in SHARED)}
    assert files == shared | own
    assert f"The {kind} my-idea for kedit." in (package / "__init__.py").read_text("utf-8")


def test_the_rendered_method_passes_every_check(tmp_path, imported):
    folder = new_plugin("method", "my-idea", tmp_path)
    plugin = imported(folder, "kedit_my_idea")

    report = run_checks("my-idea", catalog=discover(extra=[("my-idea", plugin)]))

    assert report.ok, report.table()
    skipped = {r.check for r in report.results if r.outcome == "skipped"}
    assert skipped == {
        "all_requests_of_a_batch_take_effect",
        "requests_that_disagree_do_no_harm",
        "preparing_changes_nothing",
        "one_edit_is_taken_back_from_among_others",
        "saved_edits_load_in_another_process",
    }


@pytest.fixture
def installed(monkeypatch):
    """Makes a folder's plugin found as pip does; forgets its package afterwards."""
    packages = []

    def install(folder):
        project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
        ((group, points),) = project["entry-points"].items()
        ((name, module),) = points.items()
        packages.append(module.partition(".")[0])
        info = folder / "src" / f"{packages[-1]}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")
        monkeypatch.syspath_prepend(folder / "src")

    yield install
    for name in [n for n in sys.modules if n.partition(".")[0] in packages]:
        del sys.modules[name]


def test_a_new_dataset_and_a_new_metric_work_in_an_evaluation(tmp_path, installed, capsys):
    dataset = new_plugin("dataset", "my-world", tmp_path)
    installed(dataset)
    installed(new_plugin("metric", "my-idea", tmp_path))

    assert kedit("data", "check", "my-world", dataset / CASES) == 0
    checked = capsys.readouterr().out
    assert (
        kedit(
            *("eval", "--model", toy_folder("gpt2"), "--method", "ft-m", "--preset", "toy"),
            *("--dataset", "my-world", "--data", dataset / CASES),
            *("--metric", "my-idea/greedy@1:tokens=4", "--metric", "locality-agreement/greedy@1"),
            *("--out", tmp_path / "results"),
        )
        == 0
    )
    assert "locality/other" in checked
    report = (tmp_path / "results" / "ft-m" / "scores.csv").read_text("utf-8")
    assert "my-idea/greedy@1:tokens=4" in report
    assert "locality-agreement/greedy@1" in report


def kedit(*arguments):
    with pytest.raises(SystemExit) as leave:
        main([str(argument) for argument in arguments])
    return leave.value.code or 0


def test_the_rendered_tests_pass(tmp_path):
    folders = [new_plugin(kind, f"my-{kind}", tmp_path) for kind in ("dataset", "metric")]

    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "."],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(f / "src") for f in folders)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stdout + run.stderr
    assert "13 passed" in run.stdout


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("starter", "'starter' is a dataset; `kedit data check starter` reads a file with it."),
        ("efficacy/greedy@1", "'efficacy/greedy@1' is a metric; `kedit eval --metric"),
        ("capitals", "There is no method 'capitals'."),
    ],
)
def test_the_suite_is_for_methods_and_says_what_else_a_name_is(capsys, name, sentence):
    assert kedit("check", name) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", ["on", "a1", "a-very-long-name-of-30-letters"])
def test_unusual_names_render_too(tmp_path, imported, name):
    package = f"kedit_{name.replace('-', '_')}"

    plugin = imported(new_plugin("method", name, tmp_path), package)

    spec = discover(extra=[(name, plugin)]).method(name)
    assert isinstance(spec, MethodSpec)
    assert callable(spec.load()(None).edit)
    assert [preset.name for preset in presets_of(spec)] == ["toy"]


@pytest.mark.parametrize("kind", ["method", "dataset", "metric"])
@pytest.mark.parametrize("name", ["my-idea", "a-very-long-name-of-30-letters", "zz"])
def test_the_rendered_files_are_clean(tmp_path, kind, name):
    pytest.importorskip("ruff")
    folder = new_plugin(kind, name, tmp_path)

    for command in (["check"], ["format", "--check"]):
        run = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    "name", ["", "My-Idea", "my_idea", "1st", "-a", "a-", "a--b", "../a", "a b", "a" * 31, "é"]
)
def test_malformed_names_are_refused(tmp_path, name):
    with pytest.raises(PluginError, match="no name for a method"):
        new_plugin("method", name, tmp_path)

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("method", name) for name in ("rome", "ft-m", "core", "bench", "smollm2")),
        *(("dataset", name) for name in ("starter", "zsre-true")),
        *(("metric", name) for name in ("efficacy", "locality-agreement")),
    ],
)
def test_taken_names_are_refused(tmp_path, kind, name):
    with pytest.raises(PluginError, match="already"):
        new_plugin(kind, name, tmp_path)

    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "kedit-my-idea").mkdir()

    with pytest.raises(PluginError, match="exists already"):
        new_plugin("method", "my-idea", tmp_path)

    assert not list((tmp_path / "kedit-my-idea").iterdir())


def test_a_failing_disk_leaves_nothing(tmp_path, monkeypatch):
    written = []

    def fail_late(path, *args, **kwargs):
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        path.touch()

    monkeypatch.setattr(scaffold.Path, "write_text", fail_late)

    with pytest.raises(PluginError, match="No space left"):
        new_plugin("method", "my-idea", tmp_path)

    assert not list(tmp_path.iterdir())
