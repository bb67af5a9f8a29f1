"""`kedit eval`, `kedit eval rescore` and `kedit eval compare`."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from kedit_bench.journal import Journal, only_one
from kedit_bench.regime import Regime
from kedit_bench.results import broken_of, read_result, results_of, scorer_of, write_result
from kedit_bench.run import Run, digest_of, with_probes
from kedit_bench.scoring import UNEDITED, Chosen, MissingAnswerError, choose_metrics
from kedit_core.cli import options, printing
from kedit_core.errors import (
    DataError,
    KEditError,
    SettingError,
    UnknownNameError,
    did_you_mean,
)
from kedit_core.hookspecs import CellFinished
from kedit_core.named import read_dataset, split_named
from kedit_core.plugins import Catalog, discover
from kedit_core.records import checked
from kedit_core.request import EditCase, Probe
from kedit_core.spec import MethodSpec

if TYPE_CHECKING:
    from kedit_bench.unedited import Asker
    from kedit_core.editing import EditSession

app = typer.Typer(add_completion=False)

Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        help="Name from `kedit list-metrics`, or a pattern with *; settings follow: "
        "NAME:KEY=VALUE,…. Repeatable.",
    ),
]


@dataclass(frozen=True)
class Wanted:
    """A method with its settings, as it is named in results."""

    label: str
    spec: MethodSpec
    settings: dict[str, Any]


@app.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Name from `kedit list-models`, folder or hub id.")
    ] = "",
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="Name from `kedit list-methods`; settings follow: NAME:KEY=VALUE,…. Repeatable.",
        ),
    ] = None,
    dataset: Annotated[
        str,
        typer.Option(help="Name from `kedit list-datasets`; settings follow: NAME:KEY=VALUE,…."),
    ] = "",
    data: Annotated[
        str | None, typer.Option(help="The dataset's file or folder, or hub:OWNER/NAME.")
    ] = None,
    probes: Annotated[
        list[str] | None,
        typer.Option(help="A dataset of probes to ask besides, as NAME=PATH. Repeatable."),
    ] = None,
    probes_per_case: Annotated[int, typer.Option(min=1, help="How many of them a case.")] = 1,
    metric: Metrics = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first cases.")] = None,
    regime: Annotated[
        str, typer.Option(help="single, batch:N, sequential, or sequential:N.")
    ] = "single",
    score_every: Annotated[
        int | None,
        typer.Option(
            min=1, help="In a sequence, ask all cases so far after so many. [default: 1, 10, 100…]"
        ),
    ] = None,
    preset: options.Preset = None,
    hparams: options.HparamsFile = None,
    settings: options.Set = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for everything; the same command goes on with it.")
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    corpus: options.CorpusOption = "self",
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Score methods on a dataset, side by side with the unedited model.

    Neither a method that cannot be evaluated nor a metric that fails stops the others.
    """
    if context.invoked_subcommand is not None:
        return
    for name, given in (("--model", model), ("--method", method), ("--dataset", dataset)):
        if not given:
            raise SettingError(f"{name} is missing. See `kedit eval --help`.")
    catalog = discover()
    wanted = _methods(catalog, method or [], model, preset, hparams, settings)
    how = Regime.parse(regime)
    spec, items = read_dataset(catalog, dataset, data)  # a wrong name or path is told at once
    if spec.holds != "cases":
        raise SettingError(
            f"'{dataset}' is a dataset of {spec.holds}, and there is nothing to edit in it. Give "
            f"it with --probes, besides a --dataset of cases."
        )
    further = [_probes(catalog, pair) for pair in probes or []]
    chosen = choose_metrics(catalog, metric or [], spec)

    session = options.open_session(
        catalog,
        model,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        seed=seed,
        corpus=corpus,
    )
    from kedit_bench.unedited import Asker, SpoiltModelError

    asker = Asker(session)
    with contextlib.ExitStack() as stack:
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(only_one(folder))
        run = Run(folder)
        dtype_name = str(session.host.dtype).removeprefix("torch.")
        identity = {
            "model": model,
            "weights": asker.weights,
            "dtype": dtype_name,
            **{name: asker.key[name] for name in ("device", "torch", "transformers")},
            "dataset": dataset,
            "data": digest_of(data) if data is not None else None,
            "probes": {p: digest_of(p.partition("=")[2]) for p in probes or []},
            "probes_per_case": probes_per_case,
            "limit": limit,
            "regime": regime,
            "score_every": score_every,
            "metrics": [c.name for c in chosen],
            "seed": seed,
            "corpus": corpus,
        }
        found = cast(Any, checked(cast(Any, items), EditCase))
        for listed in further:
            found = with_probes(found, listed, probes_per_case)
        count = run.begin(identity, found, limit)
        results, failures = [], []
        for w in wanted:
            try:
                results.append(
                    _run_cell(session, asker, run, count, w, how, chosen, identity, preset, hparams)
                )
            except KEditError as error:
                if len(wanted) == 1:
                    raise
                failures.append(f"{w.label} was not evaluated: {error}")
                if isinstance(error, SpoiltModelError):
                    break
        if results:
            from kedit_bench.report import write_reports

            labels = {result["label"] for result in results}
            earlier = [result for result in results_of(run) if result["label"] not in labels]
            write_reports(run, [*earlier, *results])
        if as_json:
            printing.echo_json({"run": run.identity, "results": results})
        elif results:
            _show(results)
            for line in _notes(run, count, results):
                typer.echo(line, err=True)
            if out is not None:
                typer.echo(f"Raw answers, tables and plots: {out}", err=True)
        _end([*_broken(results, chosen), *failures])


