"""`kedit eval`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kedit_core.cli import options
from kedit_core.errors import DataError, SettingError
from kedit_core.plugins import discover
from kedit_core.spec import MetricSpec

if TYPE_CHECKING:
    from kedit_bench.single import CaseResult
    from kedit_core.plugins import Catalog
    from kedit_core.request import EditCase

CASES = "cases.jsonl"
RESULT = "result.json"


def evaluate(
    model: options.Model,
    method: options.Method,
    dataset: Annotated[str, typer.Option(help="Name from `kedit list-datasets`.")],
    data: Annotated[Path | None, typer.Option(help="The dataset's file or folder.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first cases.")] = None,
    regime: Annotated[
        str, typer.Option(help="single: each case on the unedited model.")
    ] = "single",
    preset: options.Preset = None,
    hparams: options.HparamsFile = None,
    settings: options.Set = None,
    out: Annotated[Path | None, typer.Option(help="Folder for raw answers and scores.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    corpus: options.CorpusOption = "self",
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Score a method on a dataset: rewritten, rephrased and neighbouring prompts."""
    catalog = discover()
    spec = catalog.method(method)
    if regime != "single":
        raise SettingError(f"There is no regime '{regime}'. Known: single.")
    wanted = options.check_settings(catalog, spec, model, preset, hparams, settings)
    cases = _cases(catalog, dataset, data, limit)
    if out is not None and out.exists():
        raise DataError(f"{out} exists already. Choose another folder.")

    session = options.open_session(
        catalog,
        model,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        seed=seed,
        corpus=corpus,
    )
    from kedit_bench.single import run_single, summarise
    from kedit_core.files import new_folder
    from kedit_core.progress import progress

    metrics = [metric.load()() for metric in catalog.all(MetricSpec)]
    results: list[CaseResult] = []
    running = run_single(session, spec, cases, metrics, preset=preset, file=hparams, hparams=wanted)
    with progress(len(cases), f"{spec.name} on {dataset}", "case") as bar:
        for result in running:
            results.append(result)
            bar.update(1)
    scores = summarise([result.scores for result in results])
    baseline = summarise([result.baseline for result in results])
    seconds = sorted(result.seconds for result in results)
    report = {
        "model": model,
        "method": spec.name,
        "dataset": dataset,
        "regime": regime,
        "seed": seed,
        "dtype": str(session.host.dtype).removeprefix("torch."),
        "cases": len(results),
        "seconds_per_edit": seconds[len(seconds) // 2],
        "scores": {name: vars(mean) for name, mean in scores.items()},
        "unedited": {name: vars(mean) for name, mean in baseline.items()},
    }
    if out is not None:
        with new_folder(out) as folder:
            lines = "".join(json.dumps(_line(r), ensure_ascii=False) + "\n" for r in results)
            (folder / CASES).write_text(lines, "utf-8")
            (folder / RESULT).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    if as_json:
        return options.echo_json(report)
    rows = [
        (name, f"{baseline[name].mean:.3f}", f"{m.mean:.3f}", f"{m.error:.3f}", m.n)
        for name, m in scores.items()
    ]
    header = ("metric", "unedited", "edited", "± s.e.", "cases")
    typer.echo(options.table(rows, header))
    typer.echo(
        f"{spec.name} on {len(results)} cases of {dataset}, {model}, {regime}: "
        f"{report['seconds_per_edit']:.2f} s per edit (median).",
        err=True,
    )


def _cases(catalog: Catalog, name: str, path: Path | None, limit: int | None) -> list[EditCase]:
    spec = catalog.dataset(name)
    if spec.needs_path and path is None:
        raise DataError(f"The dataset '{name}' needs its file or folder: --data PATH.")
    if path is not None and not path.exists():
        raise DataError(f"--data {path} does not exist.")
    cases = list(itertools.islice(spec.load()().cases(path), limit))
    if not cases:
        raise DataError(f"The dataset '{name}' has no case.")
    return cases


def _line(result: CaseResult) -> dict[str, Any]:
    from kedit_bench.metrics import probes_of

    probes = [
        {
            "kind": probe.kind,
            "name": probe.name,
            "prompt": probe.prompt,
            "expected": list(probe.expected),
            "before": _answer(old),
            "after": _answer(new),
        }
        for probe, old, new in zip(probes_of(result.case), result.before, result.after, strict=True)
    ]
    return {
        "id": result.case.request.id,
        "request": result.case.request.model_dump(mode="json"),
        "seconds": result.seconds,
        "scores": dict(result.scores),
        "probes": probes,
    }


def _answer(answer: Any) -> dict[str, Any]:
    scores = [
        {"target": s.target, "logprobs": s.logprobs, "accuracy": s.accuracy, "merged": s.merged}
        for s in answer.scores
    ]
    return {"text": answer.text, "scores": scores}
