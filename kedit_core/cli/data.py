"""`kedit data`: looking at a dataset's files without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kedit_core.cli import options, printing
from kedit_core.errors import DataError
from kedit_core.plugins import Catalog, discover

if TYPE_CHECKING:
    from kedit_core.records import LeftOut, Source
    from kedit_core.request import EditCase, Probe
    from kedit_core.spec import DatasetSpec

SHOWN = 20
COMPARED = 100_000  # different requests that are held to find those that repeat


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Look at a dataset's files.")
    group.command("check")(check)
    group.callback()(_group)
    app.add_typer(group, name="data")


def _group() -> None:
    """Look at a dataset's files."""


Name = Annotated[
    str, typer.Argument(help="From `kedit list-datasets`; settings follow: NAME:KEY=VALUE,…")
]


def check(
    name: Name,
    path: Annotated[str | None, typer.Argument(help="File, folder, or hub:OWNER/NAME.")] = None,
    as_json: options.Json = False,
) -> None:
    """Read a dataset's file whole: how many cases, which rows are left out, and why."""
    from kedit_core.records import LeftOut
    from kedit_core.request import EditCase, repeats

    found: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    asked: Counter[tuple[str, str]] = Counter()
    left: list[LeftOut] = []
    for item in read_dataset(discover(), name, path)[1]:
        if isinstance(item, LeftOut):
            left.append(item)
        elif isinstance(item, EditCase):
            found["cases"] += 1
            kinds.update(f"{p.kind}/{p.name}".rstrip("/") for p in item.probes)
            found["requests"] += len(item.requests)
            found["requests without a subject"] += sum(r.subject is None for r in item.requests)
            if len(asked) < COMPARED:
                asked.update((r.text, r.target_new) for r in item.requests)
        else:
            found["probes"] += 1
    several = repeats(asked)
    found.update({what: len(texts) for what, texts in several.items()})
    malformed = [item for item in left if item.malformed]
    if as_json:
        printing.echo_json(
            {
                **found,
                "probes_by_kind": dict(kinds),
                "left_out": [vars(item) for item in left],
                "malformed": len(malformed),
            }
        )
    else:
        rows = [(what, count) for what, count in (found + kinds).items()]
        rows += [("rows left out", len(left) - len(malformed)), ("malformed rows", len(malformed))]
        typer.echo(printing.table(rows, ("what", "count")))
        shown = sorted(left, key=lambda item: not item.malformed)
        for item in shown[:SHOWN]:
            typer.echo(str(item), err=True)
        if len(left) > SHOWN:
            typer.echo(f"… and {len(left) - SHOWN} more; --json has them all.", err=True)
        for what, texts in several.items():
            typer.echo(f"{what}: {len(texts)}, first {texts[0]!r}", err=True)
    if malformed:
        raise DataError(f"{len(malformed)} of the rows are malformed.")
    if not found["cases"] and not found["probes"]:
        raise DataError("There is no case in it.")


def read_dataset(
    catalog: Catalog, text: str, path: str | None
) -> tuple[DatasetSpec, Iterator[EditCase | Probe | LeftOut]]:
    """The dataset of a name with settings, and what it yields.

    Raises:
        DataError: it needs a path, or the path does not exist.
        UnknownNameError, SettingError: the name or a setting is wrong.
    """
    from kedit_core.named import create, split_named
    from kedit_core.records import HUB

    name, settings = split_named(text)
    spec = catalog.dataset(name)
    if spec.needs_path and path is None:
        raise DataError(f"The dataset '{name}' needs its file or folder.")
    if path is not None and not path.startswith(HUB) and not Path(path).exists():
        raise DataError(f"{path} does not exist. Give the dataset's file or folder.")
    adapter = create(spec, settings)
    source: Source | None = path if path is None or path.startswith(HUB) else Path(path)
    if spec.holds == "probes":
        return spec, adapter.probes(source)
    return spec, adapter.cases(source)
