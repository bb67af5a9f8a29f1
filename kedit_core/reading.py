"""What a wrapped module may know of the forward pass that it is part of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Reading:
    """The rows that a model reads in its present forward pass.

    A module sees hidden states only.  One whose effect depends on where a prompt ends, or on
    which columns are padding, looks here.  Columns are counted from the first that was ever read:
    with a cache, those of this pass begin at `start`.

    Attributes:
        start: columns that the cache holds from earlier passes.
        width: columns of this pass.
        mask: (rows, start + width) True where there is a token.
        ends: (rows,) column of the last token of each row's prompt: what the asker said, or the
            last token of the pass in which the prompt was read.
    """

    def __init__(self) -> None:
        self.start = 0
        self.width = 0
        self.mask = torch.ones(0, 0, dtype=torch.bool)
        self.ends = torch.zeros(0, dtype=torch.long)
        self._said: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.ends)

    @property
    def is_whole(self) -> bool:
        """Whether this pass reads the rows from their beginning."""
        return self.start == 0

    def prompt_mask(self) -> Tensor:
        """(rows, start + width) True at tokens of prompts."""
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        return self.mask & (columns <= self.ends[:, None])

    def end_columns(self) -> tuple[Tensor, Tensor]:
        """Rows whose prompt ends in this pass, and where: two (n,) tensors.

        The columns count from the first of this pass, as those of hidden states do.
        """
        inside = (self.ends >= self.start) & (self.ends < self.start + self.width)
        rows = inside.nonzero()[:, 0]
        return rows, self.ends[rows] - self.start

    @contextlib.contextmanager
    def of_prompts(self, ends: Tensor) -> Iterator[None]:
        """Inside the block the rows' prompts end in these columns, whatever follows them."""
        before, self._said = self._said, ends
        try:
            yield
        finally:
            self._said = before

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside the block the model reads something in between; afterwards all is as before."""
        before = dict(vars(self))
        try:
            yield
        finally:
            vars(self).update(before)

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take down the arguments of a model's forward; if it has an encoder, its decoder's."""
        of_decoder = [name for name in kwargs if name.startswith("decoder_")]
        read = {name.removeprefix("decoder_"): kwargs[name] for name in of_decoder} or kwargs
        named = (read.get("input_ids"), read.get("inputs_embeds"), *args[:1], kwargs.get("labels"))
        ids = next((given for given in named if given is not None), None)
        if ids is None:
            return  # the model itself says what it lacks
        cache = kwargs.get("past_key_values")
        rows, self.width = ids.shape[:2]
        self.start = int(cache.get_seq_length()) if cache is not None else 0
        total = self.start + self.width
        mask = read.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= total:
            self.mask = mask[:, :total].bool()
        else:
            self.mask = torch.ones(rows, total, dtype=torch.bool, device=ids.device)
        is_next_token = self.start > 0 and self.width == 1 and self.rows == rows
        if self._said is not None:
            self.ends = self._said.to(ids.device)
        elif not is_next_token:
            columns = torch.arange(total, device=self.mask.device)
            self.ends = torch.where(self.mask, columns, -1).amax(dim=1)
