"""One WISE edit the plain way and the fast way, side by side on the same machine.

    python benchmarks/edit_wise.py              smollm2-135m at the layer of its preset
    python benchmarks/edit_wise.py --toy        a few seconds, to see that it runs
    python benchmarks/edit_wise.py --model FOLDER --layer 27 --device cuda --dtype bfloat16

Plain: each step runs all rows through all blocks and the whole head, with their padding.  Fast:
what stands below the side memory is run once, and the head reads label positions only.  Both take
the same number of steps.  Times are medians of pairs of runs that take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from kedit_wise import method as wise

from kedit_core import EditRequest, discover
from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.editing import EditSession, ModelHost, Patch
from kedit_core.hparams import resolve
from kedit_core.numerics.tail import Tail
from kedit_core.testing.toys import load_toy, toy_corpus, toy_facts

WAYS = ("plain", "fast")


def main() -> None:
    options = read_options()
    session, request = open_session(options)
    given = {"layer": options.layer, "steps": options.steps, "stop_loss": 0.0}
    changes = {key: value for key, value in given.items() if value is not None}
    preset = "toy" if options.toy else None
    spec = discover().method("wise")
    hparams = resolve(spec, preset=preset, settings=changes, config=session.host.config).hparams

    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    patches: dict[str, Patch] = {}
    for pair in range(options.runs + 1):  # the first pair warms up and fills the store
        for way in WAYS:
            with edited(way):
                synchronise()
                started = time.perf_counter()
                with session.trial("wise", request, hparams=hparams) as outcome:
                    synchronise()
                    taken = time.perf_counter() - started
            patches[way] = outcome.patches[0]
            if pair:
                seconds[way].append(taken)
    values = {way: patches[way].effects[0].tensors["values"] for way in WAYS}
    ratios = [fast / plain for plain, fast in zip(*(seconds[way] for way in WAYS), strict=True)]
    result: dict[str, Any] = {
        "model": session.host.name,
        "device": str(session.host.device),
        "dtype": str(session.host.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "layer": hparams.model_dump()["layer"],
        "blocks": len(session.host.blocks),
        "steps": {way: len(patches[way].notes["losses"]) for way in WAYS},
        "runs": options.runs,
        "edit_seconds": {way: statistics.median(seconds[way]) for way in WAYS},
        "ratio": statistics.median(ratios),
        "least_ratio": min(ratios),
        "greatest_ratio": max(ratios),
        "relative_difference_of_change": float(
            (values["fast"] - values["plain"]).norm() / values["plain"].norm()
        ),
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="name, folder or hub id")
    parser.add_argument("--toy", action="store_true", help="a toy model instead")
    parser.add_argument("--layer", type=int, help="instead of the preset's")
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    parser.add_argument("--runs", type=int, default=3, help="pairs of runs")
    parser.add_argument("--device", help="by default the accelerator if there is one")
    parser.add_argument("--dtype", default="auto", help="type of the weights")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    return parser.parse_args()


def open_session(options: argparse.Namespace) -> tuple[EditSession, EditRequest]:
    if not options.toy:
        host = ModelHost.load(options.model, device=options.device, dtype=options.dtype)
        request = EditRequest(prompt="What is the capital of Peru?", target_new="Oslo")
        return EditSession(host), request
    model, tokenizer = load_toy("llama")
    host = ModelHost(model.to(options.device or "cpu"), tokenizer, "toy-llama")
    store = ArtifactStore(Path(tempfile.gettempdir()) / "kedit-benchmark")
    fact = toy_facts()[0]
    request = EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=fact.target_new)
    return EditSession(host, artifacts=store, corpus=Corpus(str(toy_corpus()))), request


@contextlib.contextmanager
def edited(way: str) -> Iterator[None]:
    """Inside the block WISE repeats the whole model in each step, or its upper part."""
    wise.Tail = lambda *args: Tail(*args, plain=way == "plain")  # type: ignore
    try:
        yield
    finally:
        wise.Tail = Tail  # type: ignore[misc]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
