"""`kedit data`: looking at a dataset's files without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from kedit_core.cli import options, printing
from kedit_core.errors import DataError, did_you_mean
from kedit_core.named import read_dataset
from kedit_core.plugins import discover
from kedit_core.spec import MetricSpec

if TYPE_CHECKING:
    from kedit_core.plugins import Catalog
    from kedit_core.records import LeftOut

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
    from kedit_core.records import LeftOut, checked
    from kedit_core.request import EditCase, Probe, repeats

    catalog = discover()
    spec, items = read_dataset(catalog, name, path)
    found: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    families: Counter[str] = Counter()
    asked: Counter[tuple[str, str]] = Counter()
    left: list[LeftOut] = []
    for item in checked(items, Probe if spec.holds == "probes" else EditCase, to_the_end=True):
        probes: Sequence[Probe] = ()
        if isinstance(item, LeftOut):
            left.append(item)
        elif isinstance(item, EditCase):
            probes = item.probes
            found["cases"] += 1
            found["requests"] += len(item.requests)
            found["requests without a subject"] += sum(r.subject is None for r in item.requests)
            if len(asked) < COMPARED:
                asked.update((r.text, r.target_new) for r in item.requests)
        elif isinstance(item, Probe):
            probes = (item,)
            found["probes"] += 1
        kinds.update(p.kind for p in probes)
        families.update(f"{p.kind}/{p.name}".rstrip("/") for p in probes)
    several = repeats(asked)
    found.update({what: len(texts) for what, texts in several.items()})
    malformed = [item for item in left if item.malformed]
    if as_json:
        printing.echo_json(
            {
                **found,
                "probes_by_kind": dict(families),
                "left_out": [vars(item) for item in left],
                "malformed": len(malformed),
            }
        )
    else:
        rows = [(what, count) for what, count in (found + families).items()]
        rows += [("rows left out", len(left) - len(malformed)), ("malformed rows", len(malformed))]
        typer.echo(printing.table(rows, ("what", "count")))
        shown = sorted(left, key=lambda item: not item.malformed)
        for item in shown[:SHOWN]:
            typer.echo(str(item), err=True)
        if len(left) > SHOWN:
            typer.echo(f"… and {len(left) - SHOWN} more; --json has them all.", err=True)
        for what, texts in several.items():
            typer.echo(f"{what}: {len(texts)}, first {texts[0]!r}", err=True)
        for line in _uncounted(catalog, kinds):
            typer.echo(line, err=True)
    if malformed:
        raise DataError(f"{len(malformed)} of the rows are malformed.")
    if not found["cases"] and not found["probes"]:
        raise DataError("There is no case in it.")


def _uncounted(catalog: Catalog, kinds: Mapping[str, int]) -> Iterator[str]:
    """Sentences about probes of kinds that no installed metric names."""
    known = {kind for spec in catalog.all(MetricSpec) for kind in spec.probe.split(", ") if kind}
    for kind, count in kinds.items():
        if kind not in known:
            probes = "1 probe" if count == 1 else f"{count} probes"
            counted = f"{'is' if count == 1 else 'are'} counted by no metric"
            yield f"{probes} of kind '{kind}' {counted}. {did_you_mean(kind, known)}"
