"""Commands that edit, ask, and handle saved edits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kedit_core.cli import options
from kedit_core.cli.printing import echo_json, shorten, table
from kedit_core.errors import PatchError, RequestError, SettingError
from kedit_core.plugins import discover
from kedit_core.texts import begins_with, folded

if TYPE_CHECKING:
    from kedit_core.editing import EditSession, Patch, SavedStack
    from kedit_core.request import EditRequest

NEW_TOKENS = 12

Edits = Annotated[Path | None, typer.Option("--edits", help="Saved edits to put in force first.")]
Folder = Annotated[Path, typer.Argument(help="Folder of saved edits.")]
Force = Annotated[bool, typer.Option(help="Load edits that were made on other weights.")]


def register(app: typer.Typer) -> None:
    app.command()(edit)
    app.command()(ask)
    app.command()(export)
    stack = typer.Typer(help="Look at saved edits, and take single ones out.")
    stack.command()(show)
    stack.command()(pop)
    stack.command()(remove)
    app.add_typer(stack, name="stack")


def edit(
    model: options.Model,
    method: options.Method,
    prompt: Annotated[
        str | None, typer.Option(help="Text to complete, {} for the subject.")
    ] = None,
    subject: Annotated[str | None, typer.Option(help="What the fact is about.")] = None,
    target: Annotated[str | None, typer.Option(help="The new answer.")] = None,
    ground_truth: Annotated[
        list[str] | None, typer.Option(help="A former answer; some methods need it. Repeatable.")
    ] = None,
    rephrase: Annotated[list[str] | None, typer.Option(help="Another way to ask.")] = None,
    requests: Annotated[Path | None, typer.Option(help="YAML, JSON or JSONL of requests.")] = None,
    preset: options.Preset = None,
    hparams: options.HparamsFile = None,
    settings: options.Set = None,
    overlay: Annotated[bool, typer.Option(help="Lay changes beside the weights.")] = False,
    edits: Edits = None,
    force: Force = False,
    save: Annotated[Path | None, typer.Option(help="Folder to write all edits to.")] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Edit so many at a time, saving each; the same command goes on if stopped."
        ),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    corpus: options.CorpusOption = "self",
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Write facts into a model and show what changed."""
    catalog = discover()
    spec = catalog.method(method)
    facts = _requests(prompt, subject, target, ground_truth, requests) if spec.writes_facts else []
    if not spec.writes_facts and (rephrase or requests or ground_truth or batch is not None):
        raise RequestError(
            f"{spec.name} writes no facts, so it takes no --requests, --rephrase, --ground-truth "
            f"and --batch. Give --prompt to see an answer."
        )
    if overlay and spec.effect != "weights":
        raise SettingError(f"{spec.name} changes no weights, so it needs no --overlay.")
    wanted = options.check_settings(catalog, spec, model, preset, hparams, settings)
    for fact in facts:
        if reason := spec.refusal(fact):
            lacks_subject = "subject" in spec.needs and fact.subject is None
            key = "subject" if lacks_subject else "ground_truth"
            raise RequestError(f"{reason} Give --{key.replace('_', '-')}, or `{key}` in the file.")
    if batch is not None and (save is None or edits is not None):
        raise PatchError("--batch saves each step: give --save DIR, and no --edits.")
    if save is not None and save.exists() and save != edits and batch is None:
        raise PatchError(f"{save} exists already. Choose another folder, or add --edits {save}.")
    before_these = _read(edits) if edits is not None else None
    done = _done(save, spec.name) if batch is not None and save is not None else 0

    session = options.open_session(
        catalog,
        model,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        seed=seed,
        corpus=corpus,
    )
    if before_these is not None:
        session.load(before_these, force=force)
    questions: list[tuple[str, str | None]] = [(fact.text, fact.target_new) for fact in facts]
    questions += [(text, facts[0].target_new) for text in rephrase or ()]
    if not spec.writes_facts and prompt is not None:
        questions = [(prompt.replace("{}", subject or "{}"), target)]
    before = _answers(session, questions)
    how: dict[str, Any] = {"preset": preset, "file": hparams, "hparams": wanted, "overlay": overlay}
    if batch is None:
        outcomes = [session.edit(spec, facts, **how)]
        if save is not None:
            session.save(save, instead_of=before_these if save == edits else None)
    else:
        from kedit_core.progress import progress

        outcomes = []
        with progress(len(facts), spec.name, "edit", initial=done) as bar:
            for outcome in session.stream(
                spec, facts, batch=batch, folder=save, force=force, **how
            ):
                outcomes.append(outcome)
                bar.update(sum(len(patch.requests) for patch in outcome.patches))
    seconds = sum(outcome.seconds for outcome in outcomes)
    after = _answers(session, questions)
    if as_json:
        return echo_json(
            {
                "method": spec.name,
                "seconds": seconds,
                "settings": session.stack[-1].hparams,
                "origin": dict(outcomes[0].settings.origin) if outcomes else {},
                "saved": str(save) if save else None,
                "answers": [
                    {"prompt": prompt, "target": target, "before": old, "after": new}
                    for (prompt, target), old, new in zip(questions, before, after, strict=True)
                ],
            }
        )
    rows = [
        (
            shorten(prompt, 60),
            shorten(old["text"], 30),
            shorten(new["text"], 30),
            *("" if p is None else f"{p:.3f}" for p in (old["probability"], new["probability"])),
        )
        for (prompt, _), old, new in zip(questions, before, after, strict=True)
    ]
    header = ("prompt", "before", "after", "p(target) before", "after")
    typer.echo(table(rows, header))
    where = f"; saved in {save}" if save else "; not saved (add --save DIR)"
    what = f"{len(facts) - done} edit(s)" if spec.writes_facts else "in force"
    typer.echo(f"{spec.name}: {what} in {seconds:.1f} s{where}.", err=True)
    leads = [new["leads"] for new in after if new["leads"] is not None]
    if leads:
        typer.echo(f"{sum(leads)} of {len(leads)} answers begin with their target.", err=True)
    if session.unseen_effects():
        typer.echo(
            "It acts on prompts or logits: `kedit ask`, `kedit eval` and `session.view()` show it; "
            "`session.model` alone does not.",
            err=True,
        )


