"""From text to token rows and padded batches: the one place that knows tokenizers.

Positions come from character offsets, so it does not matter whether a tokenizer adds BOS, marks
words by a space, or pads on the left.  A target is encoded together with its prompt; its tokens
are those that end after the prompt's last character.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kedit_core.errors import RequestError
from kedit_core.host import ModelHost
from kedit_core.request import EditRequest
from kedit_core.words import separator

FactToken = Literal["subject_last", "subject_first", "subject_first_after_last", "last"]

MAX_TOKENS = 4096  # of one padded batch


@dataclass(frozen=True)
class Encoded:
    """Token ids and, for each, the characters [start, end) that it stands for."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Row:
    """One line of a batch.

    Attributes:
        prompt: ids that are given.
        targets: ids to predict after them.
        mark: position of interest in `prompt`, counted from its first token.
        merged: the first target token holds characters of the prompt too.
        end: position of the prompt's last token, where `prompt` is only its beginning.
    """

    prompt: tuple[int, ...]
    targets: tuple[int, ...] = ()
    mark: int = -1
    merged: bool = False
    end: int | None = None

    @property
    def until_mark(self) -> Row:
        """What is read up to the mark."""
        return Row(self.ids[: self.mark + 1], mark=self.mark, end=self.last)

    @property
    def last(self) -> int:
        """Position of the prompt's last token."""
        return len(self.prompt) - 1 if self.end is None else self.end

    @property
    def ids(self) -> tuple[int, ...]:
        """What a decoder reads: the last target is never read, only predicted."""
        return self.prompt + self.targets[:-1]


@dataclass(frozen=True)
class Batch:
    """Padded rows.

    Attributes:
        inputs: keyword arguments of the model's forward.
        offsets: for each row, the column of its first token.
        rows: (labels,) row of each label, in the order of rows and tokens.
        columns: (labels,) column whose logits predict it.
        labels: (labels,) the token to predict.
        ends: (rows,) column of the last token of each prompt.
    """

    inputs: dict[str, Tensor]
    offsets: tuple[int, ...]
    rows: Tensor
    columns: Tensor
    labels: Tensor
    ends: Tensor


def encode(host: ModelHost, text: str, *, any_length: bool = False) -> Encoded:
    """Tokens of a text with the special tokens that the model expects before it.

    Raises:
        RequestError: the text has no token, or is longer than the model takes (which
            `any_length` allows).
    """
    found = host.tokenizer(text, return_offsets_mapping=True, truncation=False, verbose=False)
    ids, spans = list(found["input_ids"]), [tuple(s) for s in found["offset_mapping"]]
    if not host.is_encoder_decoder:
        special = _special_ids(host)
        while ids and ids[-1] in special and spans[-1][0] == spans[-1][1]:
            del ids[-1], spans[-1]
    if not ids:
        raise RequestError(f"The text {text!r} has no token for {host.name}. Give some words.")
    if host.max_length is not None and len(ids) > host.max_length and not any_length:
        raise RequestError(
            f"The text {text[:40]!r}… has {len(ids)} tokens, and {host.name} takes at most "
            f"{host.max_length}. Shorten it."
        )
    return Encoded(tuple(ids), tuple(spans))


def _special_ids(host: ModelHost) -> set[int]:
    return set(host.tokenizer.all_special_ids)


def join(
    host: ModelHost, prompt: str, target: str, *, any_length: bool = False, exact: bool = False
) -> Row:
    """A prompt and its target as one row; `exact` puts no separator between them.

    Raises:
        RequestError: one of them has no token, or together they are longer than the model takes
            (which `any_length` allows).
    """
    if host.is_encoder_decoder:
        targets, special = encode(host, target, any_length=any_length), _special_ids(host)
        # A token between words may have an empty span too.
        inner = [
            token
            for token, (start, end) in zip(targets.ids, targets.spans, strict=True)
            if start < end or token not in special
        ]
        if not inner:
            raise RequestError(f"The target {target!r} of {prompt!r} has no token.")
        return Row(encode(host, prompt, any_length=any_length).ids, tuple(inner))
    between = "" if exact else separator(prompt, target)
    whole = encode(host, prompt + between + target, any_length=any_length)
    start = next((n for n, (_, end) in enumerate(whole.spans) if end > len(prompt)), 0)
    if start == 0:
        raise RequestError(f"The prompt {prompt!r} or its target {target!r} has no token.")
    # Where offsets leave out spaces, a space of the prompt that no token before has is in it too.
    merged = min(whole.spans[start][0], whole.spans[start - 1][1]) < len(prompt)
    return Row(whole.ids[:start], whole.ids[start:], merged=merged)


def fit(host: ModelHost, row: Row, new_tokens: int = 0) -> tuple[Row, bool]:
    """The row with the beginning of its prompt left out where the model would not take it whole.

    Special tokens at the very beginning stay.

    Args:
        host: says how much it takes.
        row: without a mark.
        new_tokens: room to leave after the row.

    Returns:
        The row, and whether something was left out.

    Raises:
        RequestError: the targets and new tokens alone are too long.
    """
    if host.max_length is None:
        return row, False
    after = len(row.targets[:-1]) + max(new_tokens - 1, 0)
    room = host.max_length - after
    if host.is_encoder_decoder and room > 0:  # the decoder reads its start token, not the prompt
        room = host.max_length
    if len(row.prompt) <= room:
        return row, False
    special = _special_ids(host)
    head = 0
    while head < len(row.prompt) and row.prompt[head] in special:
        head += 1
    if room <= head:
        raise RequestError(
            f"An answer of {after + 1} tokens leaves no room for its prompt: {host.name} takes at "
            f"most {host.max_length}."
        )
    kept = row.prompt[:head] + row.prompt[len(row.prompt) - (room - head) :]
    return replace(row, prompt=kept), True


