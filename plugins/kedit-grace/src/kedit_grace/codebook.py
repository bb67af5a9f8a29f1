"""The wrapper that GRACE puts round one linear layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kedit_core.editing import ModuleSwap, Wrapper
from kedit_core.errors import PatchError
from kedit_grace.book import Book, Change, Entry, distances

TYPE = "codebook"


class Codebook(Wrapper):
    """Writes a value in place of the layer's output, for prompts whose key lies in a ball.

    The key of a row is the layer's input at the last token of its prompt.  Whether a ball holds
    it is decided when that token is read, and stands for the tokens after it.

    Each edit's swap holds `key` (d_in,), `value` (d_out,) and `label` (tokens,); what adding it
    changed, `at`, `radii`, `homes` and `reach` (n,), true after the edits that the config's
    `follows` names; and in its config `eps`, `replace` and `decode`.

    Attributes:
        book: the edits, oldest first.
    """

    keys: Tensor
    values: Tensor
    radii: Tensor
    in_prompt: Tensor
    after_it: Tensor

    def __init__(self, base: nn.Module, book: Book) -> None:
        super().__init__(base)
        self.book = book
        numbers = book.balls()
        entries = [book.entries[n] for n in numbers.tolist()]
        device = next(base.parameters()).device
        buffers = {
            "keys": torch.stack([entry.key for entry in entries]),  # (balls, d_in)
            "values": torch.stack([entry.value for entry in entries]),  # (balls, d_out)
            "radii": book.radii[numbers],
            "in_prompt": torch.tensor([entry.replace != "last" for entry in entries]),
            "after_it": torch.tensor([e.replace == "all" or e.decode == "value" for e in entries]),
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor.to(device), persistent=False)
        self._chosen = torch.empty(0, dtype=torch.long)  # (rows,) ball of each, or -1

    @classmethod
    def build(cls, base: nn.Module, swaps: Sequence[ModuleSwap]) -> Codebook:
        """The codebook of all edits.

        Raises:
            PatchError: an edit's tensors do not fit the layer, or a setting is none.
        """
        book = Book()
        for swap in swaps:
            entry = entry_of(swap)
            _check(entry, base)
            book.add(entry, change_of(swap))
        return cls(base, book)

    @classmethod
    def fold(cls, base: nn.Module, swap: ModuleSwap) -> tuple[Tensor, Tensor | None]:
        """Always refused.

        Raises:
            PatchError: says why.
        """
        raise PatchError(
            "GRACE looks up each prompt in a codebook, which no change of a weight matrix can do."
        )

    def change(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's output (…, d_out) with values written into it; a new tensor."""
        reading = self.reading
        given: Tensor = args[0] if args else kwargs["input"]
        rows, columns = reading.end_columns()
        if reading.is_whole or len(self._chosen) != reading.rows:
            self._chosen = torch.full((reading.rows,), -1, device=given.device)
        if len(rows):
            by_row = given.reshape(reading.rows, reading.width, -1)
            keys = by_row[rows.to(given.device), columns.to(given.device)]
            self._chosen[rows.to(given.device)] = self._ball_of(keys)
        caught = self._chosen >= 0
        if not bool(caught.any()):
            return output
        places = self._places(caught)  # (rows, width)
        hidden = output.reshape(reading.rows, reading.width, -1)
        values = self.values[self._chosen].to(hidden)[:, None]  # (rows, 1, d_out)
        return torch.where(places[..., None], values, hidden).reshape(output.shape)

    def _ball_of(self, keys: Tensor) -> Tensor:
        """The ball in which each key (n, d_in) lies, or -1: (n,)."""
        distance, number = distances(keys.float(), self.keys).min(dim=1)
        return torch.where(distance <= self.radii[number], number, -1)

    def _places(self, caught: Tensor) -> Tensor:
        """Where values go: (rows, width) of the present pass."""
        reading, device = self.reading, caught.device
        columns = torch.arange(reading.start, reading.start + reading.width, device=device)
        ends = reading.ends.to(device)[:, None]
        is_token = reading.mask[:, reading.start :].to(device)
        places = columns == ends
        places = places | (self.in_prompt[self._chosen][:, None] & is_token & (columns < ends))
        places = places | (self.after_it[self._chosen][:, None] & is_token & (columns > ends))
        return places & caught[:, None]


def swap_of(path: str, entry: Entry, change: Change) -> ModuleSwap:
    """What one edit's patch holds."""
    return ModuleSwap(
        path,
        TYPE,
        config={
            "eps": entry.eps,
            "replace": entry.replace,
            "decode": entry.decode,
            "follows": change.follows,
        },
        state={
            "key": entry.key,
            "value": entry.value,
            "label": torch.tensor(entry.label),
            "at": change.at,
            "radii": change.radii,
            "homes": change.homes,
            "reach": change.reach,
        },
    )


def entry_of(swap: ModuleSwap) -> Entry:
    """The edit that a swap holds."""
    state, config = swap.state, swap.config
    return Entry(
        key=state["key"].float().cpu(),
        value=state["value"].float().cpu(),
        label=tuple(state["label"].tolist()),
        eps=float(config["eps"]),
        replace=str(config["replace"]),
        decode=str(config["decode"]),
    )


def change_of(swap: ModuleSwap) -> Change:
    """What adding that edit did."""
    names = ("at", "radii", "homes", "reach")
    return Change(str(swap.config["follows"]), *(swap.state[name] for name in names))


def _check(entry: Entry, base: nn.Module) -> None:
    found = (*entry.key.shape, *entry.value.shape)
    if len(found) != 2 or set(found) != set(_widths(base)):
        raise PatchError(
            f"A key and value of GRACE are {tuple(entry.key.shape)} and "
            f"{tuple(entry.value.shape)}, which does not fit the layer: {_widths(base)}."
        )
    if not (math.isfinite(entry.eps) and entry.eps > 0):
        raise PatchError(f"A radius of GRACE is {entry.eps}, and must be above 0.")
    if entry.replace not in ("last", "prompt", "all") or entry.decode not in ("none", "value"):
        raise PatchError(
            f"GRACE knows no replacement '{entry.replace}' with decoding '{entry.decode}'."
        )


def _widths(base: nn.Module) -> tuple[int, ...]:
    """(d_in, d_out), in either order where the module does not say."""
    if hasattr(base, "in_features"):
        return base.in_features, base.out_features  # type: ignore[return-value]
    return tuple(base.weight.shape)  # type: ignore[arg-type]
