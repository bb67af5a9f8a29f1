"""One ROME edit the plain way and the fast way, side by side on the same machine.

    python benchmarks/edit_rome.py              smollm2-135m at the layer of its preset
    python benchmarks/edit_rome.py --toy        a few seconds, to see that it runs
    python benchmarks/edit_rome.py --model FOLDER --layer 5 --device cuda --dtype bfloat16

Plain: each step runs all rows through all blocks and the whole head, forward and backward.
Fast: what stands below the edited block and before the edited token is run once, and the head
reads label positions only.  Both take the same number of steps.  Times are medians of pairs of
runs that take turns; memory is the peak of one edit above the loaded weights, each way in a
process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kedit_rome import method as rome
from kedit_rome.hparams import RomeHyperParams

from kedit_core import EditRequest, HyperParams, discover
from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.editing import EditJob, EditSession, ModelHost
from kedit_core.hparams import resolve
from kedit_core.numerics.values import Value, optimise_values, target_values
from kedit_core.testing.toys import load_toy, toy_corpus, toy_facts

WAYS = ("plain", "fast")
FACT = EditRequest(
    prompt="The {} is located in the city of", subject="Eiffel Tower", target_new="Rome"
)


@dataclass(frozen=True)
class Run:
    """One edit: seconds of the whole and of optimising the value, and that value."""

    edit: float
    optimisation: float
    value: Value
    rows: int


def main() -> None:
    options = read_options()
    session, request = open_session(options)
    hparams = settings_for(session, options)
    session.prepare("rome", hparams=hparams)  # statistics and contexts, kept for later runs
    if options.memory:
        sys.stdout.write(f"{peak_of_an_edit(session, request, hparams, options.memory)}\n")
        return

    measured: dict[str, list[Run]] = {way: [] for way in WAYS}
    for pair in range(options.runs + 1):  # the first pair warms up
        for way in WAYS:
            run = edit_once(session, request, hparams, way)
            if pair:
                measured[way].append(run)
    plain, fast = (measured[way][-1] for way in WAYS)
    difference = (fast.value.delta - plain.value.delta).norm() / plain.value.delta.norm()
    result = {
        "model": session.host.name,
        "device": str(session.host.device),
        "dtype": str(session.host.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "layer": hparams.layer,
        "blocks": len(session.host.blocks),
        "rows": plain.rows,
        "steps": {way: len(measured[way][-1].value.losses) for way in WAYS},
        "runs": options.runs,
        "optimisation_seconds": medians({w: [r.optimisation for r in measured[w]] for w in WAYS}),
        "edit_seconds": medians({w: [r.edit for r in measured[w]] for w in WAYS}),
        "edit_peak_megabytes": {way: memory_in_fresh_process(way) for way in WAYS},
        "relative_difference_of_delta": float(difference),
    }
    show(result)
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
    parser.add_argument("--runs", type=int, default=5, help="pairs of runs")
    parser.add_argument("--device", help="by default the accelerator if there is one")
    parser.add_argument("--dtype", default="auto", help="type of the weights")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.add_argument("--memory", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def open_session(options: argparse.Namespace) -> tuple[EditSession, EditRequest]:
    if not options.toy:
        host = ModelHost.load(options.model, device=options.device, dtype=options.dtype)
        return EditSession(host), FACT
    model, tokenizer = load_toy("llama")
    host = ModelHost(model.to(options.device or "cpu"), tokenizer, "toy-llama")
    store = ArtifactStore(Path(tempfile.gettempdir()) / "kedit-benchmark")
    fact = next(fact for fact in toy_facts() if not fact.prompt.startswith("{}"))
    request = EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=fact.target_new)
    return EditSession(host, artifacts=store, corpus=Corpus(str(toy_corpus()))), request


def settings_for(session: EditSession, options: argparse.Namespace) -> RomeHyperParams:
    """The preset's settings without early stopping, so that both ways take the same steps."""
    given = {"layer": options.layer, "steps": options.steps}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if options.toy:
        changes = {"layer": 1, **changes}
    spec = discover().method("rome")
    settings = resolve(spec, settings=changes | {"stop_loss": 0.0}, config=session.host.config)
    assert isinstance(settings.hparams, RomeHyperParams)
    return settings.hparams


