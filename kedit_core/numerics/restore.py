"""A prompt whose subject is hidden by noise, and single states put back.

The plain way runs the model once for each state.  The fast way gives the same numbers with less:
the clean and the corrupted run are recorded once; a restored run begins behind the first block
that is restored, with what the corrupted run has there; tokens before the restored one are read
from the corrupted run's keys and values; and the runs of all layers of a token are one batch,
which each joins behind its own block.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from kedit_core.effects import has_active_wrapper
from kedit_core.forward import copy_of_cache, forward_as, head_only_at, run
from kedit_core.host import ModelHost
from kedit_core.numerics.states import (
    Kind,
    changed,
    embedding_scale,
    embeddings,
    part_of,
    wide,
    with_tokens,
)
from kedit_core.probing import hidden_of, with_hidden
from kedit_core.tokens import Batch, Row, pad

log = logging.getLogger(__name__)

Span = tuple[int, int]
MAX_TOKENS = 2048  # of one batch of restored runs


class Corruption:
    """The clean run of a prompt, and runs in which noise hides its subject.

    Args:
        host: a causal model.
        ids: tokens of the prompt.
        subject: the subject's tokens [start, end).
        level: ν, standard deviation of the noise on the subject's token embeddings, in the unit
            of `embedding_scale`.
        samples: corrupted copies.  The noise of each is the same in all restored runs.
        generator: where the noise comes from.

    Attributes:
        answer: the token that the clean run finds most probable.
        high: its probability in the clean run.
        low: its mean probability in the corrupted runs.
    """

    @torch.no_grad()
    def __init__(
        self,
        host: ModelHost,
        ids: Sequence[int],
        subject: Span,
        level: float,
        samples: int,
        generator: Generator,
    ) -> None:
        self._host = host
        self._row = pad(host, [Row(tuple(ids))])
        self._subject = subject
        self._samples = samples
        self._length = len(ids)
        width = embeddings(host, ids).shape[-1]
        noise = torch.randn(samples, subject[1] - subject[0], width, generator=generator)
        self._noise = noise * (level / embedding_scale(host, ids))
        # By kind and layer, (1 or samples, tokens, d): outputs of the clean run's parts; outputs of
        # the corrupted runs' blocks; and the same with the part of just this block restored.
        self._clean: dict[Kind, list[Tensor]] = {}
        self._restored: dict[Kind, list[Tensor]] = {}
        output, outputs = self._recorded("block", 1)
        self._clean["block"] = self._restored["block"] = [hidden_of(found) for found in outputs]
        self.answer = int(output.logits.argmax())
        self.high = float(self._probabilities(output.logits))
        with self._noisy(samples):
            output, outputs = self._recorded("block", samples, use_cache=True)
        self._lows = self._probabilities(output.logits).cpu()
        self.low = float(self._lows.mean())
        self._hidden = [hidden_of(found) for found in outputs]
        self._form = outputs[0]
        self._cache = getattr(output, "past_key_values", None)

    @torch.no_grad()
    def score(
        self,
        kind: Kind,
        layers: Sequence[int],
        tokens: Sequence[int],
        copies: int | None = None,
    ) -> float:
        """Mean probability of the answer with these states restored, by whole corrupted runs.

        Args:
            kind: output of the block, or of its MLP or attention.
            layers: where.
            tokens: at which.
            copies: only so many of the corrupted copies, the first.
        """
        rows = copies or self._samples
        clean = self._clean_states(kind)
        with self._noisy(rows), contextlib.ExitStack() as stack:
            for layer in layers:
                put_back = partial(with_tokens, tokens=tokens, new=clean[layer][:, tokens])
                path = part_of(self._host, kind, layer)
                stack.enter_context(changed(self._host, path, rows, put_back))
            output = run(self._host, self._batch(rows))
        return float(self._probabilities(output.logits[:, -1]).mean())

    @torch.no_grad()
    def scores(
        self, kind: Kind, spans: Sequence[Span], done: Callable[[], object], *, plain: bool = False
    ) -> Tensor:
        """Mean probability of the answer with each state restored: (layers, tokens), float32.

        Args:
            kind: output of the block, or of its MLP or attention.
            spans: for each layer the layers [start, end) that are restored together.
            done: called after each token.
            plain: one run per state.
        """
        if not plain and not has_active_wrapper(self._host.model):
            for cached in (True, False):
                try:
                    found = self._fast_scores(kind, spans, done, cached=cached)
                    if self._agrees(kind, spans, found[..., 0]):
                        return found.mean(-1)
                except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
                    log.debug("the fast way fails (cached: %s)", cached, exc_info=error)
            log.info("%s is traced by one full run per state.", self._host.name)
        exact = torch.promote_types(self._host.dtype, torch.float32)
        found = torch.empty(len(spans), self._length, dtype=exact)
        for token in range(self._length):
            for layer, span in enumerate(spans):
                found[layer, token] = self.score(kind, range(*span), [token])
            done()
        return found

    # -- runs -----------------------------------------------------------------------------

    def _batch(self, rows: int, cut: int = 0) -> Batch:
        """The prompt `rows` times, from its token `cut` on."""
        inputs = {name: tensor.repeat(rows, 1) for name, tensor in self._row.inputs.items()}
        for name in inputs.keys() & {"input_ids", "position_ids"}:
            inputs[name] = inputs[name][:, cut:]
        return replace(self._row, inputs=inputs, ends=self._row.ends.repeat(rows))

    def _run(self, rows: int, cut: int = 0, **options: Any) -> Any:
        """The model's output with logits (rows, vocabulary) at the last position."""
        every = torch.arange(rows, device=self._host.device)
        with head_only_at(self._host, every, torch.full_like(every, self._length - 1 - cut)):
            output = run(self._host, self._batch(rows, cut), **options)
        output.logits = output.logits[0]
        return output

    def _recorded(self, kind: Kind, rows: int, **options: Any) -> tuple[Any, list[Any]]:
        """One run, and copies of what each part of a kind returned with (rows, tokens, d)."""
        host, found = self._host, []
        with contextlib.ExitStack() as stack:
            for layer in range(len(host.blocks)):

                def keep(module: nn.Module, args: Any, output: Any) -> None:
                    hidden = hidden_of(output).clone()
                    hidden = hidden.reshape(rows, self._length, -1)
                    found.append(with_hidden(output, hidden))

                part = host.module(part_of(host, kind, layer))
                stack.callback(part.register_forward_hook(keep).remove)
            return self._run(rows, **options), found

    def _probabilities(self, logits: Tensor) -> Tensor:
        return torch.softmax(wide(logits), -1)[:, self.answer]

    def _noisy(self, copies: int) -> contextlib.AbstractContextManager[None]:
        """Inside the block the subject of each copy is hidden."""
        start, end = self._subject

        def add(states: Tensor) -> Tensor:
            noisy = wide(states[:, start:end]) + self._noise[:copies].to(states.device)
            return with_tokens(states, range(start, end), noisy)

        return changed(self._host, self._host.anatomy.embedding, copies, add)

    def _clean_states(self, kind: Kind) -> list[Tensor]:
        if kind not in self._clean:
            _, outputs = self._recorded(kind, 1)
            self._clean[kind] = [hidden_of(found) for found in outputs]
        return self._clean[kind]

    # -- the fast way ---------------------------------------------------------------------

    def _agrees(self, kind: Kind, spans: Sequence[Span], found: Tensor) -> bool:
        """Whether two scores (layers, tokens) of the first copy are those of the plain way.

        The two ways sum in another order; float32 agrees to 1e-3, 16-bit types to 5e-2.  Asked are
        the greatest effect and one at the last token, where most is read from the cache.
        """
        tolerance = 1e-3 if self._host.dtype in (torch.float32, torch.float64) else 5e-2
        greatest = divmod(int((found - self._lows[0]).abs().argmax()), self._length)
        for layer, token in (greatest, (len(spans) // 2, self._length - 1)):
            expected = self.score(kind, range(*spans[layer]), [token], copies=1)
            difference = abs(float(found[layer, token]) - expected)
            if not difference <= tolerance * max(expected, self.high):
                return False
        return True

    def _restored_alone(self, kind: Kind) -> list[Tensor]:
        """What each block makes of the corrupted runs' input when its part is the clean run's.

        Behind the part a block works on single positions, so one run gives all tokens.
        """
        if kind in self._restored:
            return self._restored[kind]
        host, clean = self._host, self._clean_states(kind)
        with self._noisy(self._samples), contextlib.ExitStack() as stack:
            for layer, block in enumerate(host.blocks):
                path, states = part_of(host, kind, layer), clean[layer]
                change = lambda found, states=states: states.expand_as(found).clone()  # noqa: E731
                stack.enter_context(changed(host, path, self._samples, change))
                if layer:
                    module, given = host.module(block.path), self._hidden[layer - 1]
                    own = module.forward
                    forward = lambda _, *a, own=own, given=given, **k: own(given, *a, **k)  # noqa: E731
                    stack.enter_context(forward_as(module, forward))
            _, outputs = self._recorded("block", self._samples)
        self._restored[kind] = [hidden_of(found) for found in outputs]
        return self._restored[kind]

    def _fast_scores(
        self, kind: Kind, spans: Sequence[Span], done: Callable[[], object], *, cached: bool
    ) -> Tensor:
        """(layers, tokens, samples); before the subject all is clean, and nothing is restored."""
        found = self._lows.repeat(len(spans), self._length, 1)
        for token in range(self._subject[0], self._length):
            cut = token if cached else 0
            fitting = max(MAX_TOKENS // (len(spans) * (self._length - cut)), 1)
            groups = torch.arange(self._samples, device=self._host.device).split(fitting)
            scores = [self._sweep(kind, spans, token, cut, samples) for samples in groups]
            found[:, token] = torch.cat(scores, dim=1).cpu()
            done()
        return found

    def _sweep(
        self, kind: Kind, spans: Sequence[Span], token: int, cut: int, samples: Tensor
    ) -> Tensor:
        """Probabilities (layers, samples) with the state at one token restored, from one pass.

        The model reads all rows from token `cut` on, layer by layer and in each by samples.  A
        block gets those that begin below it, and its other arguments are cut to these.
        """
        host, each = self._host, len(samples)
        clean, first = self._clean_states(kind), self._restored_alone(kind)
        rows = len(spans) * each
        begun = [sum(start < layer for start, _ in spans) * each for layer in range(len(spans) + 1)]
        cache = copy_of_cache(self._cache) if cut else None
        if cache is not None:
            cache.crop(cut - self._length)

        def begin(layer: int) -> Tensor:
            """The rows that begin with the output of block `layer`."""
            states = self._hidden[layer][samples.to(self._hidden[layer].device), cut:]
            put_back = first[layer].expand(self._samples, -1, -1)[samples.to(states.device), token]
            states = with_tokens(states, [token - cut], put_back[:, None])
            return states.repeat((begun[layer + 1] - begun[layer]) // each, 1, 1)

        def forward_of(layer: int, own: Callable[..., Any]) -> Callable[..., Any]:
            present = begun[layer]

            def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                output, states = self._form, hidden[:0]
                if present:
                    if cache is not None:
                        cache.layers[layer].batch_select_indices(samples.repeat(present // each))
                    args, kwargs = _first_rows((args, kwargs), rows, present)
                    output = own(hidden, *args, **kwargs)
                    states = hidden_of(output)
                return with_hidden(output, torch.cat([states, begin(layer).to(states.device)]))

            return forward

        with contextlib.ExitStack() as stack:
            for layer, block in enumerate(host.blocks):
                module = host.module(block.path)
                stack.enter_context(forward_as(module, forward_of(layer, module.forward)))
                inside = [n for n, (start, end) in enumerate(spans) if start < layer < end]
                if inside:
                    put_back = partial(
                        with_tokens,
                        tokens=[token - cut],
                        new=clean[layer][:, [token]],
                        rows=slice(inside[0] * each, (inside[-1] + 1) * each),
                    )
                    path = part_of(host, kind, layer)
                    stack.enter_context(changed(host, path, begun[layer], put_back))
            output = self._run(rows, cut, past_key_values=cache, use_cache=cache is not None)
        return self._probabilities(output.logits).reshape(len(spans), each)


def _first_rows(value: Any, rows: int, present: int) -> Any:
    """Arguments of a block for the first of its rows: tensors with so many rows are cut."""
    if isinstance(value, tuple | list):
        return type(value)(_first_rows(item, rows, present) for item in value)
    if isinstance(value, dict):
        return {name: _first_rows(item, rows, present) for name, item in value.items()}
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] % rows == 0:
        return value[: value.shape[0] // rows * present]
    return value
