"""Imports point one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each layer may import of kedit.  "own" is the module's own package.
MAY_IMPORT = {
    "light": {"light"},
    "heavy": {"light", "heavy"},
    "numerics": {"light", "heavy", "numerics"},
    "testing": {"light", "heavy", "numerics", "testing"},
    "bench": {"light", "heavy", "numerics", "own"},
    "plugin": {"light", "heavy", "numerics", "own"},
    "entry": {"light"},
}
# Which modules make the layers, by name or by package; the first line that fits counts.
LAYERS = {
    "entry": ("*.plugin", "*.hparams"),
    "light": (
        *("kedit_core", "kedit_core.errors", "kedit_core.spec", "kedit_core.hookspecs"),
        *("kedit_core.request", "kedit_core.hparams", "kedit_core.plugins", "kedit_core.protocols"),
        *("kedit_core.sites", "kedit_core.paths", "kedit_core.files", "kedit_core.models"),
        *("kedit_core.scaffold", "kedit_core.records", "kedit_core.cases", "kedit_core.cli.*"),
        *("kedit_core.ask", "kedit_core.words", "kedit_core.named", "kedit_core.measure"),
        *("kedit_core.encoder", "kedit_core.targets", "kedit_core.texts"),
    ),
    "numerics": ("kedit_core.numerics.*",),
    "testing": ("kedit_core.testing.*",),
    "heavy": ("kedit_core.*",),
    "bench": ("kedit_bench.*",),
    "plugin": ("kedit_*",),
}
# The layers that every command loads: only imports inside functions may be of these.
LISTED = {"light", "entry"}
HEAVY = {
    *("torch", "transformers", "tokenizers", "safetensors", "peft", "accelerate", "datasets"),
    *("numpy", "scipy", "pandas", "gguf", "huggingface_hub"),
}


@dataclass(frozen=True)
class Import:
    """One imported module, its line, and whether it is loaded with the module itself."""

    name: str
    line: int
    at_once: bool


def layer_of(module: str) -> str | None:
    """The layer of a kedit module; None for everything else."""
    if not module.startswith("kedit_"):
        return None
    for layer, patterns in LAYERS.items():
        for pattern in patterns:
            if pattern.startswith("*"):
                fits = module.endswith(pattern[1:]) and module != f"kedit_core{pattern[1:]}"
            elif pattern.endswith(".*"):
                fits = f"{module}.".startswith(pattern[:-1])
            else:
                fits = module == pattern or (layer == "plugin" and module.startswith("kedit_"))
            if fits:
                return layer
    return None


def imports_of(tree: ast.Module, module: str, modules: set[str]) -> Iterator[Import]:
    """What a module imports, without what only type checkers read."""

    def visit(node: ast.AST, at_once: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child, at_once)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_once)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # the tests do not depend on whether a package writes relative imports
                parent = module.split(".")[: -node.level]
                base = ".".join([*parent, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Import(full if full in modules else base, node.lineno, at_once)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_once and not inside)

    yield from visit(tree, True)


def violations(sources: dict[str, str]) -> list[str]:
    """Every import that points the wrong way, as `module:line: reason`."""
    modules, found = set(sources), []
    for module, source in sources.items():
        layer = layer_of(module)
        package = module.partition(".")[0]
        for imported in imports_of(ast.parse(source), module, modules):
            here = f"{module}:{imported.line}"
            top = imported.name.partition(".")[0]
            target = layer_of(imported.name)
            if target is None:
                if layer in LISTED and imported.at_once and top in HEAVY:
                    found.append(f"{here}: {layer} loads {top}")
                continue
            if package == "kedit_core" and top != "kedit_core":
                found.append(f"{here}: the core imports {top}")
            elif layer in LISTED and not imported.at_once:
                continue
            elif target in ("plugin", "entry", "bench") and top != package:
                found.append(f"{here}: {package} imports {top}")
            elif target not in MAY_IMPORT[layer or ""] and not (
                "own" in MAY_IMPORT[layer or ""] and top == package
            ):
                found.append(f"{here}: {layer} imports {imported.name}, which is {target}")
    return found


def sources() -> dict[str, str]:
    """All modules of the core, the benchmark and the plugins."""
    found = {}
    for base in (ROOT, *sorted((ROOT / "plugins").glob("*/src"))):
        for file in sorted(base.glob("kedit_*/**/*.py")):
            parts = file.relative_to(base).with_suffix("").parts
            if "_template" not in parts:
                found[".".join(parts).removesuffix(".__init__")] = file.read_text("utf-8")
    return found


def test_imports_point_one_way():
    assert violations(sources()) == []


def test_table_names_modules_that_exist():
    named = [name for names in LAYERS.values() for name in names if "*" not in name]

    assert [name for name in named if name not in sources()] == []
    assert {layer_of(name) for name in sources()} == set(LAYERS)


OFFENCES = {
    "light loads torch": ("kedit_core.spec", "import torch.nn"),
    "light loads numpy": (
        "kedit_core.cli.lists",
        "try:\n    from numpy import array\nfinally: pass",
    ),
    "light imports kedit_core.host, which is heavy": (
        "kedit_core.files",
        "from kedit_core.host import ModelHost",
    ),
    "heavy imports kedit_core.numerics.solve, which is numerics": (
        "kedit_core.session",
        "from kedit_core.numerics import solve",
    ),
    "heavy imports kedit_core.testing.toys, which is testing": (
        "kedit_core.host",
        "def f():\n    import kedit_core.testing.toys",
    ),
    "the core imports kedit_bench": (
        "kedit_core.cli.models",
        "def f():\n    from kedit_bench import demo",
    ),
    "the core imports kedit_rome": ("kedit_core.numerics.solve", "import kedit_rome"),
    "kedit_bench imports kedit_rome": ("kedit_bench.demo", "import kedit_rome.method"),
    "kedit_rome imports kedit_ft": ("kedit_rome.method", "from kedit_ft.method import FineTuning"),
    "kedit_ft imports kedit_bench": ("kedit_ft.method", "def f():\n    import kedit_bench.demo"),
    "entry loads transformers": ("kedit_ft.plugin", "import transformers"),
    "entry imports kedit_core.editing, which is heavy": (
        "kedit_ft.hparams",
        "from kedit_core.editing import EditJob",
    ),
    "entry imports kedit_ft.method, which is plugin": ("kedit_ft.plugin", "from . import method"),
}


@pytest.mark.parametrize("reason", OFFENCES)
def test_offence_is_caught(reason):
    module, source = OFFENCES[reason]
    others = ("kedit_core.host", "kedit_core.numerics.solve", "kedit_ft.method")

    found = violations({**dict.fromkeys(others, ""), module: source})

    (line,) = found
    assert line.startswith(f"{module}:")
    assert line.endswith(f": {reason}")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kedit_core.spec", "def f():\n    import torch"),
        ("kedit_core.protocols", "if TYPE_CHECKING:\n    from kedit_core.job import EditJob"),
        ("kedit_core.cli.edits", "def f():\n    from kedit_core.editing import EditSession"),
        ("kedit_core.numerics.solve", "from kedit_core.host import ModelHost\nimport torch"),
        ("kedit_ft.method", "from kedit_ft.hparams import X\nfrom kedit_core.numerics import y"),
        ("kedit_ft.plugin", "from kedit_core import MethodSpec, hookimpl"),
        ("kedit_bench.single", "from kedit_bench.metrics import Efficacy\nimport torch"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert violations({module: source}) == []
