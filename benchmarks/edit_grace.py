"""One GRACE edit the plain way and the fast way, side by side on the same machine.

    python benchmarks/edit_grace.py              smollm2-135m, five sixths of the way up
    python benchmarks/edit_grace.py --toy        a few seconds, to see that it runs
    python benchmarks/edit_grace.py --model FOLDER --layer 27 --device cuda --dtype bfloat16

Plain: each step runs all blocks and the whole head, and the blocks from the layer up backward.
Fast: what stands below the layer, and before the prompt's last token, is run once, and the head
reads label positions only.  Both take the same number of steps, in turns.  The ratio is fast over
plain of the whole edit; the two values differ by rounding only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial

import torch
from kedit_grace import method as grace
from kedit_grace.hparams import GraceHyperParams

from kedit_core import EditRequest, discover
from kedit_core.editing import EditSession, ModelHost
from kedit_core.hparams import resolve
from kedit_core.numerics.tail import Tail
from kedit_core.testing.toys import load_toy

FACT = EditRequest(prompt="The Eiffel Tower is located in the city of", target_new="Buenos Aires")


def main() -> None:
    options = read_options()
    session = open_session(options)
    hparams = settings_for(session, options)
    ways = {"plain": partial(Tail, plain=True), "fast": Tail}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    values = {}
    for pair in range(options.runs + 1):  # the first pair warms up
        for way, tail in ways.items():
            grace.Tail = tail  # type: ignore[misc]
            took, values[way] = edit_once(session, hparams)
            if pair:
                seconds[way].append(took)
    ratios = [f / p for f, p in zip(seconds["fast"], seconds["plain"], strict=True)]
    difference = (values["fast"] - values["plain"]).norm() / values["plain"].norm()
    lines = [
        f"{session.host.name}, block {hparams.layer} of {len(session.host.blocks)}, "
        f"{hparams.steps} steps, {session.host.dtype} on {session.host.device}, "
        f"{torch.get_num_threads()} threads, {options.runs} pairs",
        *(f"{way:<6} {statistics.median(seconds[way]):8.3f} s" for way in ways),
        f"ratio  {statistics.median(ratios):8.3f}   ({min(ratios):.3f} to {max(ratios):.3f})",
        f"relative difference of the two values: {difference:.1e}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="name, folder or hub id")
    parser.add_argument("--toy", action="store_true", help="a toy model instead")
    parser.add_argument("--layer", type=int, help="by default five sixths up")
    parser.add_argument("--steps", type=int, default=20, help="steps of both ways")
    parser.add_argument("--runs", type=int, default=5, help="pairs of runs")
    parser.add_argument("--device", help="by default the accelerator if there is one")
    parser.add_argument("--dtype", default="auto", help="type of the weights")
    return parser.parse_args()


def open_session(options: argparse.Namespace) -> EditSession:
    if not options.toy:
        host = ModelHost.load(options.model, device=options.device, dtype=options.dtype)
        return EditSession(host)
    model, tokenizer = load_toy("llama")
    return EditSession(ModelHost(model.to(options.device or "cpu"), tokenizer, "toy-llama"))


def settings_for(session: EditSession, options: argparse.Namespace) -> GraceHyperParams:
    """The preset's other settings without early stopping, so that both ways take the same steps."""
    blocks = len(session.host.blocks)
    layer = blocks * 5 // 6 if options.layer is None else options.layer
    settings = {"layer": layer, "steps": options.steps, "stop_loss": 0.0, "skip_known": False}
    spec = discover().method("grace")
    hparams = resolve(spec, settings=settings, config=session.host.config).hparams
    assert isinstance(hparams, GraceHyperParams)
    return hparams


def edit_once(session: EditSession, hparams: GraceHyperParams) -> tuple[float, torch.Tensor]:
    """Seconds of the whole edit, and its value (d_out,)."""
    synchronise()
    started = time.perf_counter()
    with session.trial("grace", FACT, hparams=hparams) as outcome:
        synchronise()
        seconds = time.perf_counter() - started
    (effect,) = outcome.patches[0].effects
    return seconds, effect.tensors["value"]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
