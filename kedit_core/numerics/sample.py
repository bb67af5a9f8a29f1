"""Text that the model itself writes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from kedit_core.errors import EditError
from kedit_core.forward import only_config
from kedit_core.host import ModelHost
from kedit_core.job import EditJob
from kedit_core.targets import Contexts
from kedit_core.tokens import Row, encode, pad, pad_id

# Words that open sentences of many kinds, so that sampled texts differ from the start.
OPENINGS = (
    "The",
    "Therefore",
    "Because",
    "I",
    "You",
    "In",
    "When",
    "One",
    "If",
    "Although",
    "This",
    "We",
    "After",
    "People",
    "Many",
    "What",
)


def sample(
    host: ModelHost, starts: Sequence[str], new_tokens: int, generator: Generator, top_k: int
) -> list[tuple[int, ...]]:
    """Continue each text by exactly `new_tokens` sampled tokens.

    Args:
        host: a causal model.
        starts: texts to continue.
        new_tokens: how many tokens to draw for each.
        generator: CPU generator; the same state gives the same texts.
        top_k: draw among this many most probable tokens.

    Returns:
        For each start the ids of start and continuation.
    """
    rows = [Row(encode(host, text).ids) for text in starts]
    batch = pad(host, rows, align=[len(row.prompt) - 1 for row in rows])
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=pad_id(host),
        eos_token_id=None,
    )
    draw = _Draw(generator, top_k, set(host.tokenizer.all_special_ids))
    with torch.no_grad(), only_config(host, config):
        ids = host.model.generate(
            input_ids=batch.inputs["input_ids"],
            attention_mask=batch.inputs["attention_mask"],
            generation_config=config,
            logits_processor=LogitsProcessorList([draw]),
        )
    new = ids[:, batch.inputs["input_ids"].shape[1] :].tolist()
    return [row.prompt + tuple(drawn) for row, drawn in zip(rows, new, strict=True)]


class _Draw(LogitsProcessor):
    """Draws the next token itself and leaves greedy decoding no other choice."""

    def __init__(self, generator: Generator, top_k: int, banned: set[int]) -> None:
        self.generator, self.top_k, self.banned = generator, top_k, sorted(banned)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.float().cpu()
        logits[:, self.banned] = -torch.inf
        best = logits.topk(min(self.top_k, logits.shape[1]), dim=1)
        if bool(best.values.isnan().any()):
            raise EditError(
                "The model's logits are not numbers, so it can write no text. Check its weights, "
                "or load it in float32."
            )
        chosen = torch.multinomial(best.values.softmax(dim=1), 1, generator=self.generator)
        tokens = best.indices.gather(1, chosen).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


def context_texts(job: EditJob, contexts: Contexts) -> tuple[str, ...]:
    """Short texts to put before a prompt, so that an edit does not depend on standing first.

    Sampled once per model, seed and lengths from the unedited model, and kept.

    Args:
        job: gives model, seed and artifact store.
        contexts: pairs (tokens, count) of sampled texts, or texts themselves.

    Returns:
        Texts that end in a space.  Sampled ones end in a full stop before it and have no line
        breaks.
    """
    starts = itertools.cycle(OPENINGS[:5])
    pairs = [context for context in contexts if not isinstance(context, str)]
    parts = [(list(itertools.islice(starts, count)), tokens) for tokens, count in pairs]
    sampled = iter(_written(job, parts) if parts else ())
    texts: list[str] = []
    for context in contexts:
        if isinstance(context, str):
            texts.append(f"{context.rstrip()} ")
        else:
            texts += itertools.islice(sampled, context[1])
    return tuple(texts)


def continued_texts(job: EditJob, starts: Sequence[str], tokens: int) -> tuple[str, ...]:
    """As `context_texts`, one text from each start.

    Args:
        job: gives model, seed and artifact store.
        starts: first words of the texts.
        tokens: how many each of them is continued by.
    """
    return _written(job, [(list(starts), tokens)])


def _written(job: EditJob, parts: Sequence[tuple[list[str], int]]) -> tuple[str, ...]:
    """Texts from starts, each continued by so many tokens, all drawn one after another."""
    key = {"model": job.fingerprint, "parts": parts, "seed": job.seed, "version": 2}
    stored = job.artifacts.get("contexts", key)
    if stored is None:
        drawn: list[tuple[int, ...]] = []
        generator = job.generator()
        with job.unedited():
            for starts, tokens in parts:
                drawn += sample(job.host, starts, tokens, generator, top_k=5)
        width = max(map(len, drawn))
        ids = torch.tensor([[*row, *[-1] * (width - len(row))] for row in drawn])
        stored = {"ids": ids}
        job.artifacts.put("contexts", key, stored)
    return tuple(_sentence(job.host, row) for row in stored["ids"].tolist())


def _sentence(host: ModelHost, ids: Sequence[int]) -> str:
    kept = [token for token in ids if token >= 0]
    text = str(host.tokenizer.decode(kept, skip_special_tokens=True))
    return " ".join(text.split()) + ". "
