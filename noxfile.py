"""Everything that is run on this project: `nox -l` lists it, `nox -s tests` is what CI runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
PINNED = ("-c", str(ROOT / "constraints.txt"))
BUILD = ("hatchling", "editables")
DOCS = ("mkdocs-material", "mkdocstrings-python")

nox.options.sessions = ["tests"]
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True


def editables(*folders: Path) -> Iterator[str]:
    """Arguments of pip for folders that stay where they are."""
    for folder in folders:
        yield from ("-e", str(folder))


def install(session: nox.Session) -> None:
    """kedit, its plugins, the model of the demo and all tools, as they are in this folder.

    The pinned list is complete, so nothing is resolved, which would take minutes.  But torch comes
    first with what its build needs, since some builds for Linux load CUDA's libraries.
    """
    session.install(*PINNED, "torch")
    session.install("--no-deps", "-r", str(ROOT / "constraints.txt"))
    session.install("--no-build-isolation", "--no-deps", *editables(ROOT, *PLUGINS))
    session.env["HF_HUB_OFFLINE"] = "1"


@nox.session
def demo(session: nox.Session) -> None:
    """Edit facts in a real model and show what changed."""
    install(session)
    session.run("kedit", "demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Style, types and all tests, then `fresh-method`; after `--` arguments for pytest alone."""
    install(session)
    if session.posargs:
        session.run("pytest", *session.posargs)
        return
    check_style(session)
    session.run("mypy")
    session.notify("fresh-method")
    # A process for each core; a file's tests share what they load.
    session.env["OMP_NUM_THREADS"] = "1"
    session.run("pytest", "-n", "auto", "--maxprocesses", "8", "--dist", "loadfile")


@nox.session
def slow(session: nox.Session) -> None:
    """Tests on the real model that take minutes."""
    install(session)
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style alone."""
    session.install(*PINNED, "ruff")
    check_style(session)


def check_style(session: nox.Session) -> None:
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types of the core."""
    install(session)
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, into `site/`; a broken link is an error."""
    session.install(*PINNED, "-c", str(ROOT / "constraints-docs.txt"), *DOCS)
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Wheels of kedit and every plugin, into `dist/`, tried in an empty environment."""
    session.install(*PINNED, *BUILD)
    dist = ROOT / "dist"
    for old in dist.glob("*.whl"):
        old.unlink()
    session.run(
        *("python", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", str(dist), *map(str, (ROOT, *PLUGINS))),
    )
    empty = Path(session.create_tmp()) / "empty"
    session.run("python", "-m", "venv", "--clear", str(empty))
    programs = empty / ("Scripts" if os.name == "nt" else "bin")
    pip = (str(programs / "python"), "-m", "pip", "install", "-q", *PINNED)
    session.run(*pip, "torch", external=True)
    session.run(*pip, *map(str, sorted(dist.glob("*.whl"))), external=True)
    strict = {"KEDIT_STRICT": "1"}
    session.run(str(programs / "kedit"), "plugins", env=strict, external=True)


@nox.session(name="fresh-method")
def fresh_method(session: nox.Session) -> None:
    """What `kedit new-method` writes can be installed and passes its own tests."""
    install(session)
    folder = Path(session.create_tmp()).resolve()
    made = folder / "kedit-fresh"
    shutil.rmtree(made, ignore_errors=True)
    session.run("kedit", "new-method", "fresh", "--into", str(folder))
    session.install("--no-build-isolation", "--no-deps", *editables(made))
    with session.chdir(made):
        session.run("pytest", "-q", *session.posargs)
    session.run("kedit", "check", "fresh")
