"""One ROME edit the plain way and the fast way, side by side on the same machine.

    python benchmarks/edit_rome.py              smollm2-135m at the layer of its preset
    python benchmarks/edit_rome.py --toy        a few seconds, to see that it runs
    python benchmarks/edit_rome.py --model FOLDER --layer 5 --device cuda --dtype bfloat16

The two ways are those of `pairs.py`.  Memory is the peak of one edit above the loaded weights, each
way in a process of its own.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kedit_rome import method as rome
from pairs import (
    WAYS,
    in_turns,
    now,
    open_session,
    parser_of,
    publish,
    relative_difference,
    settings_of,
    summary,
    surroundings,
)

from kedit_core import EditRequest, HyperParams
from kedit_core.editing import EditJob, EditSession
from kedit_core.numerics.values import Value, optimise_values, target_values
from kedit_core.testing.toys import toy_facts

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
    parser = parser_of(__doc__)
    parser.add_argument("--memory", choices=WAYS, help="only the peak of one edit this way, in MB")
    options = parser.parse_args()
    session = open_session(options)
    request = toy_request() if options.toy else FACT
    settings = {"layer": options.layer, "steps": options.steps}
    hparams = settings_of("rome", session, settings, options)
    session.prepare("rome", hparams=hparams)  # statistics and contexts, kept for later runs
    if options.memory:
        sys.stdout.write(f"{peak_of_an_edit(session, request, hparams, options.memory)}\n")
        return

    measured = in_turns(options.runs, lambda way: edit_once(session, request, hparams, way))
    plain, fast = (measured[way][-1] for way in WAYS)
    result = {
        **surroundings(session),
        "layer": hparams.model_dump()["layer"],
        "rows": plain.rows,
        "steps": {way: len(measured[way][-1].value.losses) for way in WAYS},
        "runs": options.runs,
        "optimisation_seconds": summary({w: [r.optimisation for r in measured[w]] for w in WAYS}),
        "edit_seconds": summary({w: [r.edit for r in measured[w]] for w in WAYS}),
        "edit_peak_megabytes": {way: memory_in_fresh_process(way) for way in WAYS},
        "relative_difference_of_delta": relative_difference(fast.value.delta, plain.value.delta),
    }
    publish(result, options)


def toy_request() -> EditRequest:
    fact = next(fact for fact in toy_facts() if not fact.prompt.startswith("{}"))
    return EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=fact.target_new)


def edit_once(session: EditSession, request: EditRequest, hparams: HyperParams, way: str) -> Run:
    with optimising(way) as seen:
        started = now()
        with session.trial("rome", request, hparams=hparams):
            seconds = now() - started
    return Run(edit=seconds, **seen)


@contextlib.contextmanager
def optimising(way: str) -> Iterator[dict[str, Any]]:
    """Inside the block ROME optimises its value this way; what it took and gave is recorded."""
    seen: dict[str, Any] = {}

    def recorded(job: EditJob, *args: Any) -> list[Value]:  # never from the store
        started = now()
        values = optimise_values(job.host, *args, plain=way == "plain")
        seconds = now() - started
        (task,) = args[2]
        seen.update(optimisation=seconds, value=values[0], rows=len(task.rows) + 1)
        return values

    rome.target_values = recorded  # type: ignore[assignment]
    try:
        yield seen
    finally:
        rome.target_values = target_values


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


if __name__ == "__main__":
    main()