def rewrite_row(
    host: ModelHost, request: EditRequest, fact_token: FactToken = "subject_last", context: str = ""
) -> Row:
    """The request's prompt and target after a context, marked at its fact token.

    A blank at the end of the prompt may be read as part of the target; then the prompt's last
    token is the one before it.

    Raises:
        RequestError: too long, or a fact token of the subject is asked for and there is none, as
            the request has no subject or the target takes its last characters into a token.
    """
    row = join(host, context + request.text, request.target_new)
    mark = fact_position(host, request, fact_token, context)
    if fact_token != "last":
        alone = encode(host, context + request.text).ids
        until = fact_position(host, request, context=context) + 1
        if row.prompt[:until] != alone[:until]:
            raise RequestError(
                f"Subject and target of {request.text!r} share a token for {host.name}, so that "
                f"the subject has no last token of its own. Put a word between them."
            )
    return replace(row, mark=min(mark, len(row.prompt) - 1))


def fact_position(
    host: ModelHost, request: EditRequest, fact_token: FactToken = "subject_last", context: str = ""
) -> int:
    """Position of the fact token in the tokens of `context + request.text`."""
    encoded = encode(host, context + request.text)
    if fact_token == "last":
        return len(encoded.ids) - 1
    start, end = (len(context) + edge for edge in request.subject_span)
    inside = [n for n, (a, b) in enumerate(encoded.spans) if b > a and a < end and b > start]
    if fact_token == "subject_first":
        return inside[0]
    if fact_token == "subject_first_after_last":
        return min(inside[-1] + 1, len(encoded.ids) - 1)
    return inside[-1]


def pad(host: ModelHost, rows: Sequence[Row], align: Sequence[int] | None = None) -> Batch:
    """Put rows into one batch.

    Args:
        host: the model that will read it.
        rows: at least one.
        align: for each row a position; these come to stand in one column, so that rows are padded
            on both sides.  By default rows begin at column 0 (padding on the right).
    """
    if host.is_encoder_decoder:
        return _pad_encoder_decoder(host, rows)
    starts = [0] * len(rows) if align is None else [max(align) - a for a in align]
    width = max(start + len(row.ids) for start, row in zip(starts, rows, strict=True))
    ids = torch.full((len(rows), width), pad_id(host))
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for n, (start, row) in enumerate(zip(starts, rows, strict=True)):
        ids[n, start : start + len(row.ids)] = torch.tensor(row.ids)
        mask[n, start : start + len(row.ids)] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if host.accepts("position_ids"):
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    columns = [
        start + len(row.prompt) - 1 + t
        for start, row in zip(starts, rows, strict=True)
        for t in range(len(row.targets))
    ]
    return _batch(host, rows, inputs, tuple(starts), columns)


def _pad_encoder_decoder(host: ModelHost, rows: Sequence[Row]) -> Batch:
    start = host.model.config.decoder_start_token_id
    decoder = [(start, *row.targets[:-1]) for row in rows]
    ids, mask = _pad_right(host, [row.prompt for row in rows])
    decoder_ids, decoder_mask = _pad_right(host, decoder)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
    }
    columns = [t for row in rows for t in range(len(row.targets))]
    return _batch(host, rows, inputs, (0,) * len(rows), columns)


def _pad_right(host: ModelHost, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id(host)] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def _batch(
    host: ModelHost,
    rows: Sequence[Row],
    inputs: dict[str, Tensor],
    offsets: tuple[int, ...],
    columns: list[int],
) -> Batch:
    device = host.device
    numbers = [n for n, row in enumerate(rows) for _ in row.targets]
    labels = [token for row in rows for token in row.targets]
    ends = [offset + row.last for offset, row in zip(offsets, rows, strict=True)]
    return Batch(
        inputs={name: tensor.to(device) for name, tensor in inputs.items()},
        offsets=offsets,
        rows=torch.tensor(numbers, dtype=torch.long, device=device),
        columns=torch.tensor(columns, dtype=torch.long, device=device),
        labels=torch.tensor(labels, dtype=torch.long, device=device),
        ends=torch.tensor(ends, dtype=torch.long, device=device),
    )


def pad_id(host: ModelHost) -> int:
    """A token to fill gaps with; masked everywhere, so any will do where none is defined."""
    for candidate in (host.tokenizer.pad_token_id, host.tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


def buckets(lengths: Sequence[int], max_tokens: int, batch_cost: int = 64) -> list[list[int]]:
    """Indices in groups of similar length, each of at most `max_tokens` with its padding.

    Args:
        lengths: in tokens.
        max_tokens: of a padded batch.
        batch_cost: what a batch costs besides its tokens, in tokens; a group is divided where its
            padding would cost more.
    """
    groups: list[list[int]] = []
    padding = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # Sorted, so this one is the longest of its group.
        if groups:
            padding += len(groups[-1]) * (lengths[index] - lengths[groups[-1][-1]])
        full = not groups or (len(groups[-1]) + 1) * lengths[index] > max_tokens
        if full or padding > batch_cost:
            groups.append([])
            padding = 0
        groups[-1].append(index)
    return groups