def edit_once(session: EditSession, request: EditRequest, hparams: HyperParams, way: str) -> Run:
    with optimising(way) as seen:
        synchronise()
        started = time.perf_counter()
        with session.trial("rome", request, hparams=hparams):
            synchronise()
            seconds = time.perf_counter() - started
    return Run(edit=seconds, **seen)


@contextlib.contextmanager
def optimising(way: str) -> Iterator[dict[str, Any]]:
    """Inside the block ROME optimises its value this way; what it took and gave is recorded."""
    seen: dict[str, Any] = {}

    def recorded(job: EditJob, *args: Any) -> list[Value]:  # never from the store
        synchronise()
        started = time.perf_counter()
        values = optimise_values(job.host, *args, plain=way == "plain")
        synchronise()
        (task,) = args[2]
        seconds = time.perf_counter() - started
        seen.update(optimisation=seconds, value=values[0], rows=len(task.rows) + 1)
        return values

    rome.target_values = recorded  # type: ignore[assignment]
    try:
        yield seen
    finally:
        rome.target_values = target_values


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_of_an_edit(
    session: EditSession, request: EditRequest, hparams: HyperParams, way: str
) -> float:
    """Megabytes that one edit needs at its peak above what the loaded model occupies."""
    gc.collect()
    if session.host.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        edit_once(session, request, hparams, way)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = resident(reset_peak=True)
    edit_once(session, request, hparams, way)
    return (resident(peak=True) - before) / 1e6


def resident(*, peak: bool = False, reset_peak: bool = False) -> int:
    """Bytes of this process in memory, now or at most; where Linux does not tell, at most."""
    status = Path("/proc/self/status")
    if not status.is_file():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if reset_peak:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", "ascii")
    name = "VmHWM" if peak else "VmRSS"
    (line,) = [line for line in status.read_text("utf-8").splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def memory_in_fresh_process(way: str) -> float:
    command = [sys.executable, *sys.argv, "--memory", way]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return round(float(found.stdout.split()[-1]), 1)


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each way, and the median of the pairs' ratios with its range."""
    ratios = [plain / fast for plain, fast in zip(*(seconds[way] for way in WAYS), strict=True)]
    return {
        **{way: statistics.median(seconds[way]) for way in WAYS},
        "ratio": statistics.median(ratios),
        "least_ratio": min(ratios),
        "greatest_ratio": max(ratios),
    }


def show(result: Mapping[str, Any]) -> None:
    steps = result["steps"]
    lines = [
        f"{result['model']}, block {result['layer']} of {result['blocks']}, {result['rows']} rows, "
        f"{steps['plain']} and {steps['fast']} steps, {result['dtype']} on {result['device']}, "
        f"{result['threads']} threads, {result['runs']} pairs",
        f"{'':<24}{'plain':>10}{'fast':>10}{'ratio':>8}   range",
    ]
    for name, key in (("value, s", "optimisation_seconds"), ("whole edit, s", "edit_seconds")):
        row = result[key]
        lines.append(
            f"{name:<24}{row['plain']:>10.3f}{row['fast']:>10.3f}{row['ratio']:>8.2f}   "
            f"{row['least_ratio']:.2f} to {row['greatest_ratio']:.2f}"
        )
    peak = result["edit_peak_megabytes"]
    ratio = f"{peak['plain'] / peak['fast']:.2f}" if peak["fast"] else ""
    lines.append(f"{'peak of an edit, MB':<24}{peak['plain']:>10}{peak['fast']:>10}{ratio:>8}")
    difference = result["relative_difference_of_delta"]
    lines.append(f"relative difference of the two δ: {difference:.1e}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
