"""Commands about models: what is in them, and what methods need beforehand."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kedit_core.cli import options
from kedit_core.cli.printing import echo_json, table
from kedit_core.cli.trace import check_causal, facts_of, trace_facts, with_error
from kedit_core.errors import RequestError
from kedit_core.named import read_dataset
from kedit_core.plugins import Catalog, discover
from kedit_core.spec import MethodSpec

if TYPE_CHECKING:
    from kedit_core.editing import ModelHost
    from kedit_core.request import EditRequest

STARTER, TRACED = "starter", 8


def register(app: typer.Typer) -> None:
    app.command()(prepare)
    app.command()(inspect)


def prepare(
    model: options.Model,
    method: options.Method,
    preset: options.Preset = None,
    hparams: options.HparamsFile = None,
    settings: options.Set = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    corpus: options.CorpusOption = "self",
    trust_remote_code: options.Trust = False,
) -> None:
    """Make ahead what a method would otherwise make at its first edit."""
    catalog = discover()
    spec = catalog.method(method)
    wanted = options.check_settings(catalog, spec, model, preset, hparams, settings)
    session = options.open_session(
        catalog,
        model,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        seed=seed,
        corpus=corpus,
    )
    session.prepare(spec, preset=preset, file=hparams, hparams=wanted)
    typer.echo(f"{spec.name} is ready for {model}; kept in {session.artifacts.root}.", err=True)


def inspect(
    model: Annotated[str, typer.Argument(help="Registered name, folder or hub id.")],
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.Trust = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Also trace a few facts, to suggest layers to edit.")
    ] = False,
    requests: Annotated[
        Path | None, typer.Option(help="Facts to trace instead of those of `starter`.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show what kedit finds in a model, what an edit takes, and which presets suit it."""
    from kedit_core.models import check

    catalog = discover()
    check(model, catalog)
    if requests is not None and not trace:
        raise RequestError("--requests is for --trace: give both.")
    if trace:
        check_causal(catalog, model)
    known = _known_facts(catalog, requests) if trace else []
    session = options.open_session(
        catalog, model, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    host = session.host
    size = sum(p.numel() * p.element_size() for p in session.model.parameters())
    sites = [b.mlp_out for b in host.blocks if b.mlp_out is not None]
    facts: dict[str, Any] = {
        "name": host.name,
        "fingerprint": session.fingerprint,
        "type": host.config.get("model_type"),
        "dtype": str(host.dtype).removeprefix("torch."),
        "device": str(host.device),
        "blocks": len(host.blocks),
        "longest_input": host.max_length,
        "weights_mb": round(size / 1e6, 1),
        "pad_token": host.tokenizer.pad_token,
    }
    if sites:
        out, width = host.shape(sites[0])
        facts["mlp_out_shape"] = [out, width]
        stored = host.stored(sites[0])
        if stored.is_floating_point():  # others cannot be changed in place
            each = stored.element_size()
            each += 4 if each < 4 else 0  # of 16-bit weights the sum in float32 too
            facts["kept_per_edited_matrix_mb"] = round(out * width * each / 1e6, 2)
        facts["rank_one_patch_kb"] = round(4 * (out + width) / 1e3, 1)
        facts["second_moment_mb"] = round(4 * width * width / 1e6, 1)
    suited = _suited(catalog.all(MethodSpec), host.config)
    traced = _carrying_layers(host, known) if trace else None
    if as_json:
        described = {"presets": suited, "anatomy": host.anatomy.describe()}
        return echo_json(facts | described | ({"traced": traced} if traced else {}))
    typer.echo(table(list(facts.items()), ("what", "value")))
    typer.echo("\n" + host.anatomy.describe())
    rows = [(s["method"], s["preset"], s["layers"], s["source"]) for s in suited]
    typer.echo("\n" + table(rows, ("method", "preset that suits", "layers", "source")))
    if traced:
        found = [
            (e["layer"], with_error(e["effect"], e["error"], traced["facts"]))
            for e in traced["layers"]
        ]
        typer.echo("\n" + table(found, ("layer", "effect of MLPs at the last subject token")))
        typer.echo(
            f"Average of {traced['facts']} facts, 95 % interval. Where a fact is found does "
            f"not tell where an edit works best (arXiv:2301.04213): try these layers and others.",
            err=True,
        )


def _known_facts(catalog: Catalog, file: Path | None) -> list[EditRequest]:
    """A few facts that a model may know: of a file, or the first of the starter dataset."""
    if file is not None:
        return facts_of(file)
    from kedit_core.request import EditCase

    cases = (item for item in read_dataset(catalog, STARTER, None)[1] if isinstance(item, EditCase))
    return [case.request for case in islice(cases, TRACED)]


def _carrying_layers(host: ModelHost, facts: list[EditRequest]) -> dict[str, Any]:
    """The layers whose MLPs, restored at the last subject token, bring back most of the answer."""
    from kedit_core.numerics.causal import PLACES, average

    found = average([result for (result,) in trace_facts(host, facts, kinds=["mlp"])])
    place = PLACES.index("last subject token")
    return {
        "facts": found.counts[place],
        "left_out": list(found.left_out),
        "window": found.window,
        "layers": [
            {
                "layer": layer,
                "effect": float(found.effects[place, layer]),
                "error": float(found.errors[place, layer]),
            }
            for layer in found.strongest("last subject token")
        ],
    }


def _suited(specs: list[MethodSpec], config: dict[str, Any]) -> list[dict[str, Any]]:
    from kedit_core.hparams import presets_of

    return [
        {
            "method": spec.name,
            "preset": preset.name,
            "layers": preset.settings.get("layers", preset.settings.get("layer")),
            "source": preset.source,
        }
        for spec in specs
        for preset in presets_of(spec)
        if preset.suits(config)
    ]
