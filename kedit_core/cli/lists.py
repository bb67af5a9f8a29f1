"""Commands that list what is installed.  None of them loads torch."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kedit_core.cli.options import Json, echo_json, table
from kedit_core.plugins import discover
from kedit_core.spec import DatasetSpec, MethodSpec, MetricSpec, ModelSpec


def register(app: typer.Typer) -> None:
    for name, command in (
        ("list-methods", list_methods),
        ("list-datasets", list_datasets),
        ("list-metrics", list_metrics),
        ("list-models", list_models),
        ("plugins", plugins),
        ("presets", presets),
    ):
        app.command(name)(command)


def list_methods(as_json: Json = False) -> None:
    """Editing methods."""
    catalog = discover()
    specs = catalog.all(MethodSpec)
    if as_json:
        return echo_json(
            [
                {
                    "name": s.name,
                    "summary": s.summary,
                    "effect": s.effect,
                    "max_batch": s.max_batch,
                    "sequential": s.sequential,
                    "needs": sorted(s.needs),
                    "variant_of": s.variant_of or None,
                    "paper": s.paper,
                    "distribution": catalog.plugin_of(s).distribution,
                }
                for s in specs
            ]
        )
    rows = [(s.name, s.effect, s.max_batch or "any", s.paper, s.summary) for s in specs]
    typer.echo(table(rows, ("method", "changes", "batch", "paper", "what it does")))


def list_datasets(as_json: Json = False) -> None:
    """Datasets to evaluate on."""
    specs = discover().all(DatasetSpec)
    if as_json:
        keys = ("name", "summary", "licence", "needs_path", "paper")
        return echo_json([{key: getattr(s, key) for key in keys} for s in specs])
    rows = [(s.name, "a path" if s.needs_path else "nothing", s.licence, s.summary) for s in specs]
    typer.echo(table(rows, ("dataset", "needs", "licence", "what it holds")))


def list_metrics(as_json: Json = False) -> None:
    """Metrics; the name carries the protocol."""
    specs = discover().all(MetricSpec)
    if as_json:
        return echo_json(
            [{key: getattr(s, key) for key in ("name", "summary", "unit")} for s in specs]
        )
    typer.echo(table([(s.name, s.unit, s.summary) for s in specs], ("metric", "unit", "meaning")))


def list_models(as_json: Json = False) -> None:
    """Models that come with a package; any folder or hub id works too."""
    specs = discover().all(ModelSpec)
    if as_json:
        keys = ("name", "summary", "licence", "config")
        return echo_json([{key: getattr(s, key) for key in keys} for s in specs])
    typer.echo(table([(s.name, s.licence, s.summary) for s in specs], ("model", "licence", "what")))


def plugins(as_json: Json = False) -> None:
    """Installed plugins, and why one does not work."""
    found = discover().plugins
    if as_json:
        return echo_json(
            [
                {
                    "name": p.name,
                    "distribution": p.distribution,
                    "version": p.version,
                    "status": p.status,
                    "offers": list(p.offers),
                    "error": p.error or None,
                }
                for p in found
            ]
        )
    rows: list[Any] = [
        (p.name, p.distribution, p.version, p.status, p.error or ", ".join(p.offers)) for p in found
    ]
    typer.echo(table(rows, ("plugin", "distribution", "version", "status", "offers or why not")))


def presets(
    method: Annotated[str, typer.Argument(help="Name from `kedit list-methods`.")],
    as_json: Json = False,
) -> None:
    """Presets of a method: settings, the models they fit, and their source."""
    from kedit_core.hparams import presets_of

    found = presets_of(discover().method(method))
    if as_json:
        return echo_json(
            [
                {
                    "name": p.name,
                    "source": p.source,
                    "fits": dict(p.fits),
                    "settings": dict(p.settings),
                }
                for p in found
            ]
        )
    rows = [
        (
            p.name,
            ", ".join(f"{k}={v}" for k, v in p.fits.items()) or "on request",
            ", ".join(f"{k}={v}" for k, v in p.settings.items()),
            p.source,
        )
        for p in found
    ]
    typer.echo(table(rows, ("preset", "fits", "settings", "source")))
