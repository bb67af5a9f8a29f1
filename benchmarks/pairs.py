"""What the benchmarks of single edits share: one edit in two ways that take turns.

Plain: each step runs all rows through all blocks and the whole head.  Fast: what stands below the
edited block, and before the first changed position, is run once, and the head reads label
positions only.  Both take the same number of steps.  Ratios are fast over plain.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from kedit_core import EditRequest, HyperParams, discover
from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.editing import EditSession, ModelHost, Patch
from kedit_core.hparams import resolve
from kedit_core.numerics.tail import Tail
from kedit_core.testing.toys import load_toy, toy_corpus

WAYS = ("plain", "fast")

T = TypeVar("T")


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options that all have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="name, folder or hub id")
    parser.add_argument("--toy", action="store_true", help="a toy model instead")
    parser.add_argument("--layer", type=int, help="another block")
    parser.add_argument("--steps", type=int, help="another number of steps")
    parser.add_argument("--runs", type=int, default=5, help="pairs of runs")
    parser.add_argument("--device", help="by default the accelerator if there is one")
    parser.add_argument("--dtype", default="auto", help="type of the weights")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    return parser


def open_session(options: argparse.Namespace) -> EditSession:
    """A session on the model, or on the toy, whose statistics are kept for later runs."""
    if not options.toy:
        host = ModelHost.load(options.model, device=options.device, dtype=options.dtype)
        return EditSession(host)
    model, tokenizer = load_toy("llama")
    host = ModelHost(model.to(options.device or "cpu"), tokenizer, "toy-llama")
    store = ArtifactStore(Path(tempfile.gettempdir()) / "kedit-benchmark")
    return EditSession(host, artifacts=store, corpus=Corpus(str(toy_corpus())))


def settings_of(
    method: str, session: EditSession, settings: Mapping[str, Any], options: argparse.Namespace
) -> HyperParams:
    """Those of the preset that fits, but for the given ones that are not None.

    Without early stopping, so that both ways take the same number of steps.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    return resolve(
        discover().method(method),
        preset="toy" if options.toy else None,
        settings=given | {"stop_loss": 0.0},
        config=session.host.config,
    ).hparams


def five_sixths(session: EditSession) -> int:
    """The block five sixths of the way up."""
    return len(session.host.blocks) * 5 // 6


def now() -> float:
    """Seconds, once the device has done what it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(runs: int, run: Callable[[str], T]) -> dict[str, list[T]]:
    """What each way gave in each pair but the first, which warms up."""
    found: dict[str, list[T]] = {way: [] for way in WAYS}
    for pair in range(runs + 1):
        for way in WAYS:
            result = run(way)
            if pair:
                found[way].append(result)
    return found


def summary(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each way, and the median of the pairs' ratios with its range."""
    ratios = [fast / plain for plain, fast in zip(*(seconds[way] for way in WAYS), strict=True)]
    return {
        **{way: statistics.median(seconds[way]) for way in WAYS},
        "ratio": statistics.median(ratios),
        "least_ratio": min(ratios),
        "greatest_ratio": max(ratios),
    }


def surroundings(session: EditSession) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "model": session.host.name,
        "blocks": len(session.host.blocks),
        "device": str(session.host.device),
        "dtype": str(session.host.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def compare_edits(
    method: str,
    module: ModuleType,
    session: EditSession,
    request: EditRequest,
    hparams: HyperParams,
    tensor_of: Callable[[Patch], Tensor],
    options: argparse.Namespace,
) -> None:
    """Whole edits by a method that repeats a `Tail`: how long they take, and whether they agree.

    Args:
        method: its name.
        module: where it looks up `Tail`.
        session: an unedited model.
        request: the edit.
        hparams: its settings.
        tensor_of: what is compared in the two patches.
        options: of `parser_of`.
    """
    patches: dict[str, Patch] = {}

    def run(way: str) -> float:
        with repeating(module, way):
            started = now()
            with session.trial(method, request, hparams=hparams) as outcome:
                seconds = now() - started
        (patches[way],) = outcome.patches
        return seconds

    seconds = in_turns(options.runs, run)
    plain, fast = (tensor_of(patches[way]) for way in WAYS)
    settings = hparams.model_dump()
    chosen = {name: settings[name] for name in ("layer", "layers", "steps") if name in settings}
    result = {
        "method": method,
        **surroundings(session),
        **chosen,
        "runs": options.runs,
        "edit_seconds": summary(seconds),
        "relative_difference_of_patches": relative_difference(fast, plain),
    }
    publish(result, options)


@contextlib.contextmanager
def repeating(module: ModuleType, way: str) -> Iterator[None]:
    """Inside the block the method repeats the whole model in each step, or its upper part."""
    vars(module)["Tail"] = partial(Tail, plain=way == "plain")
    try:
        yield
    finally:
        vars(module)["Tail"] = Tail


def publish(result: Mapping[str, Any], options: argparse.Namespace) -> None:
    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    if options.json:
        Path(options.json).write_text(text, "utf-8")