def ask(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: options.Model,
    edits: Edits = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 24,
    force: Force = False,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Show the model's greedy answer, without and with saved edits."""
    from kedit_core.models import check

    catalog = discover()
    check(model, catalog)
    saved = _read(edits) if edits is not None else None
    session = options.open_session(
        catalog, model, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    asked = prompt.rstrip(" ")  # the blank belongs to the answer
    answers = {"without": session.view().greedy(asked, max_new_tokens)}
    if saved is not None:
        session.load(saved, force=force)
        answers["with"] = session.view().greedy(asked, max_new_tokens)
    if as_json:
        return echo_json({"prompt": prompt, **answers})
    for name, text in answers.items():
        typer.echo(f"{name + ' the edits:' if edits else 'answer:':18} {' '.join(text.split())}")


def show(folder: Folder, as_json: options.Json = False) -> None:
    """List the patches of saved edits, oldest first."""
    saved = _read(folder)
    if as_json:
        return echo_json(
            {
                "model": saved.model,
                "fingerprint": saved.fingerprint,
                "patches": [
                    {
                        "method": patch.method,
                        "plugin": patch.plugin,
                        "overlay": overlay,
                        "requests": [r.model_dump(mode="json") for r in patch.requests],
                        "hparams": dict(patch.hparams),
                        "notes": dict(patch.notes),
                        "touches": _touched(patch),
                    }
                    for patch, overlay in saved.entries
                ],
            }
        )
    rows: list[tuple[Any, ...]] = []
    whole = 0 if sys.stdout.isatty() else sys.maxsize  # programs get all
    for number, (patch, overlay) in enumerate(saved.entries):
        for request in patch.requests or (None,):
            fact = f"{request.text} → {request.target_new}" if request else ""
            fact = shorten(fact, whole or 70)
            touched = shorten(", ".join(_touched(patch)), whole or 60)
            rows.append((number, patch.method, fact, touched, "yes" * overlay))
    typer.echo(table(rows, ("#", "method", "fact", "changes", "overlay")))
    typer.echo(f"{len(saved.entries)} patch(es) for {saved.model}.", err=True)


def _touched(patch: Patch) -> list[str]:
    """Parameters, modules, and `prompts and logits`."""
    from kedit_core.editing import ModuleSwap, WeightDelta

    named = []
    for effect in patch.effects:
        if isinstance(effect, WeightDelta):
            named.append(effect.site.parameter)
        else:
            named.append(effect.path if isinstance(effect, ModuleSwap) else "prompts and logits")
    return named


def pop(folder: Folder) -> None:
    """Take the latest patch out of saved edits."""
    from kedit_core.stack import pop_saved

    _tell_taken(folder, pop_saved(folder))


def _tell_taken(folder: Path, patch: Patch) -> None:
    facts = "; ".join(f"{r.text} → {r.target_new}" for r in patch.requests)
    typer.echo(f"Taken out of {folder}: {patch.method}, {facts}", err=True)


def remove(
    folder: Folder, number: Annotated[int, typer.Argument(help="As `kedit stack show` counts.")]
) -> None:
    """Take one patch out from among later ones, where its method allows it."""
    from kedit_core.stack import remove_saved

    _tell_taken(folder, remove_saved(folder, number, discover()))


def export(
    edits: Annotated[Path, typer.Argument(help="Folder of saved edits.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    model: options.Model,
    to: Annotated[str, typer.Option(help="hf: a whole model. peft: a LoRA adapter.")] = "hf",
    force: Force = False,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.Trust = False,
) -> None:
    """Write the edited model, or an adapter, for use without kedit."""
    from kedit_core.models import check

    if to not in ("hf", "peft"):
        raise RequestError(f"--to {to!r}: give hf or peft.")
    if out.exists():
        raise PatchError(f"{out} exists already. Choose another folder.")
    catalog = discover()
    check(model, catalog)
    saved = _read(edits)
    session = options.open_session(
        catalog, model, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    session.load(saved, force=force)
    from kedit_core.export import export_hf, export_peft

    (export_hf if to == "hf" else export_peft)(session, out)
    typer.echo(f"Written to {out}.", err=True)


def _requests(
    prompt: str | None,
    subject: str | None,
    target: str | None,
    ground_truth: list[str] | None,
    file: Path | None,
) -> list[EditRequest]:
    from kedit_core.request import EditRequest, read_requests

    if file is not None:
        if prompt or subject or target or ground_truth:
            raise RequestError("Give --requests FILE, or one fact by --prompt and --target.")
        return read_requests(file)
    if prompt is None or target is None:
        raise RequestError("Give --prompt, --subject and --target, or --requests FILE.")
    known = tuple(ground_truth or ())
    return [EditRequest(prompt=prompt, subject=subject, target_new=target, ground_truth=known)]


def _read(folder: Path) -> SavedStack:
    from kedit_core.stack import read_stack

    return read_stack(folder)


def _done(folder: Path, method: str) -> int:
    """How many facts an earlier call with --batch has written to the folder."""
    from kedit_core.stack import STACK, check_replaceable, read_stack

    check_replaceable(folder)
    if not (folder / STACK).is_file():
        return 0
    return sum(len(patch.requests) for patch in read_stack(folder).latest_by(method))


def _answers(session: EditSession, questions: list[tuple[str, str | None]]) -> list[dict[str, Any]]:
    """The greedy answer to each prompt; and of its target, if it has one, the probability and
    whether the answer begins with it, None where too little is written to tell."""
    import math

    view = session.view()
    questions = [(prompt.rstrip(" "), target) for prompt, target in questions]  # as it is scored
    texts = view.greedy([prompt for prompt, _ in questions], max_new_tokens=NEW_TOKENS)
    asked = [(prompt, target) for prompt, target in questions if target is not None]
    scores = iter(view.score([p for p, _ in asked], [t for _, t in asked]))
    return [
        {
            "text": text,
            "probability": None if target is None else math.exp(sum(next(scores).logprobs)),
            "leads": None if target is None else _leads(target, text),
        }
        for text, (_, target) in zip(texts, questions, strict=True)
    ]


def _leads(target: str, text: str) -> bool | None:
    """Whether an answer begins with a target; None where it is only the target's beginning."""
    written, wanted = folded(text).strip(), folded(target).strip()
    is_cut = 0 < len(written) < len(wanted) and wanted.startswith(written)
    return None if is_cut else begins_with(text, target)
