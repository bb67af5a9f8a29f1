"""`kedit tune`: a preset for a model that has none."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from kedit_bench.journal import Journal, only_one
from kedit_bench.search import Found, Score, Search, Space, Trial, space_of
from kedit_core.cli import options, printing
from kedit_core.errors import DataError, MissingSettingError, SettingError
from kedit_core.files import new_file
from kedit_core.hparams import parse_settings
from kedit_core.models import check, known_config
from kedit_core.named import read_dataset
from kedit_core.plugins import Catalog, discover
from kedit_core.records import checked
from kedit_core.request import EditCase
from kedit_core.spec import MethodSpec

FORMAT = 1
MINUTES = 30  # where no budget is given
FITS = ("model_type", "hidden_size", "num_hidden_layers")
WORSE = "The best settings did worse on the facts held out, so the start is kept."
HEADER = ("score", "efficacy", "rephrase", "neighbours", "s/edit")


def tune(
    method: Annotated[str, typer.Argument(help="Name from `kedit list-methods`.")],
    model: options.Model,
    dataset: Annotated[
        str,
        typer.Option(help="Name from `kedit list-datasets`; settings follow: NAME:KEY=VALUE,…."),
    ] = "starter",
    data: Annotated[
        str | None, typer.Option(help="The dataset's file or folder, or hub:OWNER/NAME.")
    ] = None,
    facts: Annotated[
        int, typer.Option(min=2, help="How many to take; a third of them is held out.")
    ] = 24,
    budget: Annotated[
        float | None, typer.Option(min=0, help=f"Minutes of work. [default: {MINUTES}]")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Settings to try at most, the start among them.")
    ] = None,
    preset: options.Preset = None,
    hparams: options.HparamsFile = None,
    settings: options.Set = None,
    search: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B,C", help="Candidates of one setting; repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; the same command goes on. [default: METHOD-MODEL.yaml]"),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    corpus: options.CorpusOption = "self",
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Search settings of a method for a model, and write them as a preset."""
    catalog = discover()
    spec = catalog.method(method)
    if not spec.writes_facts:
        raise SettingError(f"{method} writes no facts, so there is nothing to score it by.")
    check(model, catalog)
    config = known_config(model, catalog)
    how = {"preset": preset, "file": hparams, "settings": parse_settings(settings or ())}
    candidates = _candidates(search or ())
    try:
        space_of(spec, candidates, (config or {}).get("num_hidden_layers", 1), config=config, **how)
    except MissingSettingError:
        if config is not None:  # a hub id's is not known yet
            raise
    cases = _cases(catalog, spec, dataset, data, facts, seed)
    out = out or Path(f"{method}-{Path(model).name}.yaml")
    folder = out.with_suffix(".tune")
    if out.exists() and not folder.exists():
        raise DataError(f"{out} exists already. Choose another --out.")

    session = options.open_session(
        catalog,
        model,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        seed=seed,
        corpus=corpus,
    )
    from kedit_bench.trials import Trials
    from kedit_bench.unedited import Asker
    from kedit_core.progress import progress

    host = session.host
    space = space_of(spec, candidates, len(host.blocks), config=host.config, **how)
    asker = Asker(session)
    where = {
        "schedule": "single" if spec.max_batch == 1 else f"batch:{spec.max_batch or 'all'}",
        "model": model,
        "dtype": str(host.dtype).removeprefix("torch."),
        "dataset": dataset,
    }
    held_out = max(1, len(cases) // 3)
    identity = {
        "format": FORMAT,
        "method": method,
        **where,
        "weights": asker.weights,
        "cases": [case.model_dump(mode="json") for case in cases],
        "start": space.hparams({}).model_dump(mode="json"),
        "search": space.axes,
        "seed": seed,
        "corpus": corpus,
    }
    minutes = budget if budget is not None or trials is not None else MINUTES
    seconds = inf if minutes is None else 60 * minutes

    def tick() -> None:
        done = len(searching.tried) if trials is not None else int(measure.spent)
        bar.update(min(done, bar.total) - bar.n)

    with (
        only_one(folder),
        progress(trials or int(seconds), f"tune {method}", "trial" if trials else "s") as bar,
    ):
        journal = Journal(folder / "trials.jsonl")
        _begin(journal, identity, out)
        measure = Trials(asker, spec, cases, where, journal, tick)
        searching = Search(
            space,
            measure,
            len(cases) - held_out,
            held_out,
            trials=inf if trials is None else trials,
            seconds=seconds,
        )
        found = searching.run()
        tried = list(searching.tried.values())
        summary = (
            f"{len(cases) - held_out} facts of {dataset} for tuning, {held_out} held out, seed "
            f"{seed}; {len(tried)} trials, {measure.spent / 60:.1f} minutes"
        )
        with new_file(out) as temporary:
            temporary.write_text(_preset(space, found, dataset, summary, host.config), "utf-8")
    if as_json:
        return printing.echo_json(_result(space, found, tried, out))
    typer.echo(_table(tried, found.kept))
    typer.echo(f"\n{_scores(found)}")
    if found.keeps_start:
        typer.echo(f"{WORSE} More --facts tell them apart better.", err=True)
    typer.echo(f"{summary}. Use it with --hparams {out}", err=True)


def _candidates(pairs: Sequence[str]) -> dict[str, list[Any]]:
    """`KEY=A,B,C` as lists by key; each of them is read as YAML.

    Raises:
        SettingError: a pair has no candidate, or they are not YAML.
    """
    found = {}
    for pair in pairs:
        key, _, values = pair.partition("=")
        found.update(parse_settings([f"{key}=[{values}]"], "--search"))
        if not found[key.strip()]:
            raise SettingError(
                f"--search {pair!r}: write KEY=A,B,C, for example --search lr=0.1,0.5."
            )
    return found


def _cases(
    catalog: Catalog, spec: MethodSpec, dataset: str, data: str | None, count: int, seed: int
) -> list[EditCase]:
    """Cases that the method takes, drawn at random.

    Raises:
        DataError: there are fewer than two.
    """
    about, found = read_dataset(catalog, dataset, data)
    if about.holds != "cases":
        raise DataError(f"'{dataset}' is a dataset of {about.holds}, and facts are needed.")
    fit = [
        case
        for case in checked(found, EditCase)
        if isinstance(case, EditCase) and not any(map(spec.refusal, case.requests))
    ]
    if len(fit) < 2:
        raise DataError(
            f"{spec.name} takes {len(fit)} of the facts in {data or dataset}, and tuning needs "
            f"two: one to tune on and one to check."
        )
    return random.Random(seed).sample(fit, min(count, len(fit)))


def _begin(journal: Journal, identity: Mapping[str, Any], out: Path) -> None:
    """Write what the search is, or find that it is the same one."""
    wanted = json.loads(json.dumps(identity))
    stored = next(journal.lines(), None)
    if stored is None:
        return journal.append(wanted)
    for key, value in wanted.items():
        if stored.get(key) != value:
            raise DataError(
                f"{journal.path.parent} holds another search: its {key} differs. Choose another "
                f"--out, or delete that folder and {out}."
            )


def _preset(
    space: Space, found: Found, dataset: str, summary: str, config: Mapping[str, Any]
) -> str:
    """The kept settings as a preset file."""
    comment = f"Tuned: {summary}.\n{_scores(found)}"
    if found.keeps_start:
        comment += f"\n{WORSE}"
    preset = {
        "methods": [space.spec.name],
        "source": f"Tuned with `kedit tune` on {found.best.facts} facts of {dataset}.",
        "fits": {key: config[key] for key in FITS if key in config},
        "settings": space.hparams(found.kept.change).model_dump(mode="json"),
    }
    text = yaml.safe_dump(preset, sort_keys=False, default_flow_style=None, width=1000)
    return "".join(f"# {line}\n" for line in comment.splitlines()) + text


def _scores(found: Found) -> str:
    """A table: the start and the best settings, on the facts for tuning and on the others."""
    rows = [
        ("start", "tuning", *_cells(found.start.score)),
        ("best", "tuning", *_cells(found.best.score)),
        ("start", "held out", *_cells(found.start_held_out)),
        ("best", "held out", *_cells(found.best_held_out)),
    ]
    return printing.table(rows, ("settings", "facts", *HEADER))


def _table(tried: Sequence[Trial], kept: Trial) -> str:
    rows = [
        (n, _change(trial), trial.facts, *_cells(trial.score), _note(trial, kept))
        for n, trial in enumerate(tried, start=1)
    ]
    return printing.table(rows, ("trial", "settings", "facts", *HEADER, ""))


def _change(trial: Trial) -> str:
    return ", ".join(f"{key}={value}" for key, value in trial.change.items()) or "start"


def _note(trial: Trial, kept: Trial) -> str:
    failures = trial.score.failures
    told = f"{len(failures)} failed: {printing.shorten(failures[0], 60)}" if failures else ""
    return ", ".join(filter(None, ("kept" if trial.change == kept.change else "", told)))


def _cells(score: Score) -> Iterator[str]:
    yield f"{score.value:.3f}"
    for name in HEADER[1:-1]:
        yield f"{score.parts[name]:.3f}" if name in score.parts else "–"
    yield f"{score.seconds:.2f}"


def _result(space: Space, found: Found, tried: Sequence[Trial], out: Path) -> dict[str, Any]:
    return {
        "method": space.spec.name,
        "out": str(out),
        "settings": space.hparams(found.kept.change).model_dump(mode="json"),
        "change": found.kept.change,
        "keeps_start": found.keeps_start,
        "tuning": {"start": asdict(found.start.score), "best": asdict(found.best.score)},
        "held_out": {"start": asdict(found.start_held_out), "best": asdict(found.best_held_out)},
        "trials": [asdict(trial) for trial in tried],
    }
