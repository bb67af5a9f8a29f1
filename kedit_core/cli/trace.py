"""`kedit trace`: where in a model a fact sits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kedit_core.cli import heatmap, options
from kedit_core.cli.printing import echo_json, table
from kedit_core.errors import ModelError, RequestError, did_you_mean
from kedit_core.plugins import Catalog, discover

if TYPE_CHECKING:
    from kedit_core.host import ModelHost
    from kedit_core.numerics.causal import Averages, TraceResult
    from kedit_core.request import EditRequest

KINDS = ("block", "mlp", "attn")


def register(app: typer.Typer) -> None:
    app.command()(trace)


def trace(
    model: options.Model,
    prompt: Annotated[
        str | None, typer.Option(help="Text to complete, {} for the subject.")
    ] = None,
    subject: Annotated[str | None, typer.Option(help="What the fact is about.")] = None,
    answer: Annotated[str | None, typer.Option(help="The answer that is expected.")] = None,
    requests: Annotated[
        Path | None,
        typer.Option(help="YAML, JSON or JSONL of requests, to average over their facts."),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="block, mlp or attn: what is restored. Repeatable. [default: all]"),
    ] = None,
    window: Annotated[
        int, typer.Option(min=1, help="Layers of MLP or attention restored together.")
    ] = 10,
    noise: Annotated[
        float | None,
        typer.Option(help="Its standard deviation. [default: 3 times the embeddings']"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Corrupted runs to average over.")] = 10,
    out: Annotated[
        Path, typer.Option(help="Figure to write, .png or .svg; it is overwritten.")
    ] = Path("trace.png"),
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Show which states of a model carry a fact: a table, and a heat map as a file."""
    catalog = discover()
    kinds = _kinds(kind)
    if noise is not None and not 0 < noise < math.inf:
        raise RequestError(f"--noise {noise}: give a positive number.")
    if out.suffix.lower() not in heatmap.FORMATS or out.is_dir():
        raise RequestError(f"--out {out}: give a file that ends in .png or .svg.")
    facts = _facts(prompt, subject, answer, requests)
    check_causal(catalog, model)
    host = options.open_session(
        catalog, model, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    ).host
    traces = trace_facts(
        host, facts, kinds=kinds, window=window, noise=noise, samples=samples, seed=seed
    )
    if requests is None:
        (results,) = traces
        heatmap.draw_traces(results, out)
        _tell_fact(results, facts[0], as_json)
    else:
        from kedit_core.numerics.causal import average

        averages = [average(alike) for alike in zip(*traces, strict=True)]
        heatmap.draw_averages(averages, out)
        _tell_averages(traces, averages, as_json)
    typer.echo(f"Figure: {out}", err=True)


def check_causal(catalog: Catalog, model: str) -> None:
    """Find a wrong name, or a model that cannot be traced, before its weights are read."""
    from kedit_core.models import check, known_config

    check(model, catalog)
    if (known_config(model, catalog) or {}).get("is_encoder_decoder"):
        raise ModelError(f"{model} is an encoder-decoder model; tracing needs a causal one.")


def trace_facts(
    host: ModelHost,
    facts: Sequence[EditRequest],
    *,
    kinds: Sequence[Any] = KINDS,
    window: int = 10,
    noise: float | None = None,
    samples: int = 10,
    seed: int = 0,
) -> list[tuple[TraceResult, ...]]:
    """Trace each request's present answer; noise is measured on all subjects together."""
    import torch

    from kedit_core.numerics import causal
    from kedit_core.progress import progress

    generator = torch.Generator().manual_seed(seed)
    asked = [(fact.prompt, fact.subject or "") for fact in facts]
    level = causal.noise_level(host, asked) if noise is None else noise
    traces = []
    with progress(len(facts), "tracing", "fact") as bar:
        for fact, (prompt, subject) in zip(facts, asked, strict=True):
            found = causal.trace(
                host,
                prompt,
                subject,
                fact.ground_truth,
                generator=generator,
                kinds=kinds,
                window=window,
                level=level,
                samples=samples,
            )
            traces.append(found)
            bar.update()
    return traces


