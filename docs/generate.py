"""Rewrite the table of methods in README.md from the installed plugins.

`python docs/generate.py` writes it; `--check` only says, by its exit code, whether it is stale.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from kedit_core import MethodSpec, discover

ROOT = Path(__file__).parents[1]
START, END = "<!-- methods:start -->", "<!-- methods:end -->"
HOOK = "kedit_register_methods"
HEADER = ("method", "changes", "batch", "paper", "what it does", "install")


def methods_table() -> str:
    """The methods of this project's plugins as a Markdown table.

    Raises:
        SystemExit: a plugin of this project is not installed or is broken.
    """
    ours = {tomllib.loads(f.read_text("utf-8"))["project"]["name"] for f in _with_methods()}
    catalog = discover()
    working = {plugin.distribution for plugin in catalog.plugins if not plugin.error}
    if missing := sorted(ours - working):
        raise SystemExit(
            f"Not installed, or broken (see `kedit plugins`): {', '.join(missing)}. The table "
            f"would lack what they offer."
        )
    rows = [
        _row(spec, catalog.plugin_of(spec).distribution)
        for spec in catalog.all(MethodSpec)
        if catalog.plugin_of(spec).distribution in ours
    ]
    return "\n".join([_line(HEADER), _line(["---"] * len(HEADER)), *map(_line, rows)])


def with_table(text: str, table: str) -> str:
    """`text` with the table between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the markers {START} and {END} are not both there")
    return f"{before}{START}\n{table}\n{END}{after}"


def main(arguments: Sequence[str]) -> None:
    """Write the table, or with `--check` leave with 1 where it is stale."""
    readme = ROOT / "README.md"
    old = readme.read_text("utf-8")
    new = with_table(old, methods_table())
    if "--check" not in arguments:
        readme.write_text(new, "utf-8")
    elif new != old:
        raise SystemExit("The table of methods in README.md is stale: python docs/generate.py")


def _with_methods() -> list[Path]:
    """The project files of the plugins that register methods."""
    modules = (ROOT / "plugins").glob("*/src/*/plugin.py")
    return [m.parents[2] / "pyproject.toml" for m in modules if HOOK in m.read_text("utf-8")]


def _row(spec: MethodSpec, distribution: str) -> tuple[str, ...]:
    batch = "any" if spec.max_batch is None else str(spec.max_batch)
    what = spec.summary.replace("|", "\\|")
    install = f"`pip install {distribution}`"
    return (f"`{spec.name}`", spec.effect, batch, _link(spec.paper), what, install)


def _link(paper: str) -> str:
    found = re.fullmatch(r"arXiv:(\S+)", paper)
    return f"[{paper}](https://arxiv.org/abs/{found[1]})" if found else paper


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(sys.argv[1:])
