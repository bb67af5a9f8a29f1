"""UltraEdit against the plain way, and what an edit costs early and late in a long sequence.

    python benchmarks/ultraedit.py --data zsre_mend_eval.json --data zsre_mend_train.json
    python benchmarks/ultraedit.py --toy         a few seconds, to see that it runs

Plain: each request by itself, full passes with gradients of all weights, and solves as wide as the
matrices; only computing is timed.  Fast: the method as the session runs it, with everything that
applying a patch costs.  Both compute each batch on the same edited model, in turns, and their
changes differ by rounding only.

Then more batches follow in a fresh session.  Seconds and peak memory of an edit are compared
between the first and the last tenth of the sequence.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from kedit_ultraedit.flow import Flow, flows
from kedit_ultraedit.hparams import UltraEditHyperParams
from kedit_ultraedit.method import chosen_sites, updated, wanted_step
from torch import Tensor

from kedit_core import EditCase, EditRequest, discover
from kedit_core.editing import EditSession, ModelHost, Patch, Site
from kedit_core.hparams import resolve
from kedit_core.testing.toys import load_toy, toy_facts
from kedit_core.tokens import join


def main() -> None:
    options = read_options()
    requests = read_requests(options)
    session = open_session(options)
    preset = "toy" if options.toy else None
    resolved = resolve(discover().method("ultraedit"), preset=preset, config=session.host.config)
    hparams = resolved.hparams
    assert isinstance(hparams, UltraEditHyperParams)
    say(
        f"{session.host.name}, {session.host.dtype} on {session.host.device}, "
        f"{torch.get_num_threads()} threads, batches of {options.batch}, {hparams.matrices}"
    )
    compare_ways(session, hparams, in_batches(requests[: options.edits], options.batch))
    session.rollback()
    compare_ends(session, hparams, in_batches(requests[: options.long], options.batch))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="name, folder or hub id")
    parser.add_argument("--data", type=Path, action="append", default=[], help="files of ZsRE")
    parser.add_argument("--toy", action="store_true", help="a toy model and its facts instead")
    parser.add_argument("--edits", type=int, default=500, help="made in both ways")
    parser.add_argument("--long", type=int, default=2000, help="edits of the long sequence")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--device", help="by default the accelerator if there is one")
    parser.add_argument("--dtype", default="auto", help="type of the weights")
    return parser.parse_args()


def open_session(options: argparse.Namespace) -> EditSession:
    if not options.toy:
        host = ModelHost.load(options.model, device=options.device, dtype=options.dtype)
        return EditSession(host)
    model, tokenizer = load_toy("llama")
    return EditSession(ModelHost(model.to(options.device or "cpu"), tokenizer, "toy-llama"))


def read_requests(options: argparse.Namespace) -> list[EditRequest]:
    """The false answers of all files, then the true ones."""
    if options.toy:
        facts = [(f.prompt.replace("{}", f.subject), f.target_new) for f in toy_facts()]
        return [EditRequest(prompt=prompt, target_new=target) for prompt, target in facts]
    found = [
        case.request
        for name in ("zsre", "zsre-true")
        for path in options.data
        for case in discover().dataset(name).load()().cases(path)
        if isinstance(case, EditCase)
    ]
    if len(found) < options.long:
        sys.exit(
            f"{len(found)} requests for {options.long} edits: give more --data, or less --long."
        )
    return found


def in_batches(requests: Sequence[EditRequest], size: int) -> list[Sequence[EditRequest]]:
    """Whole batches only."""
    return [requests[n : n + size] for n in range(0, len(requests) - size + 1, size)]


def compare_ways(
    session: EditSession, hparams: UltraEditHyperParams, batches: Sequence[Sequence[EditRequest]]
) -> None:
    plain_seconds, fast_seconds = [], []
    for batch in batches:
        state = session.stack[-1].state if session.stack else {}
        started = now()
        changes = plain_edit(session.host, batch, hparams, state)
        plain_seconds.append(now() - started)
        started = now()
        (patch,) = session.edit("ultraedit", batch, hparams=hparams).patches
        fast_seconds.append(now() - started)
    edits = sum(map(len, batches))
    plain, fast = sum(plain_seconds) / edits, sum(fast_seconds) / edits
    ratios = [f / p for f, p in zip(fast_seconds, plain_seconds, strict=True)]
    say(
        f"{edits} edits: plain {plain:.4f} s, fast {fast:.4f} s each, ratio {fast / plain:.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}); changes of the last batch differ by "
        f"{difference(patch, changes):.1e}"
    )


def plain_edit(
    host: ModelHost, batch: Sequence[EditRequest], hparams: UltraEditHyperParams, state: dict
) -> dict[Site, Tensor]:
    sites = chosen_sites(host, hparams.matrices)
    parts: dict[Site, list[Flow]] = {site: [] for site in sites}
    for request in batch:
        row = join(host, request.text, request.target_new)
        with gradients_of_everything(host):
            found, _ = flows(host, sites, [row], hparams.positions, hparams.batch_tokens)
            for site, flow in found.items():
                parts[site].append(flow)
    found = {
        site: Flow(torch.cat([f.inputs for f in many]), torch.cat([f.gradients for f in many]))
        for site, many in parts.items()
    }
    normalisers = updated(state, found)
    changes = {}
    for site, flow in found.items():
        h = flow.inputs.double()
        v = wanted_step(flow, normalisers[flow.shape], hparams.lr)
        moment = h.mT @ h + hparams.ridge * torch.eye(h.shape[1]).to(h)
        changes[site] = torch.linalg.solve(moment, h.mT @ v).mT.float()
    return changes


@contextlib.contextmanager
def gradients_of_everything(host: ModelHost) -> Iterator[None]:
    """Inside the block every backward pass also computes the gradients of all weights."""
    weights = [p.requires_grad_(True) for p in host.model.parameters()]
    grad = torch.autograd.grad

    def with_weights(loss: Tensor, wanted: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return grad(loss, [*wanted, *weights])[: len(wanted)]

    torch.autograd.grad = with_weights  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.grad = grad
        host.model.requires_grad_(False)


def difference(patch: Patch, changes: dict[Site, Tensor]) -> float:
    """The largest relative difference of a matrix's change."""
    each = [(changes[d.site].cpu() - d.dense()).norm() / d.dense().norm() for d in patch.deltas]
    return float(max(each))


