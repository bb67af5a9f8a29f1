"""What a model writes after rows of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from kedit_core.calls import changed, depths_of
from kedit_core.effects import Middleware
from kedit_core.forward import only_config, streams
from kedit_core.guard import untouched
from kedit_core.host import ModelHost
from kedit_core.tokens import MAX_TOKENS, Row, buckets, pad, pad_id

# New ids up to an end token, and whether there was one.
Written = tuple[list[int], bool]


def write_greedily(
    host: ModelHost, calls: Sequence[Middleware], rows: Sequence[Row], new_tokens: int
) -> list[Written]:
    """What the model writes after each row, each token the most probable one.

    Args:
        host: the model.
        calls: the middleware in force.
        rows: the prompts; no row and its new tokens are longer than the model takes.
        new_tokens: how many at most.
    """
    written: list[Written] = [([], False)] * len(rows)
    lengths = [len(row.prompt) + new_tokens for row in rows]
    # Each new token is a pass of its own, so unlike lengths are better written together.
    for group in buckets(lengths, MAX_TOKENS, batch_cost=64 * new_tokens):
        continued = _generate(host, calls, [rows[n] for n in group], new_tokens)
        for n, found in zip(group, continued, strict=True):
            written[n] = found
    return written


def write_freely(
    host: ModelHost,
    calls: Sequence[Middleware],
    rows: Sequence[Row],
    rooms: Sequence[int],
    generators: Sequence[Generator],
    top_k: int,
) -> list[Written]:
    """What the model writes after each row, each token drawn among the most probable ones.

    Args:
        host: the model.
        calls: the middleware in force.
        rows: the prompts.
        rooms: how many tokens each may have at least; more are written where others have more.
        generators: one of each row, which alone decides what is drawn for it.
        top_k: draw among so many.
    """
    written: list[Written] = [([], False)] * len(rows)
    for group in _side_by_side(host, [len(row.prompt) for row in rows], rooms):
        draw = _Draw([generators[n] for n in group], top_k)
        new_tokens = max(rooms[n] for n in group)
        drawn = _generate(host, calls, [rows[n] for n in group], new_tokens, draw)
        for n, new in zip(group, drawn, strict=True):
            written[n] = new
    return written


def _side_by_side(
    host: ModelHost, prompts: Sequence[int], rooms: Sequence[int]
) -> Iterator[list[int]]:
    """Groups in which the longest prompt and the longest continuation fit the model together.

    All rows of a batch go on until the last one ends.

    Args:
        host: the model.
        prompts: their lengths.
        rooms: how far each goes on; the longer the prompt, the less.
    """
    limit = None if host.is_encoder_decoder else host.max_length
    totals = [prompt + room for prompt, room in zip(prompts, rooms, strict=True)]
    for bucket in buckets(totals, MAX_TOKENS):
        group: list[int] = []
        for n in sorted(bucket, key=lambda n: prompts[n]):
            if group and limit is not None and prompts[n] + rooms[group[0]] - 1 > limit:
                yield group
                group = []
            group.append(n)
        yield group


@torch.no_grad()
def _generate(
    host: ModelHost,
    calls: Sequence[Middleware],
    rows: Sequence[Row],
    new_tokens: int,
    draw: LogitsProcessor | None = None,
) -> list[Written]:
    if host.is_encoder_decoder:
        batch = pad(host, rows)
        inputs = {k: v for k, v in batch.inputs.items() if not k.startswith("decoder")}
        start = 1
    else:
        # Left padding: all rows end in the last column, where generation goes on.
        batch = pad(host, rows, align=[len(row.prompt) - 1 for row in rows])
        inputs = {k: batch.inputs[k] for k in ("input_ids", "attention_mask")}
        start = inputs["input_ids"].shape[1]
    stops = stop_ids(host)
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=pad_id(host),
        eos_token_id=sorted(stops) or None,
        bos_token_id=host.tokenizer.bos_token_id,
        decoder_start_token_id=getattr(host.model.config, "decoder_start_token_id", None),
    )
    with (
        host.lock,
        untouched(host.model, host.tokenizer),
        only_config(host, config),
        streams(host, depths_of(calls)) as found,
    ):
        steps = [_Calls(host, calls, found)] if calls else []
        processors = LogitsProcessorList([*steps, draw] if draw is not None else steps)
        output: Any = host.model.generate(
            **inputs, generation_config=config, logits_processor=processors
        )
    return [_until(ids, stops) for ids in output[:, start:].tolist()]


class _Calls(LogitsProcessor):
    """The middleware at each new token; `streams` are those of the step's own pass."""

    def __init__(
        self, host: ModelHost, calls: Sequence[Middleware], streams: Mapping[int, Tensor]
    ) -> None:
        self.host, self.calls, self.streams = host, calls, streams

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        last = {depth: stream[:, -1] for depth, stream in self.streams.items()}
        return changed(self.host, self.calls, scores, last)


class _Draw(LogitsProcessor):
    """Draws each row's next token with its own generator and leaves greedy decoding no choice."""

    def __init__(self, generators: Sequence[Generator], top_k: int) -> None:
        self.generators, self.top_k = generators, top_k

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best = scores.float().topk(min(self.top_k, scores.shape[1]), dim=1)
        shares = best.values.cpu().softmax(dim=1)
        places = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(shares, self.generators, strict=True)
        ]
        chosen = best.indices.gather(1, torch.stack(places).to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def stop_ids(host: ModelHost) -> set[int]:
    """The tokens that end what a model writes."""
    stops: set[int] = set()
    config = getattr(host.model, "generation_config", None)
    for found in (host.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        stops |= {found} if isinstance(found, int) else set(found or ())
    return stops


def _until(ids: list[int], stops: set[int]) -> tuple[list[int], bool]:
    end = next((n for n, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end], end < len(ids)