def facts_of(path: Path) -> list[EditRequest]:
    """Requests of a file, each with its subject.

    Raises:
        RequestError: the file cannot be read, or a request names no subject.
    """
    from kedit_core.request import read_requests

    found = read_requests(path)
    for number, request in enumerate(found, start=1):
        if request.subject is None:
            raise RequestError(f"{path}: request {number} has no subject, and tracing hides it.")
    return found


def _kinds(given: Sequence[str] | None) -> tuple[str, ...]:
    for name in given or ():
        if name not in KINDS:
            raise RequestError(f"--kind {name}: there is no such kind. {did_you_mean(name, KINDS)}")
    return tuple(dict.fromkeys(given or KINDS))


def _facts(
    prompt: str | None, subject: str | None, answer: str | None, file: Path | None
) -> list[EditRequest]:
    from kedit_core.request import EditRequest

    if file is not None:
        if prompt or subject or answer:
            raise RequestError("Give --requests FILE, or one fact by --prompt and --subject.")
        return facts_of(file)
    if prompt is None or subject is None:
        raise RequestError("Give --prompt and --subject, or --requests FILE.")
    expected = () if answer is None else (answer,)
    # Nothing is written, so the target is of no account.
    return [EditRequest(prompt=prompt, subject=subject, target_new=subject, ground_truth=expected)]


def _tell_fact(results: Sequence[TraceResult], fact: EditRequest, as_json: bool) -> None:
    first = results[0]
    if not first.is_expected:
        typer.echo(f"The model answers {first.answer!r}, not {fact.ground_truth[0]!r}.", err=True)
    if as_json:
        return echo_json(_as_data(results))
    rows = []
    for number in range(len(first.tokens)):
        row = [heatmap.shown(first, number)]
        for result in results:
            best = int(result.effects[:, number].argmax())
            row += [f"{float(result.effects[best, number]):.3f}", str(best)]
        rows.append(row)
    header = [name for result in results for name in (result.kind, "layer")]
    typer.echo(table(rows, ["token", *header]))
    typer.echo(
        f"p({first.answer!r}) is {first.high:.3f}, and {first.low:.3f} with the subject* hidden. "
        f"The table has the largest gain from restoring one state, and its layer.",
        err=True,
    )


def _tell_averages(
    traces: Sequence[Sequence[TraceResult]], averages: Sequence[Averages], as_json: bool
) -> None:
    from kedit_core.numerics.causal import PLACES

    first = averages[0]
    if as_json:
        return echo_json(
            {
                "facts": [_as_data(results) for results in traces],
                "left_out": list(first.left_out),
                "averages": {found.kind: _averages_as_data(found) for found in averages},
            }
        )
    rows = []
    for number, place in enumerate(PLACES):
        row = [place, str(first.counts[number])]
        for found in averages:
            best = found.strongest(place, 1)[0]
            mean, error = float(found.effects[number, best]), float(found.errors[number, best])
            count = first.counts[number]
            row += [with_error(mean, error, count), str(best)] if count else ["–", "–"]
        rows.append(row)
    header = [name for found in averages for name in (f"{found.kind} ± 95 %", "layer")]
    typer.echo(table(rows, ["place", "facts", *header]))
    for prompt in first.left_out:
        typer.echo(f"Left out, since the model does not answer as expected: {prompt}", err=True)
    typer.echo(
        f"Average total effect {first.total_effect:.3f}. The table has the largest average "
        f"indirect effect with its 95 % interval, and its layer.",
        err=True,
    )


def with_error(mean: float, error: float, facts: int) -> str:
    """A mean with half of its interval; of one fact there is none."""
    return f"{mean:.3f}" + f" ± {error:.3f}" * (facts > 1)


def _as_data(results: Sequence[TraceResult]) -> dict[str, Any]:
    first = results[0]
    names = ("prompt", "tokens", "subject", "answer", "is_expected", "high", "low", "level")
    return {name: getattr(first, name) for name in names} | {
        "kinds": {
            result.kind: {"window": result.window, "scores": result.scores.tolist()}
            for result in results
        }
    }


def _averages_as_data(found: Averages) -> dict[str, Any]:
    from kedit_core.numerics.causal import PLACES

    places = {
        place: {"facts": count, "effects": effects.tolist(), "errors": errors.tolist()}
        for place, count, effects, errors in zip(
            PLACES, found.counts, found.effects, found.errors, strict=True
        )
        if count
    }
    return {"window": found.window, "total_effect": found.total_effect, "places": places}
