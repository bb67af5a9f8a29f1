"""Causal traces by one run per state and with state reuse, side by side on the same machine.

    python benchmarks/trace.py                  smollm2-135m, two facts, all kinds (half an hour)
    python benchmarks/trace.py --toy            a few seconds, to see that it runs
    python benchmarks/trace.py --kind block --prompt "The capital of {} is" --subject France

Plain: the corrupted copies go through all blocks and the whole head, once for each state.  Fast:
runs begin behind the restored block with the corrupted run's states, read earlier tokens from its
keys and values, and ask the head at the last position.  Both restore the same states under the
same noise, and their scores are compared.  The ratio depends on the prompt: tokens before the
subject cost the plain way as much as others, and the fast way nothing.  Times are CPU seconds of
one thread, so that other work on the machine matters little, or seconds on an accelerator.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from kedit_core.editing import ModelHost
from kedit_core.numerics.causal import KINDS, TraceResult, trace
from kedit_core.testing.toys import load_toy, toy_facts

FACTS = (
    ("The {} is located in the city of", "Eiffel Tower"),
    ("The city where the {} can be found is", "Eiffel Tower"),
)


def main() -> None:
    options = read_options()
    host, facts = load(options)
    lines = []
    for prompt, subject in facts:
        for kind in options.kind or KINDS:
            fast, fast_seconds = timed(host, prompt, subject, kind, options.samples, plain=False)
            plain, plain_seconds = timed(host, prompt, subject, kind, options.samples, plain=True)
            line = {
                "model": host.name,
                "prompt": fast.prompt,
                "kind": kind,
                "states": plain.scores.numel(),
                "samples": options.samples,
                "plain_seconds": plain_seconds,
                "fast_seconds": fast_seconds,
                "ratio": fast_seconds / plain_seconds,
                "largest_difference": float((fast.scores - plain.scores).abs().max()),
                "largest_effect": float(plain.effects.max()),
            }
            lines.append(line)
            shown = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in line.items()}
            sys.stdout.write(", ".join(f"{key} {value}" for key, value in shown.items()) + "\n")
            sys.stdout.flush()
    fast, plain = (sum(line[f"{way}_seconds"] for line in lines) for way in ("fast", "plain"))
    sys.stdout.write(f"all together: ratio {fast / plain:.3f}\n")
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=2) + "\n", "utf-8")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="name, folder or hub id")
    parser.add_argument("--toy", action="store_true", help="a toy model instead")
    parser.add_argument("--prompt", help="instead of the two facts, with {} for the subject")
    parser.add_argument("--subject", help="of the prompt")
    parser.add_argument("--kind", action="append", choices=KINDS, help="repeatable; default: all")
    parser.add_argument("--samples", type=int, default=10, help="corrupted copies")
    parser.add_argument("--device", help="by default the accelerator if there is one")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    return parser.parse_args()


def load(options: argparse.Namespace) -> tuple[ModelHost, list[tuple[str, str]]]:
    torch.set_num_threads(1)
    if options.toy:
        host = ModelHost(*load_toy("llama"), "toy-llama")
        fact = next(fact for fact in toy_facts() if not fact.prompt.startswith("{}"))
        return host, [(fact.prompt, fact.subject)]
    given = [(options.prompt, options.subject)] if options.prompt else list(FACTS)
    return ModelHost.load(options.model, device=options.device), given


def timed(
    host: ModelHost, prompt: str, subject: str, kind: str, samples: int, *, plain: bool
) -> tuple[TraceResult, float]:
    generator = torch.Generator().manual_seed(0)
    started = clock(host)
    (result,) = trace(
        host, prompt, subject, generator=generator, kinds=[kind], samples=samples, plain=plain
    )
    return result, clock(host) - started


def clock(host: ModelHost) -> float:
    if host.device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
