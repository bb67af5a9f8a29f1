"""MEMIT of many facts the plain way and the fast way, side by side on the same machine.

    python benchmarks/edit_memit.py              100 starter facts on smollm2-135m, its preset
    python benchmarks/edit_memit.py --toy        a few seconds, to see that it runs

Plain: targets one after the other, each step a full forward and backward pass of all its rows
through all blocks and the whole head; keys and states by two full passes per layer, row by row;
systems as wide as the matrices, solved by LU in float64.  Fast: the method.  Both write the same
facts with the same settings, without early stopping.  As targets cost the same for every fact, the
plain way optimises `--plain` of them, takes the others from the fast way, and its time for targets
is scaled up to all.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from kedit_memit.hparams import MemitHyperParams
from torch import Tensor

from kedit_core import EditRequest, discover
from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.editing import EditJob, EditSession, ModelHost
from kedit_core.hparams import resolve
from kedit_core.numerics.facts import FactRows, value_settings
from kedit_core.numerics.stats import moment_factors, second_moments
from kedit_core.numerics.values import Value, optimise_values, target_values
from kedit_core.probing import hidden_of
from kedit_core.sites import Site
from kedit_core.testing.toys import load_toy, toy_corpus, toy_facts
from kedit_core.tokens import Row, pad


def main() -> None:
    options = read_options()
    session, requests = open_session(options)
    hparams = settings_for(session, options)
    job = EditJob(
        host=session.host,
        requests=tuple(requests),
        artifacts=session.artifacts,
        fingerprint=session.fingerprint,
        corpus=session.corpus,
        seed=session.seed,
        unedited=session.suspended,
    )
    sites = [job.host.mlp_out(layer) for layer in hparams.layers]
    moments = second_moments(job, sites, hparams.moment_tokens)
    moment_factors(job, sites, hparams.moment_tokens)
    facts = FactRows.of(job, hparams)

    fast, values = targets(job, facts, hparams, len(requests), plain=False)
    plain, own = targets(job, facts, hparams, options.plain, plain=True)
    plain *= len(requests) / options.plain
    difference = max(
        float((a.delta - b.delta).norm() / b.delta.norm())
        for a, b in zip(values, own, strict=False)
    )
    say(f"{len(requests)} facts, {options.plain} of them the plain way, layers {hparams.layers}")
    say(f"targets, s: plain {plain:.1f}, fast {fast:.1f}, ratio {fast / plain:.3f}")
    say(f"largest relative difference of δ: {difference:.1e}")

    started = time.perf_counter()
    with session.trial("memit", requests, hparams=hparams) as outcome:  # targets from the store
        written = time.perf_counter() - started
        changes = [delta.dense() for delta in outcome.patches[0].deltas]
    started = time.perf_counter()
    expected = write_plainly(job, facts, values, hparams, moments)
    written_plainly = time.perf_counter() - started
    difference = max(
        float((a - b.cpu()).norm() / b.norm()) for a, b in zip(changes, expected, strict=True)
    )
    say(f"writing, s: plain {written_plainly:.1f}, fast {written:.1f}")
    say(f"largest relative difference of ΔW: {difference:.1e}")
    both = (fast + written) / (plain + written_plainly)
    say(f"whole edit: ratio {both:.3f}")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="name, folder or hub id")
    parser.add_argument("--toy", action="store_true", help="a toy model and its facts instead")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--plain", type=int, default=8, help="targets the plain way")
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    parser.add_argument("--device", help="by default the accelerator if there is one")
    parser.add_argument("--dtype", default="auto", help="type of the weights")
    return parser.parse_args()


def open_session(options: argparse.Namespace) -> tuple[EditSession, list[EditRequest]]:
    if not options.toy:
        host = ModelHost.load(options.model, device=options.device, dtype=options.dtype)
        cases = discover().dataset("starter").load()().cases()
        found = [request for case in cases for request in case.requests]
        return EditSession(host, artifacts=fresh_store()), found[: options.facts]
    model, tokenizer = load_toy("llama")
    host = ModelHost(model.to(options.device or "cpu"), tokenizer, "toy-llama")
    requests = [
        EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=fact.target_new)
        for fact in toy_facts()[: options.facts]
    ]
    corpus = Corpus(str(toy_corpus()))
    return EditSession(host, artifacts=fresh_store(), corpus=corpus), requests


def fresh_store() -> ArtifactStore:
    """Without targets of earlier runs."""
    return ArtifactStore(Path(tempfile.mkdtemp(prefix="kedit-benchmark-")))


def settings_for(session: EditSession, options: argparse.Namespace) -> MemitHyperParams:
    steps = {} if options.steps is None else {"steps": options.steps}
    spec, preset = discover().method("memit"), "toy" if options.toy else None
    resolved = resolve(
        spec, preset=preset, settings=steps | {"stop_loss": 0.0}, config=session.host.config
    )
    assert isinstance(resolved.hparams, MemitHyperParams)
    return resolved.hparams


def targets(
    job: EditJob, facts: FactRows, hparams: MemitHyperParams, count: int, *, plain: bool
) -> tuple[float, list[Value]]:
    """Seconds, and the values of the first facts; those of the fast way go into the store."""
    place, last = job.host.block(hparams.layers[-1]).path, hparams.layers[-1]
    tasks, settings = facts.tasks[:count], value_settings(hparams)
    started = time.perf_counter()
    if plain:
        values = optimise_values(job.host, place, last, tasks, settings, plain=True)
    else:
        values = target_values(job, place, last, tasks, settings)
    return time.perf_counter() - started, values


@torch.no_grad()
def write_plainly(
    job: EditJob,
    facts: FactRows,
    values: Sequence[Value],
    hparams: MemitHyperParams,
    moments: dict[Site, Tensor],
) -> list[Tensor]:
    """ΔW of each layer as the paper's algorithm reads."""
    host, changes = job.host, []
    sites = [host.mlp_out(layer) for layer in hparams.layers]
    goal = torch.stack([value.target for value in values], dim=1).to(host.device)
    with host.scratch(*sites):
        for number, site in enumerate(sites):
            keys = []
            for rows in facts.rows:
                own = torch.stack([full_pass(host, row, site.module, "input") for row in rows])
                keys.append((own[0] + own[1:].mean(dim=0)) / 2)
            place = host.block(hparams.layers[-1]).path
            now = [full_pass(host, rows[0], place, "output") for rows in facts.rows]
            k = torch.stack(keys, dim=1).double()
            residual = (goal - torch.stack(now, dim=1)).double() / (len(sites) - number)
            a = hparams.moment_weight * moments[site].to(k.device).double() + k @ k.mT
            change = (torch.linalg.solve(a, k) @ residual.mT).mT.float()
            host.weight(site).add_(change.to(host.weight(site).dtype))
            changes.append(change)
    return changes


def full_pass(host: ModelHost, row: Row, path: str, side: str) -> Tensor:
    """What a module reads or writes at the row's mark, by a pass through the whole model."""
    found: list[Tensor] = []

    def keep(module: object, args: tuple[Tensor, ...], output: object) -> None:
        found.append(hidden_of(args[0] if side == "input" else output)[0, row.mark].float())

    handle = host.base_module(path).register_forward_hook(keep)
    try:
        host.model(**pad(host, [row]).inputs, use_cache=False)
    finally:
        handle.remove()
    return found[0]


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
