"""GRACE: the algorithm from top to bottom."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kedit_core.editing import EditJob, ModelHost, ModuleSwap, Patch
from kedit_core.numerics.tail import Tail
from kedit_core.probing import hidden_of
from kedit_core.tokens import Row, join
from kedit_grace.book import Book, Entry
from kedit_grace.codebook import Codebook, swap_of
from kedit_grace.hparams import GraceHyperParams
from kedit_grace.values import Trained, are_right, train_values

log = logging.getLogger(__name__)


class Grace:
    """General retrieval adaptors for continual editing.

    Hartvigsen et al. 2023 (arXiv:2211.11031).  No weight changes: one linear layer gets a
    codebook, to which each edit adds a key and a value.
    """

    def __init__(self, hparams: GraceHyperParams) -> None:
        self.hparams = hparams

    def edit(self, job: EditJob) -> Patch:
        """Add the requests to the codebook, in their order.

        Raises:
            SiteError: the layer does not exist or has no such matrix.
            RequestError: a prompt with its target is longer than the model takes.
            EditError: a loss is not finite.
        """
        host, size = job.host, self.hparams.batch_size
        path = self._path(host)
        module = host.module(path)
        book = module.book.copy() if isinstance(module, Codebook) else Book()
        rows = [join(host, request.text, request.target_new) for request in job.requests]
        swaps: list[ModuleSwap] = []
        notes: list[dict[str, Any]] = []
        with _inert(module):
            for start in range(0, len(rows), size):
                self._write(job, path, book, rows[start : start + size], swaps, notes)
        for request, note in zip(job.requests, notes, strict=True):
            if note.get("is_right") is False:
                log.warning(
                    "The value of %r does not give %r after %d steps: more steps, or another "
                    "learning rate or layer, may.",
                    request.text,
                    request.target_new,
                    self.hparams.steps,
                )
        return Patch("grace", tuple(swaps), notes={"edits": notes})

    def _path(self, host: ModelHost) -> str:
        layer = self.hparams.layer
        is_out = self.hparams.module == "mlp_out"
        return (host.mlp_out(layer) if is_out else host.mlp_in(layer)).module

    def _write(
        self,
        job: EditJob,
        path: str,
        book: Book,
        rows: Sequence[Row],
        swaps: list[ModuleSwap],
        notes: list[dict[str, Any]],
    ) -> None:
        """Add rows to the book; their swaps, and a note on each row, are appended."""
        seen = self._look(job.host, path, rows)
        cold = torch.rand(seen.outputs.shape[1], generator=job.generator())
        noted: list[dict[str, Any]] = [{"known": True} for _ in rows]
        left = list(range(len(rows)))
        while left:
            group, older = self._group(book, seen, left)
            start = seen.outputs[group]
            if older is not None:
                start = older.value[None]
            elif self.hparams.start == "cold":
                start = cold.expand(len(group), -1)
            trained = self._train(job.host, path, seen, group, start.to(seen.outputs))
            for n, found in zip(group, trained, strict=True):
                entry = self._entry(seen, n, found.value)
                swaps.append(swap_of(path, entry, book.add(entry)))
                noted[n] = {
                    "known": False,
                    "shared": older is not None and len(found.losses) == 1,
                    "losses": list(found.losses),
                    "is_right": found.is_right,
                    "radius": float(book.radii[book.homes[-1]]),
                }
        notes += noted

    def _entry(self, seen: _Seen, n: int, value: Tensor) -> Entry:
        hparams = self.hparams
        label = seen.rows[n].targets
        return Entry(seen.keys[n], value, label, hparams.eps, hparams.replace, hparams.decode)

    def _group(self, book: Book, seen: _Seen, left: list[int]) -> tuple[list[int], Entry | None]:
        """Take from the rows that are left the next ones whose values can be learned together.

        These open balls of their own, whatever their values become.  One that may share the value
        of an older edit is learned alone, from that edit's.
        """
        book = book.copy()
        group: list[int] = []
        while left:
            key, label = seen.keys[left[0]], seen.rows[left[0]].targets
            if self.hparams.skip_known and seen.is_known[left[0]] and not book.catches(key):
                left.pop(0)
                continue
            older = book.alike(key, label, self.hparams.eps)
            if older is not None:
                return (group, None) if group else ([left.pop(0)], older)
            group.append(left.pop(0))
            book.add(self._entry(seen, group[-1], seen.outputs[group[-1]].cpu()))
        return group, None

    # -- the model ------------------------------------------------------------------------

    def _look(self, host: ModelHost, path: str, rows: Sequence[Row]) -> _Seen:
        """One pass over the rows: what comes in and goes out where each prompt ends."""
        fixed = self._fixed(rows)
        columns = [max(fixed) - f + row.last for f, row in zip(fixed, rows, strict=True)]
        found: list[tuple[Tensor, Tensor]] = []

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            if not found:  # the tail's first pass is a whole one
                found.append((_at(args[0], columns), _at(hidden_of(output), columns)))

        handle = host.module(path).register_forward_hook(keep)
        try:
            tail = Tail(host, rows, self.hparams.layer, fixed)
        finally:
            handle.remove()
        keys, outputs = found[0]
        known = are_right(tail, tail.unchanged, len(rows)).tolist()
        return _Seen(rows, tail, keys.float().cpu(), outputs.float(), known)

    def _train(
        self, host: ModelHost, path: str, seen: _Seen, group: Sequence[int], start: Tensor
    ) -> list[Trained]:
        """The values of some of the rows."""
        if not group:
            return []
        hparams, tail = self.hparams, seen.tail
        rows = [seen.rows[n] for n in group]
        if len(group) < len(seen.rows):
            tail = Tail(host, rows, hparams.layer, self._fixed(rows))
        return train_values(
            tail,
            host.module(path),
            [self._span(row) for row in rows],
            start,
            steps=hparams.steps,
            lr=hparams.lr,
            stop_loss=hparams.stop_loss,
        )

    def _fixed(self, rows: Sequence[Row]) -> list[int]:
        """Tokens at the beginning of each row that no value changes."""
        return [self._span(row).start for row in rows]

    def _span(self, row: Row) -> range:
        """Positions at which the value is written."""
        goes_on = self.hparams.replace == "all" or self.hparams.decode == "value"
        first = row.last if self.hparams.replace == "last" else 0
        return range(first, len(row.ids) if goes_on else row.last + 1)


@dataclass(frozen=True)
class _Seen:
    """Some rows as the model reads them without the codebook.

    Attributes:
        rows: prompts with their targets.
        tail: what training repeats.
        keys: (rows, d_in) the layer's input where each prompt ends, float32, on the CPU.
        outputs: (rows, d_out) its output there, float32.
        is_known: whether the model predicts the target.
    """

    rows: Sequence[Row]
    tail: Tail
    keys: Tensor
    outputs: Tensor
    is_known: Sequence[bool]


def _at(states: Tensor, columns: Sequence[int]) -> Tensor:
    """The states of one column of each row: (rows, d)."""
    states = states.detach().reshape(len(columns), -1, states.shape[-1])  # OPT flattens rows
    return states[torch.arange(len(columns)), torch.tensor(columns)]


@contextlib.contextmanager
def _inert(module: nn.Module) -> Iterator[None]:
    """Inside the block a codebook does nothing.

    A new edit's ball will be nearest to its own key, so that no older one answers there.
    """
    if not isinstance(module, Codebook):
        yield
        return
    before, module.passes_through = module.passes_through, True
    try:
        yield
    finally:
        module.passes_through = before
