"""Hosts of the tiny random families, with a tokenizer that fits their hundred tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.editing import EditJob, ModelHost
from kedit_core.probing import hidden_of
from kedit_core.tokens import Row, pad
from tests.core.families import VOCABULARY, build

# Decoder-only, every block with ordinary attention and an ordinary MLP.
DENSE = (
    "gpt2",
    "gpt2-square",
    "gptj",
    "gpt_neo",
    "gpt_neox",
    "codegen",
    "llama",
    "llama-square",
    "mistral",
    "internlm3",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "olmo2",
    "glm",
    "glm4",
    "stablelm",
    "cohere",
    "starcoder2",
    "granite",
    "smollm3",
    "opt",
    "opt-post-norm",
    "falcon",
    "falcon-new",
    "bloom",
    "mpt",
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character; it adds nothing."""
    characters = [chr(code) for code in range(33, 127)]
    words = ["<pad>", "<s>", "</s>", "Ġ", "Ċ", *characters]  # Ġ and Ċ: space and line break
    assert len(words) <= VOCABULARY
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def tiny_host(family: str, dtype: torch.dtype = torch.float32) -> ModelHost:
    """A frozen model whose matrices are wide enough that every block changes the logits."""
    model = build(family).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, 0.2, generator=generator)
    return ModelHost(model.to(dtype), tiny_tokenizer(), family)


def job_on(
    host: ModelHost, folder: Path, *, corpus: Corpus | None = None, seed: int = 0
) -> EditJob:
    """A job without requests, with its artifacts in `folder`."""
    return EditJob(
        host=host,
        requests=(),
        artifacts=ArtifactStore(folder),
        fingerprint=host.fingerprint(),
        corpus=corpus or Corpus(),
        seed=seed,
        unedited=contextlib.nullcontext,
    )


@contextlib.contextmanager
def added(host: ModelHost, module: str, places: Tensor, delta: Tensor) -> Iterator:
    """Inside the block the module's output, laid end to end, has `delta` (rows, d) added there."""

    def add(_: object, __: object, output: Tensor) -> Tensor:
        flat = output.reshape(-1, output.shape[-1])
        return flat.index_put((places,), delta.to(output), accumulate=True).reshape(output.shape)

    handle = host.base_module(module).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def plain_output(host: ModelHost, path: str, ids: tuple[int, ...], side: str = "output") -> Tensor:
    """What a module reads or writes at every token of one unpadded row: (tokens, width)."""
    seen: dict[str, Tensor] = {}
    module = host.base_module(path)
    if side == "output":
        # Copied: Falcon adds to its MLP's output in place.
        handle = module.register_forward_hook(lambda m, a, y: seen.update(x=hidden_of(y).clone()))
    else:
        handle = module.register_forward_pre_hook(lambda m, a: seen.update(x=a[0].clone()))
    with torch.no_grad():
        host.model(**pad(host, [Row(ids)]).inputs, use_cache=False)
    handle.remove()
    return seen["x"].reshape(len(ids), -1)
