"""Tokens per second of a model with an edit in force, as a share of the unedited model's.

    python benchmarks/generate.py                     100 GRACE edits on smollm2-135m
    python benchmarks/generate.py --method ike --edits 10

Both write the same number of tokens after the same prompts, in pairs that take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from kedit_core import discover
from kedit_core.editing import EditSession, ModelHost

PROMPTS = [f"In the year {1900 + n}, the city of" for n in range(8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="grace")
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--steps", type=int, help="of training; reading costs the same after few")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()

    session = EditSession(ModelHost.load(options.model))
    cases = discover().dataset("starter").load()().cases()
    requests = [case.request for case in cases]
    settings = {} if options.steps is None else {"steps": options.steps}
    edits = requests[: options.edits]
    for _ in session.stream(options.method, edits, batch=10, hparams=settings):
        pass

    shares = []
    for pair in range(options.pairs + 1):  # the first pair warms up
        edited = seconds(session, options.tokens)
        with session.suspended():
            unedited = seconds(session, options.tokens)
        if pair:
            shares.append(unedited / edited)
    tokens = len(PROMPTS) * options.tokens
    sys.stdout.write(
        f"{options.method}, {len(session.stack)} patches, {options.edits} edits on "
        f"{session.host.name}: {statistics.median(shares):.3f} of the unedited throughput "
        f"({min(shares):.3f} to {max(shares):.3f}, {options.pairs} pairs of {tokens} tokens)\n"
    )


def seconds(session: EditSession, tokens: int) -> float:
    started = time.perf_counter()
    session.view().greedy(PROMPTS, max_new_tokens=tokens)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
