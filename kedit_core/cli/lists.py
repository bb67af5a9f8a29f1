"""Commands that list what is installed.

They answer at once: they load neither torch nor the library of the command line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from kedit_core.cli.printing import echo, echo_json, table
from kedit_core.plugins import Catalog, discover
from kedit_core.spec import DatasetSpec, MethodSpec, MetricSpec, ModelSpec

_SHOWN = 3  # names of a kind in a cell


def list_methods(as_json: bool) -> None:
    """Editing methods."""
    catalog = _installed()
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
    echo(table(rows, ("method", "changes", "batch", "paper", "what it does")))


def list_datasets(as_json: bool) -> None:
    """Datasets to evaluate on."""
    specs = _installed().all(DatasetSpec)
    if as_json:
        keys = ("name", "summary", "licence", "needs_path", "paper")
        return echo_json([{key: getattr(s, key) for key in keys} for s in specs])
    rows = [(s.name, "a path" if s.needs_path else "nothing", s.licence, s.summary) for s in specs]
    echo(table(rows, ("dataset", "needs", "licence", "what it holds")))


def list_metrics(as_json: bool) -> None:
    """Metrics; the name carries the protocol."""
    specs = _installed().all(MetricSpec)
    if as_json:
        return echo_json(
            [{key: getattr(s, key) for key in ("name", "summary", "unit")} for s in specs]
        )
    echo(table([(s.name, s.unit, s.summary) for s in specs], ("metric", "unit", "meaning")))


def list_models(as_json: bool) -> None:
    """Models that come with a package; any folder or hub id works too."""
    specs = _installed().all(ModelSpec)
    if as_json:
        keys = ("name", "summary", "licence", "config")
        return echo_json([{key: getattr(s, key) for key in keys} for s in specs])
    echo(table([(s.name, s.licence, s.summary) for s in specs], ("model", "licence", "what")))


def plugins(as_json: bool) -> None:
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
    rows = [
        (p.name, p.distribution, p.version, p.status, p.error or _counted(p.offers)) for p in found
    ]
    echo(table(rows, ("plugin", "distribution", "version", "status", "offers or why not")))


def _installed() -> Catalog:
    """The catalog; what is missing in it because it does not work is told on stderr."""
    catalog = discover()
    if catalog.failing:
        sys.stderr.write(f"{catalog.failing}\n")
    return catalog


def _counted(offers: Sequence[str]) -> str:
    """How many of each kind there are, with the first names: `1 method: rome`."""
    kinds: dict[str, list[str]] = {}
    for offer in offers:
        kind, _, name = offer.partition(" ")
        kinds.setdefault(kind, []).append(name)
    return "; ".join(
        f"{len(names)} {kind}{'s' * (len(names) > 1)}: "
        + ", ".join([*names[:_SHOWN], *["…"] * (len(names) > _SHOWN)])
        for kind, names in kinds.items()
    )


LISTS: Mapping[str, Callable[[bool], None]] = {
    "list-methods": list_methods,
    "list-datasets": list_datasets,
    "list-metrics": list_metrics,
    "list-models": list_models,
    "plugins": plugins,
}
