"""What edits of a model with 7 billion weights cost: edits per second and peak memory.

    python benchmarks/large.py                   on the accelerator, in bfloat16
    python benchmarks/large.py --toy --edits 10  a few seconds, to see that it runs
    python benchmarks/large.py --method rome --method memit --edits 50 --device cuda:1

The weights are random, in the shape of Llama-3-8B with the smaller vocabulary of smollm2-135m:
what an edit costs depends on shapes and not on what a model knows.  They are made on the device in
their final type.  Settings are those published for this shape, without early stopping.  Only
AlphaEdit's null space holds half of the second moment's trace, as its threshold depends on the
model's scale.

ROME writes up to ten facts one by one, the others all facts at once.  Statistics, on a text of
random words, are made before and timed by themselves; those of five layers take 9 GB of the folder
for temporary files.  An edit of other facts warms up.  Peaks are above the loaded weights.  After
each method its edits are rolled back, and every bit of the model is compared.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pairs import publish, surroundings
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from kedit_bench.effort import Effort, measured
from kedit_core import EditRequest, discover
from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.editing import EditSession, ModelHost
from kedit_core.hparams import resolve
from kedit_core.models import locate
from kedit_core.protocols import Preparable
from kedit_core.testing.model_state import tensor_bits
from kedit_core.testing.toys import toy_facts, toy_folder

LARGE = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TOY = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "rome": {"stop_loss": 0.0},
    "memit": {"stop_loss": 0.0},
    "alphaedit": {"stop_loss": 0.0, "nullspace_threshold": None, "nullspace_energy": 0.5},
    "ultraedit": {},
}
ONE_BY_ONE = 10  # edits of a method that writes one fact at a time
WARM_UP = 2  # facts
DOCS = Path(__file__).parents[1] / "docs"
LETTERS_PER_TOKEN = 8  # more than any text has on average


def main() -> None:
    options = read_options()
    requests = read_requests(options)
    host = open_host(options)
    before = bits(host)
    weights = sum(p.nbytes for p in host.model.parameters())
    tokens = options.tokens or 2 * host.weight(host.mlp_out(0)).shape[1]
    methods = {}
    for method in options.method or SETTINGS:
        with tempfile.TemporaryDirectory(prefix="kedit-benchmark-") as folder:
            corpus = random_words(Path(folder) / "corpus.txt", LETTERS_PER_TOKEN * tokens)
            store = ArtifactStore(Path(folder) / "artifacts")
            session = EditSession(host, artifacts=store, corpus=corpus)
            methods[method] = costs(session, method, requests, tokens, options)
            methods[method]["every_bit_as_before"] = bits(host) == before
    result = {
        **surroundings(session),
        "parameters": host.model.num_parameters(),
        "weights_megabytes": megabytes(weights),
        "methods": methods,
    }
    publish(result, options)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--method", action="append", choices=SETTINGS, help="only this one; may be repeated"
    )
    parser.add_argument("--toy", action="store_true", help="a tiny shape instead")
    parser.add_argument("--edits", type=int, default=100, help="facts that are written")
    parser.add_argument("--tokens", type=int, help="of the statistics, not twice a matrix's width")
    parser.add_argument("--device", help="by default the accelerator if there is one")
    parser.add_argument("--dtype", default="bfloat16", help="type of the weights")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    return parser.parse_args()


def read_requests(options: argparse.Namespace) -> list[EditRequest]:
    """The facts of the edits, and after them those that warm up."""
    if options.toy:
        found = [
            EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=fact.target_new)
            for fact in toy_facts()
        ]
    else:
        cases = discover().dataset("starter").load()().cases()
        found = [request for case in cases for request in case.requests]
    if len(found) < options.edits + WARM_UP:
        sys.exit(f"There are {len(found)} facts: give --edits {len(found) - WARM_UP} or less.")
    return found[: options.edits + WARM_UP]


def open_host(options: argparse.Namespace) -> ModelHost:
    tokenizer: PreTrainedTokenizerBase
    if options.toy:
        shape, tokenizer = TOY, PreTrainedTokenizerFast.from_pretrained(toy_folder("llama"))
    else:
        folder = locate("smollm2-135m", discover())
        shape, tokenizer = LARGE, AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig.from_dict({"vocab_size": len(tokenizer), **shape})
    torch.manual_seed(0)
    with torch.device(options.device or default_device()):
        dtype = getattr(torch, options.dtype)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    return ModelHost(model, tokenizer, "random weights")


def default_device() -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def random_words(file: Path, letters: int) -> Corpus:
    """Words of kedit's documentation in any order, so that no two keys are the same."""
    pages = " ".join(page.read_text("utf-8") for page in DOCS.glob("*.md"))
    words, draw = sorted(set(re.findall(r"\w+", pages))), random.Random(0)
    with file.open("w", encoding="utf-8") as opened:
        while opened.tell() < letters:
            opened.write(" ".join(draw.choices(words, k=300)) + "\n\n")
    return Corpus(str(file))


def costs(
    session: EditSession,
    method: str,
    requests: Sequence[EditRequest],
    tokens: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """What preparing, editing and rolling back took; the edits are rolled back."""
    spec, device = session.catalog.method(method), session.host.device
    prepares = issubclass(spec.load(), Preparable)
    hparams = resolve(
        spec,
        preset="toy" if options.toy else None,
        settings={**SETTINGS[method], **({"moment_tokens": tokens} if prepares else {})},
        config=session.host.config,
    ).hparams
    preparing = Effort()
    if prepares:
        with measured(device) as preparing:
            session.prepare(spec, hparams=hparams)
    written, others = requests[:-WARM_UP], requests[-WARM_UP:]
    if spec.max_batch == 1:
        written = written[:ONE_BY_ONE]
    with session.trial(spec, others, hparams=hparams):
        pass
    with measured(device) as editing:
        session.edit(spec, written, hparams=hparams)
    with measured(device) as rolling_back:
        session.rollback()
    return {
        "edits": len(written),
        "facts_at_once": spec.max_batch or len(written),
        "settings": hparams.model_dump(mode="json"),
        "prepare": shown(preparing),
        "edit": shown(editing),
        "edits_per_second": len(written) / editing.seconds,
        "rollback_seconds": rolling_back.seconds,
    }


def shown(effort: Effort) -> dict[str, float | None]:
    return {
        "seconds": effort.seconds,
        "device_peak_megabytes": megabytes(effort.device_bytes),
        "host_peak_megabytes": megabytes(effort.host_bytes),
    }


def megabytes(size: int | None) -> float | None:
    return None if size is None else round(size / 1e6, 1)


def bits(host: ModelHost) -> dict[str, str]:
    """A digest of every tensor of the model."""
    tensors = host.model.state_dict()
    return {
        name: hashlib.sha256(tensor_bits(tensor)[1]).hexdigest() for name, tensor in tensors.items()
    }


if __name__ == "__main__":
    main()
