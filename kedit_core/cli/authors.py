"""Commands for authors of plugins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from kedit_core.cli.options import Json
from kedit_core.cli.printing import echo_json
from kedit_core.errors import UnknownNameError
from kedit_core.plugins import Catalog, discover
from kedit_core.scaffold import Kind, new_plugin
from kedit_core.spec import DatasetSpec, MethodSpec, MetricSpec, Spec

# What `kedit new-…` writes works at once; this shows it.
_TRY: Mapping[Kind, str] = {
    "method": "kedit check {name}",
    "dataset": "kedit data check {name} {folder}/tests/files/example.jsonl",
    "metric": "pytest {folder}",
}
# What has no conformance suite, and what can be done with it.
_UNCHECKED: Mapping[type[Spec], str] = {
    DatasetSpec: "is a dataset; `kedit data check {name}` reads a file with it.",
    MetricSpec: "is a metric; `kedit eval --metric {name}` computes it.",
}


def register(app: typer.Typer) -> None:
    app.command()(check)
    for kind in _TRY:
        app.command(f"new-{kind}", help=f"Write a plugin with a small {kind} to begin with.")(
            _new(kind)
        )


def check(
    methods: Annotated[list[str] | None, typer.Argument(help="Methods; all by default.")] = None,
    as_json: Json = False,
) -> None:
    """Run the conformance suite on installed methods."""
    catalog = discover()
    specs = [_method(catalog, name) for name in methods or ()] or catalog.all(MethodSpec)

    from kedit_core.cli.options import quiet
    from kedit_core.testing import run_checks

    quiet()
    reports = {spec.name: run_checks(spec, catalog=catalog) for spec in specs}
    if as_json:
        echo_json({name: report.as_data() for name, report in reports.items()})
    else:
        for report in reports.values():
            typer.echo(report.table())
    if not all(report.ok for report in reports.values()):
        raise typer.Exit(1)


def _method(catalog: Catalog, name: str) -> MethodSpec:
    try:
        return catalog.method(name)
    except UnknownNameError:
        for kind, what in _UNCHECKED.items():
            if any(spec.name == name for spec in catalog.all(kind)):
                raise UnknownNameError(f"'{name}' {what.format(name=name)}") from None
        raise


def _new(kind: Kind) -> Callable[..., None]:
    def new(
        name: Annotated[str, typer.Argument(help="What it shall be called, for example my-idea.")],
        into: Annotated[Path, typer.Option(help="Folder in which kedit-NAME is made.")] = Path(),
    ) -> None:
        folder = new_plugin(kind, name, into)
        typer.echo(f"Written: {folder}", err=True)
        shown = _TRY[kind].format(name=name, folder=folder)
        typer.echo(f"Next: pip install -e {folder} && {shown}", err=True)

    return new
