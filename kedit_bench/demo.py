"""`kedit demo`: a few facts of a real model, edited and taken back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from kedit_core.cli import options, printing
from kedit_core.errors import EditError
from kedit_core.plugins import discover
from kedit_core.request import EditCase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL, METHOD, DATASET = "smollm2-135m", "rome", "starter"
QUICK = "smollm2-135m-quick"  # the preset of that model and method, for a first look
NEW_TOKENS = 8


def demo(
    facts: Annotated[int, typer.Option(min=1, help="How many facts to edit.")] = 5,
    method: options.Method = METHOD,
    model: options.Model = MODEL,
) -> None:
    """Edit a few facts of a real model, show the answers, roll back, compare every bit."""
    catalog = discover()
    spec = catalog.method(method)
    dataset = catalog.dataset(DATASET)
    preset = QUICK if (model, method) == (MODEL, METHOD) else None
    options.check_settings(catalog, spec, model, preset, None, None)

    started = time.perf_counter()
    session = options.open_session(catalog, model, device=None, dtype="auto")
    typer.echo(f"{model} is loaded ({time.perf_counter() - started:.1f} s).", err=True)
    before_bits = _bits(session.model)
    cases = list(dataset.load()().cases())
    cases = cases[:: max(1, len(cases) // facts)][:facts]
    asked = [_prompts(case) for case in cases]
    every = [prompt for prompts in asked for prompt in prompts]
    unedited = iter(session.view().greedy(every, max_new_tokens=NEW_TOKENS))
    for case, prompts in zip(cases, asked, strict=True):
        request = case.request
        before = [next(unedited) for _ in prompts]
        outcome = session.edit(spec, request, preset=preset)
        after = session.view().greedy(prompts, max_new_tokens=NEW_TOKENS)
        session.rollback()
        typer.echo(f"\n{request.text} → {request.target_new}   ({outcome.seconds:.1f} s)")
        rows = [
            (
                name,
                printing.shorten(prompt, 56),
                printing.shorten(old, 34),
                printing.shorten(new, 34),
            )
            for name, prompt, old, new in zip(
                ("prompt", "rephrased", "neighbour"), prompts, before, after, strict=True
            )
        ]
        typer.echo(printing.table(rows, ("", "question", "before", "after")))
    same = _bits(session.model) == before_bits
    typer.echo(f"\nRolled back: {len(before_bits)} parameters, every bit as before: {same}.")
    typer.echo(f"{time.perf_counter() - started:.0f} s in all.", err=True)
    if not same:
        raise EditError("The rollback did not restore the weights. Please report this.")


def _prompts(case: EditCase) -> list[str]:
    """The rewritten prompt, a rephrasing and a neighbour."""
    kinds = ("rephrase", "locality")
    firsts = (next(p.prompt for p in case.probes if p.kind == kind) for kind in kinds)
    return [case.request.text, *firsts]


def _bits(model: PreTrainedModel) -> dict[str, bytes]:
    """What stands for the bits of every parameter and buffer."""
    from kedit_core.digest import bit_sums

    return {name: bit_sums(tensor) for name, tensor in model.state_dict().items()}
