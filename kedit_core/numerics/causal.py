"""Causal tracing: which states of a model carry a fact.

Meng et al. 2022 (ROME, arXiv:2202.05262), section 2.  A clean run answers a prompt.  In corrupted
runs noise on the embeddings of the subject hides what is asked about.  A corrupted run in which
one state is put back as it was in the clean run shows, by the answer's probability, what this
state alone carries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from kedit_core.errors import ModelError, RequestError
from kedit_core.host import ModelHost
from kedit_core.numerics.restore import Corruption, Span
from kedit_core.numerics.states import Kind, embedding_scale, embeddings, part_of
from kedit_core.progress import progress
from kedit_core.request import EditRequest
from kedit_core.tokens import encode, fact_position, join

KINDS: tuple[Kind, ...] = ("block", "mlp", "attn")
PLACES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first token after it",
    "further tokens",
    "last token",
)
WINDOW, SAMPLES = 10, 10


@dataclass(frozen=True, eq=False)
class TraceResult:
    """What restoring single states of one fact does.

    Attributes:
        prompt: the text, the subject in its place.
        kind: output of which part was restored: block, mlp or attn.
        window: how many layers about each were restored together.
        scores: (layers, tokens) mean probability of `answer` with the state restored; float32
            or wider, on the CPU.
        low: its mean probability in the corrupted runs.
        high: its probability in the clean run.
        tokens: text of each token.
        subject: the subject's tokens [start, end).
        answer: the token that the clean run finds most probable, as text.
        level: ν, the standard deviation of the noise.
        is_expected: whether an expected answer begins with that token; True where none is given.
    """

    prompt: str
    kind: Kind
    window: int
    scores: Tensor
    low: float
    high: float
    tokens: tuple[str, ...]
    subject: Span
    answer: str
    level: float
    is_expected: bool = True

    @property
    def effects(self) -> Tensor:
        """Indirect effect of each state: its score minus `low`, (layers, tokens)."""
        return self.scores - self.low

    @property
    def total_effect(self) -> float:
        """`high` minus `low`."""
        return self.high - self.low


@dataclass(frozen=True, eq=False)
class Averages:
    """Indirect effects averaged over facts, by the place of the token.

    Attributes:
        kind: output of which part was restored.
        window: how many layers about each were restored together.
        effects: (6, layers) average indirect effect at the places `PLACES`; NaN where no fact has
            such a token.
        errors: (6, layers) half of the 95 % interval: 1.96 s / √n, and 0 for a single fact.
        counts: facts that have a token at each place.
        total_effect: average of the facts.
        left_out: prompts that the model does not answer as expected.
    """

    kind: Kind
    window: int
    effects: Tensor
    errors: Tensor
    counts: tuple[int, ...]
    total_effect: float
    left_out: tuple[str, ...]

    def strongest(self, place: str = "last subject token", count: int = 5) -> list[int]:
        """Layers with the largest average effect at a place, the largest first."""
        effects = self.effects[PLACES.index(place)]
        return effects.argsort(descending=True, stable=True)[:count].tolist()


def trace(
    host: ModelHost,
    prompt: str,
    subject: str,
    answer: str | Sequence[str] = (),
    *,
    generator: Generator,
    kinds: Sequence[Kind] = KINDS,
    window: int = WINDOW,
    level: float | None = None,
    samples: int = SAMPLES,
    plain: bool = False,
) -> tuple[TraceResult, ...]:
    """Restore every state of a prompt, one at a time.

    Args:
        host: a causal model.
        prompt: text to complete, the subject in it verbatim once, or `{}` in its place.
        subject: what noise hides.
        answer: the expected answer, or several; only `is_expected` depends on it.
        generator: where the noise comes from; all restorations see the same.
        kinds: block restores single states; mlp and attn the outputs of several layers.
        window: how many layers of an MLP or attention about each one, cut at the ends.
        level: ν; by default `noise_level` of this fact.
        samples: corrupted copies that scores are averaged over.
        plain: one full run per state: the oracle of the fast way.

    Returns:
        One result for each kind.

    Raises:
        ModelError: the model is no causal one, or a block has no part of such a kind.
        RequestError: the prompt does not hold the subject, or a number makes no sense.
    """
    _check_causal(host)
    if samples < 1 or window < 1 or (level is not None and not 0 < level < math.inf):
        raise RequestError("Tracing needs a positive number of samples, window and noise level.")
    for kind in kinds:
        for layer in range(len(host.blocks)):
            part_of(host, kind, layer)
    fact = _fact(prompt, subject)
    encoded = encode(host, fact.text)
    span = _subject_tokens(host, fact)
    level = noise_level(host, [(prompt, subject)]) if level is None else level
    corruption = Corruption(host, encoded.ids, span, level, samples, generator)
    expected = [answer] if isinstance(answer, str) else answer
    firsts = [join(host, fact.text, text).targets[0] for text in expected]
    results = []
    steps = len(encoded.ids) - (0 if plain else span[0])
    with progress(len(kinds) * steps, "tracing", "tok") as bar:
        for kind in kinds:
            spans = windows(len(host.blocks), 1 if kind == "block" else window)
            results.append(
                TraceResult(
                    prompt=fact.text,
                    kind=kind,
                    window=1 if kind == "block" else window,
                    scores=corruption.scores(kind, spans, bar.update, plain=plain),
                    low=corruption.low,
                    high=corruption.high,
                    tokens=_texts(host, fact.text),
                    subject=span,
                    answer=_decoded(host, corruption.answer),
                    level=level,
                    is_expected=not firsts or corruption.answer in firsts,
                )
            )
    return tuple(results)


def noise_level(host: ModelHost, facts: Sequence[tuple[str, str]]) -> float:
    """ν = 3 σ, with σ the standard deviation of the embeddings of the subjects' tokens.

    Of embeddings as they enter the first block, where a model scales what it looks up.

    Args:
        host: a causal model.
        facts: prompt and subject of each.
    """
    _check_causal(host)
    found = []
    for prompt, subject in facts:
        fact = _fact(prompt, subject)
        start, end = _subject_tokens(host, fact)
        found.append(embeddings(host, encode(host, fact.text).ids)[start:end])
    first = _fact(*facts[0])
    return 3 * float(torch.cat(found).std()) * embedding_scale(host, encode(host, first.text).ids)


def windows(layers: int, width: int) -> list[Span]:
    """For each layer the layers [start, end) about it, `width` of them away from the ends."""
    return [
        (max(0, layer - width // 2), min(layers, layer + (width + 1) // 2))
        for layer in range(layers)
    ]


def average(results: Sequence[TraceResult]) -> Averages:
    """Average over facts, of those that the model answers as expected.

    A token belongs to one place: the last token of a prompt that ends with its subject is the
    subject's, and that of a one-token subject is its last.  A fact's tokens at one place are
    averaged first.

    Args:
        results: of one kind and one model.

    Raises:
        RequestError: they are not alike, or the model answers none as expected.
    """
    kept = [result for result in results if result.is_expected]
    if len({(result.kind, result.window, len(result.scores)) for result in results}) > 1:
        raise RequestError("Traces of several kinds, windows or models have no average.")
    if not kept:
        raise RequestError(
            f"The model answers none of the {len(results)} prompts as expected, so there is "
            f"nothing to average. Trace facts that it knows."
        )
    effects, errors, counts = [], [], []
    for place in range(len(PLACES)):
        found = [
            result.effects[:, tokens].mean(1)
            for result in kept
            if (tokens := _places(result)[place])
        ]
        counts.append(len(found))
        layers = torch.stack(found) if found else kept[0].scores[None, :, 0] * math.nan
        effects.append(layers.mean(0))
        spread = layers.std(0) if len(found) > 1 else torch.zeros_like(layers[0])
        errors.append(1.96 * spread / math.sqrt(max(len(found), 1)))
    return Averages(
        kind=kept[0].kind,
        window=kept[0].window,
        effects=torch.stack(effects),
        errors=torch.stack(errors),
        counts=tuple(counts),
        total_effect=sum(result.total_effect for result in kept) / len(kept),
        left_out=tuple(result.prompt for result in results if not result.is_expected),
    )


def _places(result: TraceResult) -> list[list[int]]:
    """Tokens at each of the places `PLACES`."""
    (start, end), last = result.subject, len(result.tokens) - 1
    return [
        list(range(start, end - 1)[:1]),
        list(range(start + 1, end - 1)),
        [end - 1],
        list(range(end, last)[:1]),
        list(range(end + 1, last)),
        [last] if last >= end else [],
    ]


def _check_causal(host: ModelHost) -> None:
    if host.is_encoder_decoder:
        raise ModelError(
            f"{host.name} is an encoder-decoder model; causal tracing needs a causal one."
        )


def _fact(prompt: str, subject: str) -> EditRequest:
    """The prompt and where its subject is, checked; the target is of no account."""
    return EditRequest(prompt=prompt, subject=subject, target_new=subject)


def _subject_tokens(host: ModelHost, fact: EditRequest) -> Span:
    return fact_position(host, fact, "subject_first"), fact_position(host, fact, "subject_last") + 1


def _texts(host: ModelHost, text: str) -> tuple[str, ...]:
    encoded = encode(host, text)
    return tuple(
        text[start:end] if end > start else _decoded(host, token)
        for token, (start, end) in zip(encoded.ids, encoded.spans, strict=True)
    )


def _decoded(host: ModelHost, token: int) -> str:
    return str(host.tokenizer.decode([token]))