def compare_ends(
    session: EditSession, hparams: UltraEditHyperParams, batches: Sequence[Sequence[EditRequest]]
) -> None:
    with session.trial("ultraedit", batches[0], hparams=hparams):
        pass  # warms up
    seconds, peaks = [], []
    for batch in batches:
        before = resident(reset_peak=True)
        started = now()
        session.edit("ultraedit", batch, hparams=hparams)
        seconds.append((now() - started) / len(batch))
        peaks.append((resident(peak=True) - before) / 1e6)
    tenth = max(1, len(batches) // 10)
    lines = [f"{sum(map(len, batches))} edits in sequence"]
    for name, values in (("seconds of an edit", seconds), ("peak of a batch, MB", peaks)):
        first, last = statistics.mean(values[:tenth]), statistics.mean(values[-tenth:])
        ratio = f", ratio {last / first:.3f}" if first else ""
        lines.append(f"  {name:<20} first {first:.4f}, last {last:.4f}{ratio}")
    sizes = [t.nbytes for p in session.stack for d in p.deltas for t in d.tensors.values()]
    lines.append(f"  the patches hold {sum(sizes) / 1e6:.0f} MB")
    say("\n".join(lines))


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def resident(*, peak: bool = False, reset_peak: bool = False) -> int:
    """Bytes in use on the GPU, or of this process (on Linux), now or at most."""
    if torch.cuda.is_available():
        if reset_peak:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if reset_peak:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", "ascii")
    name = "VmHWM" if peak else "VmRSS"
    status = Path("/proc/self/status").read_text("utf-8").splitlines()
    (line,) = [line for line in status if line.startswith(name)]
    return int(line.split()[1]) * 1024


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
