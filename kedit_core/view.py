"""`ModelView`: everyone who asks the model something asks here.

Edits in weights, wrapped modules, prompts and logits then count alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from kedit_core.effects import CallMiddleware
from kedit_core.errors import RequestError
from kedit_core.forward import label_logits, only_config
from kedit_core.guard import untouched
from kedit_core.host import ModelHost
from kedit_core.tokens import Row, buckets, encode, join, pad, pad_id

MAX_TOKENS = 4096  # of one padded batch


@dataclass(frozen=True)
class Comparison:
    """A prompt's greedy answers without and with the edits."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Score:
    """How a model reads a given answer, token by token (teacher forcing).

    Attributes:
        prompt, target: what was asked.
        tokens: ids of the target.
        logprobs: natural log-probability of each, given all before it.
        predicted: the most probable token at each place.
        merged: the first token holds characters of the prompt too.
    """

    prompt: str
    target: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    predicted: tuple[int, ...]
    merged: bool = False

    @property
    def accuracy(self) -> float:
        """Share of target tokens that are the most probable ones."""
        hits = [a == b for a, b in zip(self.tokens, self.predicted, strict=True)]
        return sum(hits) / len(hits)

    @property
    def mean_logprob(self) -> float:
        """Mean of the tokens' log-probabilities."""
        return sum(self.logprobs) / len(self.logprobs)


@dataclass(frozen=True)
class Answer:
    """All that a view says to one probe: what it generates and how it reads the answers.

    Attributes:
        prompt: what was asked.
        text: the greedy continuation.
        scores: one per expected answer.
    """

    prompt: str
    text: str
    scores: tuple[Score, ...] = ()


class ModelView:
    """Questions to a model.

    Args:
        host: the model.
        calls: returns the middleware in force, oldest first.
    """

    def __init__(self, host: ModelHost, calls: Callable[[], list[CallMiddleware]] = list) -> None:
        self.host = host
        self._calls = calls

    @overload
    def greedy(self, prompts: str, max_new_tokens: int = ...) -> str: ...

    @overload
    def greedy(self, prompts: list[str], max_new_tokens: int = ...) -> list[str]: ...

    def greedy(self, prompts: str | list[str], max_new_tokens: int = 16) -> str | list[str]:
        """Greedy continuation of each prompt, without the prompt.

        Raises:
            RequestError: a prompt and its answer are longer than the model takes.
        """
        if isinstance(prompts, str):
            return self.greedy([prompts], max_new_tokens)[0]
        rows = [Row(encode(self.host, self._asked(prompt)).ids) for prompt in prompts]
        texts = [""] * len(rows)
        longest = [len(row.prompt) + max_new_tokens for row in rows]
        self._check_room(prompts, longest)
        for group in buckets(longest, MAX_TOKENS):
            continued = self._generate([rows[n] for n in group], max_new_tokens)
            for n, ids in zip(group, continued, strict=True):
                texts[n] = self._new_text(rows[n].prompt, ids)
        return texts

    def _check_room(self, prompts: Sequence[str], longest: Sequence[int]) -> None:
        limit = self.host.max_length
        if self.host.is_encoder_decoder or limit is None or not longest:
            return
        length, prompt = max(zip(longest, prompts, strict=True))
        if length - 1 > limit:  # the last token is never read
            raise RequestError(
                f"The prompt {prompt[:40]!r}… and its answer have {length} tokens, and "
                f"{self.host.name} takes at most {limit}. Shorten it, or ask for fewer tokens."
            )

    def score(self, prompts: Sequence[str], targets: Sequence[str]) -> list[Score]:
        """How the model reads each target after its prompt.

        Raises:
            RequestError: a prompt with its target is longer than the model takes.
        """
        asked = zip(prompts, targets, strict=True)
        rows = [join(self.host, self._asked(prompt), target) for prompt, target in asked]
        scores: list[Score | None] = [None] * len(rows)
        for group in buckets([len(row.ids) for row in rows], MAX_TOKENS):
            for n, logits in zip(group, self._target_logits([rows[n] for n in group]), strict=True):
                scores[n] = _score(prompts[n], targets[n], rows[n], logits)
        return [score for score in scores if score is not None]

    def logits(self, prompts: Sequence[str]) -> Tensor:
        """Next-token logits after each prompt: (prompts, vocabulary), float32, on the CPU."""
        rows = [Row(encode(self.host, self._asked(p)).ids, targets=(0,)) for p in prompts]
        return torch.cat([logits[:1] for logits in self._target_logits(rows)])

    def _asked(self, prompt: str) -> str:
        for call in self._calls():
            prompt = call.prompt(prompt)
        return prompt

    @torch.no_grad()
    def _target_logits(self, rows: Sequence[Row]) -> list[Tensor]:
        """For each row the logits that predict its targets: (targets, vocabulary)."""
        batch = pad(self.host, rows)
        with untouched(self.host.model, self.host.tokenizer):
            logits = label_logits(self.host, batch).float()
        for call in self._calls():
            logits = call.logits(logits)
        return list(logits.cpu().split([len(row.targets) for row in rows]))

    @torch.no_grad()
    def _generate(self, rows: Sequence[Row], max_new_tokens: int) -> list[list[int]]:
        host = self.host
        if host.is_encoder_decoder:
            batch = pad(host, rows)
            inputs = {k: v for k, v in batch.inputs.items() if not k.startswith("decoder")}
            start = 1
        else:
            # Left padding: all rows end in the last column, where generation goes on.
            batch = pad(host, rows, align=[len(row.prompt) - 1 for row in rows])
            inputs = {k: batch.inputs[k] for k in ("input_ids", "attention_mask")}
            start = inputs["input_ids"].shape[1]
        stops = _stop_ids(host)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=pad_id(host),
            eos_token_id=sorted(stops) or None,
            bos_token_id=host.tokenizer.bos_token_id,
            decoder_start_token_id=getattr(host.model.config, "decoder_start_token_id", None),
        )
        processors = LogitsProcessorList([_Calls(self._calls())] if self._calls() else [])
        with untouched(host.model, host.tokenizer), only_config(host, config):
            output: Any = host.model.generate(
                **inputs, generation_config=config, logits_processor=processors
            )
        return [_until(ids, stops) for ids in output[:, start:].tolist()]

    def _new_text(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        if self.host.is_encoder_decoder:
            return self._decode(ids)
        return self._decode([*prompt, *ids])[len(self._decode(prompt)) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.host.tokenizer.decode(list(ids), skip_special_tokens=True))


class _Calls(LogitsProcessor):
    def __init__(self, calls: Sequence[CallMiddleware]) -> None:
        self.calls = calls

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for call in self.calls:
            scores = call.logits(scores)
        return scores


def _score(prompt: str, target: str, row: Row, logits: Tensor) -> Score:
    logprobs = torch.log_softmax(logits, dim=-1)
    tokens = torch.tensor(row.targets)
    picked = logprobs.gather(1, tokens[:, None])[:, 0]
    return Score(
        prompt,
        target,
        row.targets,
        tuple(picked.tolist()),
        tuple(logits.argmax(dim=-1).tolist()),
        row.merged,
    )


def _stop_ids(host: ModelHost) -> set[int]:
    stops: set[int] = set()
    config = getattr(host.model, "generation_config", None)
    for found in (host.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        stops |= {found} if isinstance(found, int) else set(found or ())
    return stops


def _until(ids: list[int], stops: set[int]) -> list[int]:
    end = next((n for n, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
