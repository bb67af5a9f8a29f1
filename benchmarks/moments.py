"""Second moments of five layers in one pass over a text, against one pass for each layer.

    python benchmarks/moments.py             smollm2-135m, five layers in the middle
    python benchmarks/moments.py --toy       a few seconds, to see that it runs
    python benchmarks/moments.py --model FOLDER --layers 3,4,5,6,7 --device cuda

Both ways read the same tokens of the same text, kedit's own documentation over and over, and give
the same moments.  A pass ends at the last layer that it is for.  Times are medians of pairs of runs
that take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kedit_core.corpus import Corpus
from kedit_core.editing import ModelHost, Site
from kedit_core.numerics.stats import collect
from kedit_core.testing.toys import load_toy

DOCS = Path(__file__).parents[1] / "docs"
TARGET = 0.3  # of five passes
LETTERS_PER_TOKEN = 8  # more than any text has on average


def main() -> None:
    options = read_options()
    host = open_host(options)
    layers = options.layers or middle(len(host.blocks))
    sites = [host.mlp_out(layer) for layer in layers]
    tokens = options.tokens or 2 * host.weight(sites[0]).shape[1]
    with tempfile.TemporaryDirectory() as folder:
        corpus = text(Path(folder) / "corpus.txt", LETTERS_PER_TOKEN * tokens)
        collect(host, sites, corpus, tokens, seed=0)  # warms up
        ratios, seconds = [], []
        for _ in range(options.runs):
            together, one = timed(host, [sites], corpus, tokens)
            alone, five = timed(host, [[site] for site in sites], corpus, tokens)
            ratios.append(one / five)
            seconds.append((one, five))
    worst = max(float((together[s] - alone[s]).norm() / alone[s].norm()) for s in sites)
    one, five = (statistics.median(column) for column in zip(*seconds, strict=True))
    sys.stdout.write(
        f"{host.name}, blocks {', '.join(map(str, layers))} of {len(host.blocks)}, {tokens} "
        f"tokens, {host.dtype} on {host.device}, {torch.get_num_threads()} threads, "
        f"{options.runs} pairs\n"
        f"one pass {one:.2f} s, {len(sites)} passes {five:.2f} s, ratio "
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), "
        f"wanted {TARGET} at most\n"
        f"largest relative difference of the moments: {worst:.1e}\n"
    )


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="name, folder or hub id")
    parser.add_argument("--toy", action="store_true", help="a toy model instead")
    parser.add_argument("--layers", type=numbers, metavar="A,B,…", help="instead of the middle")
    parser.add_argument("--tokens", type=int, help="instead of twice the matrix's width")
    parser.add_argument("--runs", type=int, default=3, help="pairs of runs")
    parser.add_argument("--device", help="by default the accelerator if there is one")
    parser.add_argument("--dtype", default="auto", help="type of the weights")
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def open_host(options: argparse.Namespace) -> ModelHost:
    if not options.toy:
        return ModelHost.load(options.model, device=options.device, dtype=options.dtype)
    model, tokenizer = load_toy("llama")
    return ModelHost(model.to(options.device or "cpu"), tokenizer, "toy-llama")


def middle(blocks: int) -> list[int]:
    """Five layers, or as many as there are, round the middle one."""
    first = max(0, blocks // 2 - 2)
    return list(range(first, min(blocks, first + 5)))


def text(file: Path, letters: int) -> Corpus:
    pages = "\n\n".join(page.read_text("utf-8") for page in sorted(DOCS.glob("*.md")))
    file.write_text("\n\n".join([pages] * (letters // len(pages) + 1)), "utf-8")
    return Corpus(str(file))


def timed(
    host: ModelHost, passes: Sequence[Sequence[Site]], corpus: Corpus, tokens: int
) -> tuple[dict[Site, Tensor], float]:
    """The moments of all sites, some in each pass, and the seconds of all passes."""
    synchronise()
    started = time.perf_counter()
    found: dict[Site, Tensor] = {}
    for sites in passes:
        found |= collect(host, sites, corpus, tokens, seed=0)
    synchronise()
    return found, time.perf_counter() - started


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
