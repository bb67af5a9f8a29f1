"""The part of a model that an optimisation repeats.

What stands below the first changed block, and before the first changed position, is the same in
every step.  `Tail` runs it once and then repeats only the blocks from there up, on the suffix of
each row, against cached keys and values, with the head at label positions.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kedit_core.forward import head_only_at
from kedit_core.host import ModelHost
from kedit_core.probing import hidden_of, with_hidden
from kedit_core.tokens import Row, pad

log = logging.getLogger(__name__)


class Tail:
    """A model from one block upward, over fixed rows.

    Args:
        host: the model; its weights stay as they are while the tail is in use.
        rows: what it reads.
        start: the first block to repeat.
        fixed: for each row the number of leading tokens that nothing changes in any block; 0
            where changes reach every position.
        plain: repeat the full forward pass instead: the oracle of the fast way.

    Attributes:
        labels: (labels,) token to predict at each kept position.
        label_rows: (labels,) row of each.
        is_fast: whether the fast way is in use; it is not where the model's own code does not
            give the same logits that way.
    """

    def __init__(
        self,
        host: ModelHost,
        rows: Sequence[Row],
        start: int,
        fixed: Sequence[int],
        *,
        plain: bool = False,
    ) -> None:
        self._host = host
        self._batch = pad(host, rows, align=None if host.is_encoder_decoder else fixed)
        self._cut = 0
        self._hidden: Tensor | None = None
        self._form: Any = None
        self._cache: Any = None
        self._start = start
        self.labels = self._batch.labels
        self.label_rows = self._batch.rows
        self.is_fast = not plain and not host.is_encoder_decoder
        if self.is_fast:
            self._record(start, max(fixed))

    def column(self, row: int, position: int) -> int:
        """Column, in what the repeated blocks see, of a token of a row."""
        return self._batch.offsets[row] + position - self._cut

    def logits(self) -> Tensor:
        """Logits that predict the labels: (labels, vocabulary); differentiable."""
        if not self.is_fast:
            return self._forward(use_cache=False).logits[self._batch.rows, self._batch.columns]
        columns = self._batch.columns - self._cut
        with head_only_at(self._host, self._batch.rows, columns):
            return self._forward(use_cache=False).logits[0]

    def _record(self, start: int, cut: int) -> None:
        """One plain pass keeps the block's input and the cache; one fast pass is compared."""
        host, batch = self._host, self._batch
        seen: dict[str, Any] = {}
        block = host.module(host.blocks[start].path)
        handles = [
            block.register_forward_pre_hook(
                lambda m, args, kwargs: seen.update(input=_first(args, kwargs)), with_kwargs=True
            )
        ]
        if start:
            below = host.module(host.blocks[start - 1].path)
            handles.append(below.register_forward_hook(lambda m, a, out: seen.update(form=out)))
        try:
            with torch.no_grad(), head_only_at(host, batch.rows, batch.columns):
                output = host.model(**batch.inputs, use_cache=cut > 0)
        finally:
            for handle in handles:
                handle.remove()
        cache = getattr(output, "past_key_values", None) if cut else None
        self._hidden, self._form = seen["input"], seen.get("form")
        if cache is None or not hasattr(cache, "layers"):
            cut = 0
        else:
            try:
                cache.crop(cut - batch.inputs["input_ids"].shape[1])
            except (RuntimeError, ValueError, NotImplementedError) as error:
                log.debug("the cache of %s cannot be cut", host.name, exc_info=error)
                cut, cache = 0, None
        self._cut, self._cache = cut, cache if cut else None
        self._check(output.logits[0])

    def _check(self, expected: Tensor) -> None:
        """Fall back to the plain way where the fast one gives other logits.

        The two sum in another order; float32 agrees to 1e-3 of the largest logit, 16-bit types
        to 5e-2.
        """
        tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2
        try:
            with torch.no_grad():
                difference = (self.logits() - expected).abs().max()
            agrees = bool(difference <= tolerance * expected.abs().max())
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            log.debug("the fast way fails", exc_info=error)
            agrees = False
        if not agrees:
            log.info("%s is optimised by full forward passes.", self._host.name)
            self._cut, self._cache, self._hidden, self.is_fast = 0, None, None, False

    def _forward(self, use_cache: bool) -> Any:
        host = self._host
        if self._hidden is None:
            return host.model(**self._batch.inputs, use_cache=use_cache)
        inputs = dict(self._batch.inputs)
        for name in ("input_ids", "position_ids"):
            if name in inputs:
                inputs[name] = inputs[name][:, self._cut :]
        if self._cache is not None:
            inputs["past_key_values"] = _copy_of(self._cache)
        with self._skipped_below():
            return host.model(**inputs, use_cache=self._cache is not None)

    @contextlib.contextmanager
    def _skipped_below(self) -> Iterator[None]:
        """Blocks below the first hand their input on; the last of them hands on what was kept."""
        if self._hidden is None or self._start == 0:
            yield
            return
        kept = self._hidden[:, self._cut :]
        blocks = [self._host.module(b.path) for b in self._host.blocks[: self._start]]
        saved = [block.__dict__.get("forward") for block in blocks]
        form = self._form

        def hand_on(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return with_hidden(form, kept)

        try:
            for block in blocks:
                block.__dict__["forward"] = hand_on
            yield
        finally:
            for block, forward in zip(blocks, saved, strict=True):
                if forward is None:
                    del block.__dict__["forward"]
                else:
                    block.__dict__["forward"] = forward


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return hidden_of(args[0] if args else kwargs["hidden_states"])


def _copy_of(cache: Any) -> Any:
    """A cache that can grow without touching the tensors of this one."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin
