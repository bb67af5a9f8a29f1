"""The part of a model that an optimisation repeats.

What stands below the first changed block, and before the first changed position, is the same in
every step.  `Tail` runs it once and then repeats only the blocks from there up, on the suffix of
each row, against cached keys and values.  What works on single positions sees no padding: rows are
laid end to end between the places where attention mixes positions.  The head, and the last MLP,
serve label positions only.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kedit_core.effects import Wrapper, has_active_wrapper
from kedit_core.forward import copy_of_cache, forward_as, head_only_at, run, streams
from kedit_core.host import ModelHost
from kedit_core.probing import hidden_of, with_hidden
from kedit_core.tokens import Row, pad

log = logging.getLogger(__name__)

_LEAST = 4  # positions; on CPUs matrix products of two or three take longer


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
        unchanged: (labels, vocabulary) logits of the model as it is.
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
        self._kept: Tensor | None = None  # positions that are no padding, rows laid end to end
        self.labels = self._batch.labels
        self.label_rows = self._batch.rows
        self.is_fast = not plain and not host.is_encoder_decoder
        if self.is_fast:
            least = math.ceil(_LEAST / len(rows))
            self._record(start, max(0, min(max(fixed), self._width - least)))
        else:
            with torch.no_grad():
                self.unchanged = self.logits()

    def places(self, positions: Sequence[int], *, padded: bool = False) -> Tensor:
        """Where one token of each row stands in what the repeated blocks see.

        Args:
            positions: for each row the number of a token that is not among its `fixed` ones.
            padded: where rows keep their padding, as inside attention, and in what the block below
                the first repeated one hands on.

        Returns:
            (rows,) index into hidden states laid end to end, (·, d).
        """
        offsets, cut = self._batch.offsets, self._cut
        columns = [offset + at - cut for offset, at in zip(offsets, positions, strict=True)]
        flat = torch.tensor(columns) + torch.arange(len(columns)) * self._width
        flat = flat.to(self._host.device)
        return flat if self._kept is None or padded else torch.searchsorted(self._kept, flat)

    @property
    def _width(self) -> int:
        """Columns that are repeated."""
        return self._batch.inputs["input_ids"].shape[1] - self._cut

    def logits(self) -> Tensor:
        """Logits that predict the labels: (labels, vocabulary); differentiable."""
        if not self.is_fast:
            return self._forward().logits[self._batch.rows, self._batch.columns]
        count = len(self.labels)
        places = torch.arange(max(count, _LEAST), device=self.labels.device).clamp(max=count - 1)
        rows, columns = self._batch.rows[places], self._batch.columns[places] - self._cut
        with head_only_at(self._host, rows, columns):
            return self._forward().logits[0, :count]

    def _record(self, start: int, cut: int) -> None:
        """One plain pass keeps the block's input and the cache; the fast way is compared."""
        host, batch = self._host, self._batch
        forms: list[Any] = []
        below = host.module(host.blocks[max(start - 1, 0)].path)
        handle = below.register_forward_hook(lambda m, args, out: forms.append(out))
        at_labels = head_only_at(host, batch.rows, batch.columns)
        try:
            with torch.no_grad(), at_labels, streams(host, [start]) as entering:
                output = run(host, batch, use_cache=cut > 0)
        finally:
            handle.remove()
        cache = getattr(output, "past_key_values", None) if cut else None
        self._hidden, self._form = entering[start], forms[0] if start else None
        if cache is None or not hasattr(cache, "layers"):
            cut = 0
        else:
            try:
                cache.crop(cut - batch.inputs["input_ids"].shape[1])
            except (RuntimeError, ValueError, NotImplementedError) as error:
                log.debug("the cache of %s cannot be cut", host.name, exc_info=error)
                cut, cache = 0, None
        self._cut, self._cache = cut, cache if cut else None
        self.unchanged = output.logits[0]
        kept = batch.inputs["attention_mask"][:, cut:].flatten().nonzero()[:, 0]
        needs_rows = any(has_active_wrapper(host.module(b.path)) for b in host.blocks[start:])
        if not needs_rows and len(kept) < self._width * len(batch.offsets):
            self._kept = kept
        if self._is_right():
            return
        self._kept = None
        if self._is_right():
            return
        log.info("%s is optimised by full forward passes.", host.name)
        self._cut, self._cache, self._hidden, self.is_fast = 0, None, None, False

    def _is_right(self) -> bool:
        """Whether the fast way is right: tried once for each structure, since the code decides."""
        known = self._host.agreed
        modules = list(self._host.model.modules())
        way = (
            *(self._start, self._cache is None, self._kept is None, self._host.dtype),
            *map(type, modules),
            *(module.passes_through for module in modules if isinstance(module, Wrapper)),
        )
        if way not in known and self._agrees():
            known.add(way)
        return way in known

    def _agrees(self) -> bool:
        """Whether the fast way gives the logits of the plain one.

        The two sum in another order; float32 agrees to 1e-3 of the largest logit, 16-bit types
        to 5e-2.
        """
        expected = self.unchanged
        tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2
        try:
            with torch.no_grad():
                difference = (self.logits() - expected).abs().max()
            return bool(difference <= tolerance * expected.abs().max())
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            log.debug("the fast way fails", exc_info=error)
            return False

    def _forward(self) -> Any:
        host = self._host
        if self._hidden is None:
            return run(host, self._batch)
        inputs = dict(self._batch.inputs)
        for name in ("input_ids", "position_ids"):
            if name in inputs:
                inputs[name] = inputs[name][:, self._cut :]
        if self._cache is not None:
            inputs["past_key_values"] = copy_of_cache(self._cache)
        with self._skipped_below(), self._without_padding():
            return run(host, replace(self._batch, inputs=inputs), use_cache=self._cache is not None)

    @contextlib.contextmanager
    def _skipped_below(self) -> Iterator[None]:
        """Blocks below the first hand their input on; the last of them hands on what was kept."""
        if self._hidden is None or self._start == 0:
            yield
            return
        kept = self._hidden[:, self._cut :]
        blocks = [self._host.module(b.path) for b in self._host.blocks[: self._start]]
        form = self._form

        def hand_on(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return with_hidden(form, kept)

        with contextlib.ExitStack() as stack:
            for block in blocks:
                stack.enter_context(forward_as(block, hand_on))
            yield

    @contextlib.contextmanager
    def _without_padding(self) -> Iterator[None]:
        """Repeated blocks get (1, kept positions, d); their attention, and what follows, rows."""
        kept = self._kept
        if kept is None:
            yield
            return
        blocks = self._host.blocks[self._start :]
        n_rows, width = len(self._batch.offsets), self._width
        labels = torch.searchsorted(
            kept, self._batch.rows * width + self._batch.columns - self._cut
        )

        def is_laid_out(value: Any) -> bool:
            return isinstance(value, Tensor) and value.shape[:-1] == (1, len(kept))

        def lay_out(hidden: Tensor) -> Tensor:
            return _picked(hidden.reshape(n_rows * width, -1), kept)[None]

        def as_rows(value: Any) -> Any:
            if not is_laid_out(value):
                return value
            return _spread(value[0], kept, n_rows * width).reshape(n_rows, width, -1)

        def at_labels(value: Any) -> Any:
            return _picked(value[0], labels)[None] if is_laid_out(value) else value

        def from_labels(hidden: Tensor) -> Tensor:
            return _spread(hidden[0], labels, len(kept))[None]

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (lay_out(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": lay_out(kwargs["hidden_states"])}

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            return with_hidden(output, as_rows(hidden_of(output)))

        with contextlib.ExitStack() as stack:
            for block in blocks:
                attention = self._host.module(_found(block.attention))
                stack.enter_context(_forward_between(as_rows, attention, lay_out))
            if len(blocks) > 1 and blocks[-1].mlp is not None:
                mlp = self._host.module(blocks[-1].mlp)
                stack.enter_context(_forward_between(at_labels, mlp, from_labels))
            first, last = (self._host.module(blocks[n].path) for n in (0, -1))
            stack.callback(first.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(last.register_forward_hook(leave).remove)
            yield


def _found(path: str | None) -> str:
    if path is None:
        raise ValueError("a block without attention")
    return path


def _picked(states: Tensor, places: Tensor) -> Tensor:
    """The states of (n, d) at some places: (places, d)."""
    return states.index_select(0, places.to(states.device))


def _spread(states: Tensor, places: Tensor, length: int) -> Tensor:
    """(n, d) states at their places among zeros: (length, d)."""
    empty = states.new_zeros(length, states.shape[-1])
    return empty.index_copy(0, places.to(states.device), states)


def _forward_between(
    before: Callable[[Any], Any], module: nn.Module, after: Callable[[Tensor], Tensor]
) -> contextlib.AbstractContextManager[None]:
    """Inside the block the module's arguments and its hidden state are converted."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        named = {name: before(value) for name, value in kwargs.items()}
        output = own(*map(before, args), **named)
        return with_hidden(output, after(hidden_of(output)))

    return forward_as(module, forward)