@app.command()
def rescore(
    folder: Annotated[Path, typer.Argument(help="What --out of `kedit eval` was.")],
    metric: Metrics = None,
    as_json: options.Json = False,
) -> None:
    """Compute metrics anew from kept answers; no model is needed.

    Scores of other metrics stay as they are.  A method that was not evaluated to the end is
    passed over.  Of a pattern, and where no metric is named, those whose answers were not kept are
    left out.
    """
    run = Run(folder)
    identity = run.identity
    chosen = choose_metrics(discover(), metric or identity["metrics"])
    if not metric:
        chosen = [replace(one, by_pattern=True) for one in chosen]
    with only_one(folder):
        cells = [cell for cell in run.cells() if read_result(cell) is not None]
        if not cells:
            raise DataError(
                f"{folder} holds no method that was evaluated to the end. Give the same `kedit "
                f"eval` command again, and it goes on."
            )
        for cell in run.cells():
            if cell not in cells:
                typer.echo(f"{run.about(cell)['label']} was not evaluated to the end.", err=True)
        results = [_rescored(run, cell, chosen) for cell in cells]
        from kedit_bench.report import write_reports

        write_reports(run, results)
    if as_json:
        printing.echo_json({"run": identity, "results": results})
    else:
        _show(results)
    _end(_broken(results, chosen))


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="What --out of `kedit eval` was.")],
    to: Annotated[
        str, typer.Option(help="A method of the evaluation, as it is named there; or unedited.")
    ] = UNEDITED,
    as_json: options.Json = False,
) -> None:
    """Show how far methods differ, case by case, with 95 % intervals.

    A difference is taken over the cases that both have.  Of a sequence, the scores right after
    each edit and at the end are compared.
    """
    run = Run(folder)
    cells = {str(r["label"]): c for c in run.cells() if (r := read_result(c)) is not None}
    if to not in (UNEDITED, *cells):
        raise UnknownNameError(f"{folder} has no scores of '{to}'. {did_you_mean(to, cells)}")
    from kedit_bench.paired import differences

    found = list(differences(cells, to))
    if as_json:
        return printing.echo_json([asdict(difference) for difference in found])
    from kedit_bench.report import difference_rows

    header, rows = difference_rows(found)
    typer.echo(f"Difference to {to}, with its 95 % interval (cases)")
    typer.echo(printing.table(rows, header))


def _rescored(run: Run, cell: Path, chosen: Sequence[Chosen]) -> dict[str, Any]:
    """A cell's result; it tells which metrics of a pattern lack answers and are left out."""
    about, kept, missing = run.about(cell), list(chosen), list[str]()
    while True:
        try:
            result = write_result(cell, about, run.cases(), scorer_of(run.identity, kept))
            break
        except MissingAnswerError as error:
            lacking = next(c for c in kept if c.name == error.metric)
            if not lacking.by_pattern or len(kept) == 1:
                raise
            kept.remove(lacking)
            missing.append(lacking.name)
    if missing:
        typer.echo(f"{about['label']} holds no answers for {', '.join(missing)}.", err=True)
    return result


def _show(results: Sequence[dict[str, Any]]) -> None:
    from kedit_bench.report import cases_note, terminal, unscored_notes

    typer.echo(terminal(results))
    for note in filter(None, (cases_note(results), *unscored_notes(results))):
        typer.echo(note, err=True)


def _methods(
    catalog: Catalog,
    names: Sequence[str],
    model: str,
    preset: str | None,
    file: Path | None,
    pairs: Sequence[str] | None,
) -> list[Wanted]:
    """The methods and their settings, checked before weights are read."""
    wanted = []
    for text in names:
        name, own = split_named(text)
        spec = catalog.method(name)
        both = [*(pairs or ()), *(f"{key}={value}" for key, value in own.items())]
        settings = options.check_settings(catalog, spec, model, preset, file, both)
        wanted.append(Wanted(text, spec, settings))
    if len({w.label for w in wanted}) < len(wanted):
        raise SettingError("A method is given twice with the same settings.")
    return wanted


def _probes(catalog: Catalog, pair: str) -> Iterator[Any]:
    name, equals, path = pair.partition("=")
    if not (equals and path):
        raise SettingError(f"'{pair}' is no dataset of probes. Write --probes NAME=PATH.")
    spec, found = read_dataset(catalog, name, path)
    if spec.holds != "probes":
        raise SettingError(f"'{name}' is a dataset of cases. Give it with --dataset instead.")
    return checked(cast(Any, found), Probe)


def _run_cell(
    session: EditSession,
    asker: Asker,
    run: Run,
    count: int,
    wanted: Wanted,
    regime: Regime,
    chosen: Sequence[Chosen],
    identity: dict[str, Any],
    preset: str | None,
    file: Path | None,
) -> dict[str, Any]:
    from kedit_bench.cell import Cell
    from kedit_core.hparams import resolve
    from kedit_core.progress import progress

    hparams = resolve(
        wanted.spec,
        preset=preset,
        file=file,
        settings=wanted.settings,
        config=session.host.config,
    ).hparams
    info = session.catalog.plugin_of(wanted.spec)
    about = {
        "method": wanted.spec.name,
        "label": wanted.label,
        "plugin": f"{info.distribution} {info.version}".strip(),
        "hparams": hparams.model_dump(mode="json"),
    }
    folder = run.cell_folder(wanted.label, about)
    points = _checkpoints(count, identity["score_every"])
    cell = Cell(folder, wanted.spec, hparams, regime, scorer_of(identity, chosen), points)
    try:
        with progress(count, f"{wanted.label} on {identity['dataset']}", "case") as bar:
            cell.run(session, asker, run.cases(), bar.update)
    except KEditError as error:
        _check_unedited(asker, cell.journal, wanted.label, str(error))
        raise
    _check_unedited(asker, cell.journal, wanted.label)
    while True:
        try:
            result = write_result(folder, about, run.cases(), cell.scorer)
            break
        except MissingAnswerError as error:  # of a metric that failed when it was to ask
            cell.scorer.broken[error.metric] = error
    session.catalog.notify("kedit_cell_finished", CellFinished(str(folder), result))
    return result


def _check_unedited(asker: Asker, journal: Journal, label: str, problem: str = "") -> None:
    """Refuse to go on, and to take the journal for true, where a method has spoilt the model."""
    from kedit_bench.unedited import SpoiltModelError

    try:
        asker.check()
    except SpoiltModelError as error:
        said = f"{problem or error} So {label} and what comes after it cannot be scored."
        if journal.path.exists():
            void = journal.path.replace(journal.path.with_name("answers.void.jsonl"))
            said += f" Its answers may be false; they are in {void}, and nothing reads them."
        raise SpoiltModelError(said) from None


def _broken(results: Sequence[dict[str, Any]], chosen: Sequence[Chosen]) -> list[str]:
    """Sentences about chosen metrics that failed, each once."""
    said: dict[str, list[str]] = {}
    for result in results:
        why = broken_of(result)
        for name in (c.name for c in chosen if c.name in why):
            said.setdefault(why[name], []).append(result["label"])
    return [f"{', '.join(labels)}: {why}" for why, labels in said.items()]


def _end(failures: Sequence[str]) -> None:
    """Tell what failed, and leave with exit code 1 if anything did."""
    for line in failures:
        typer.echo(line, err=True)
    if failures:
        raise typer.Exit(1)


def _checkpoints(count: int, every: int | None) -> frozenset[int]:
    if every is not None:
        return frozenset(range(every, count, every))
    return frozenset(itertools.takewhile(lambda n: n < count, (10**k for k in range(12))))


def _notes(run: Run, count: int, results: Sequence[dict[str, Any]]) -> Iterator[str]:
    from kedit_bench.report import kept_note

    left = run.left_out()
    if left:
        yield f"{len(left)} rows of the data made no case; the first: {left[0]}."
    for result in results:
        seconds = result["seconds_per_edit"]
        if seconds is not None:
            yield f"{result['label']}: {seconds:.2f} s per edit (median of {result['timed']})."
        if result["kept_targets"]:
            yield kept_note(result)
        if result["preparation_seconds"] is not None:
            yield f"{result['label']}: {result['preparation_seconds']:.1f} s of preparation."
        if result["left_out"]:
            reason = next(iter(result["left_out"].values()))
            yield f"{result['label']} left out {len(result['left_out'])} cases: {reason}"
        if result["failed"]:
            reason = next(iter(result["failed"].values()))
            failed = f"{result['label']} failed on {len(result['failed'])} cases"
            yield f"{failed}, scored without the edit: {reason}"
        if result["cut_prompts"]:
            yield f"{result['cut_prompts']} prompts were too long and lost their beginning."
