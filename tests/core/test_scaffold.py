"""`new_method` writes a plugin that works as it is."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from kedit_core import MethodSpec, PluginError, discover, scaffold
from kedit_core.hparams import presets_of
from kedit_core.scaffold import new_method
from kedit_core.testing import run_checks


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
    folder = new_method("my-idea", tmp_path)

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


def test_the_rendered_method_passes_every_check(tmp_path, imported):
    folder = new_method("my-idea", tmp_path)
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


@pytest.mark.parametrize("name", ["on", "a1", "a-very-long-name-of-30-letters"])
def test_unusual_names_render_too(tmp_path, imported, name):
    package = f"kedit_{name.replace('-', '_')}"

    plugin = imported(new_method(name, tmp_path), package)

    spec = discover(extra=[(name, plugin)]).method(name)
    assert isinstance(spec, MethodSpec)
    assert callable(spec.load()(None).edit)
    assert [preset.name for preset in presets_of(spec)] == ["toy"]


@pytest.mark.parametrize("name", ["my-idea", "a-very-long-name-of-30-letters", "zz"])
def test_the_rendered_files_are_clean(tmp_path, name):
    pytest.importorskip("ruff")
    folder = new_method(name, tmp_path)

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
        new_method(name, tmp_path)

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["rome", "ft-m", "core", "bench", "smollm2"])
def test_taken_names_are_refused(tmp_path, name):
    with pytest.raises(PluginError, match="already"):
        new_method(name, tmp_path)

    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "kedit-my-idea").mkdir()

    with pytest.raises(PluginError, match="exists already"):
        new_method("my-idea", tmp_path)

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
        new_method("my-idea", tmp_path)

    assert not list(tmp_path.iterdir())
