"""The edits of one module, and the balls in which they answer."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# How far rounding, which differs from batch to batch, may move a key: shares of ε_init and of the
# key's norm, whichever is less.
_OF_EPS, _OF_NORM = 0.05, 0.01
_GAP = 1e-5  # between the balls of two labels, as in the paper


@dataclass(frozen=True)
class Entry:
    """What one edit wrote.

    Attributes:
        key: (d_in,) float32, on the CPU.
        value: (d_out,) float32, on the CPU.
        label: the target's token ids.
        eps: radius that its ball has at first.
        replace: `last`, `prompt` or `all`: where the value goes.
        decode: `none` or `value`: what tokens after the prompt get.
    """

    key: Tensor
    value: Tensor
    label: tuple[int, ...]
    eps: float
    replace: str = "last"
    decode: str = "none"

    @property
    def slack(self) -> float:
        """Distance within which a key counts as this one."""
        return min(_OF_EPS * self.eps, _OF_NORM * float(self.key.norm()))

    def answers_like(self, other: Entry) -> bool:
        """Whether both say the same, by the same value."""
        return self.label == other.label and torch.equal(self.value, other.value)


@dataclass(frozen=True)
class Change:
    """What adding one edit did to the book.

    Attributes:
        follows: digest of all edits before it; only after these is the change true.
        at: (n,) numbers of the edits whose ball or home changed; itself among them.
        radii: (n,) their radii.
        homes: (n,) their homes.
        reach: (n,) their distances from home.
    """

    follows: str
    at: Tensor
    radii: Tensor
    homes: Tensor
    reach: Tensor


class Book:
    """Edits in the order in which they were made, and the balls round their keys.

    The rules are those of Hartvigsen et al. 2023 (arXiv:2211.11031, algorithm 1).  A key far from
    all others opens a ball of radius ε_init.  One that overlaps the nearest ball joins it, and
    widens it, where both say the same, and otherwise both balls shrink to half the distance.  The
    book keeps three promises that these rules alone do not:

    - Every edit answers at its own key.  One that lives in another's ball gets its own again when
      that ball shrinks or goes, or when a later key is nearer.
    - Of two edits of one prompt the later one counts.
    - A ball never grows by a conflict, and reaches a little beyond the key that widened it, since
      rounding would otherwise decide whether it is inside.

    Attributes:
        entries: the edits.
        radii: (n,) of each edit's ball; -1 where it has none.
        homes: (n,) the edit in whose ball each key lies, itself included; -1 where a later edit
            of the same prompt took its place.
        reach: (n,) distance of each key from its home's.
        digest: of all edits so far.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.radii = torch.empty(0)
        self.homes = torch.empty(0, dtype=torch.long)
        self.reach = torch.empty(0)
        self.digest = ""

    def copy(self) -> Book:
        """A book that can grow without this one."""
        twin = copy.copy(self)
        twin.entries = list(self.entries)
        return twin

    def balls(self) -> Tensor:
        """Numbers of the edits that have a ball: (balls,)."""
        return (self.radii >= 0).nonzero()[:, 0]

    def nearest(self, key: Tensor) -> tuple[int, float]:
        """The edit whose ball's centre is nearest, and its distance; -1 and ∞ without any."""
        return self._nearest(self._distances(key))

    def catches(self, key: Tensor) -> bool:
        """Whether a prompt with this key (d_in,) gets a value."""
        number, distance = self.nearest(key)
        return number >= 0 and distance <= float(self.radii[number])

    def alike(self, key: Tensor, label: tuple[int, ...], eps: float) -> Entry | None:
        """The edit to the same label whose ball one at this key would overlap, if it is nearest."""
        number, distance = self.nearest(key)
        if number < 0 or distance > eps + float(self.radii[number]):
            return None
        return self.entries[number] if self.entries[number].label == label else None

    def add(self, entry: Entry, change: Change | None = None) -> Change:
        """Add an edit.

        Args:
            entry: the edit.
            change: what adding it did when it was made; used where all edits before it are still
                the same, so that nothing is computed again.

        Returns:
            What it did.
        """
        follows, number = self.digest, len(self.entries)
        self.entries.append(entry)
        self.digest = _digest(follows, entry)
        before = self._arrays()
        one = torch.ones(1)
        self.radii = torch.cat([self.radii, -one])
        self.homes = torch.cat([self.homes, -one.long()])
        self.reach = torch.cat([self.reach, 0 * one])
        if change is not None and change.follows == follows:
            self.radii[change.at] = change.radii
            self.homes[change.at] = change.homes
            self.reach[change.at] = change.reach
            return change
        self._settle(number)
        differs = torch.ones(number + 1, dtype=torch.bool)
        for now, then in zip(self._arrays(), before, strict=True):
            differs[:number] &= now[:number] == then
        at = torch.cat([(~differs[:number]).nonzero()[:, 0], torch.tensor([number])])
        return Change(follows, at, self.radii[at], self.homes[at], self.reach[at])

    def _arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.radii, self.homes, self.reach

    def _settle(self, number: int) -> None:
        """Find a place for an edit, and for those that lose theirs by it.

        Ends, since an edit only loses its place when another one opens a ball, and a ball once
        opened is never given up for a place in another.
        """
        waiting = [number]
        while waiting:
            placed = waiting.pop(0)
            distances = self._distances(self.entries[placed].key)
            self._place(placed, distances)
            lodgers = (self.homes >= 0) & (self.homes != torch.arange(len(self.homes)))
            is_nearer = (distances < self.reach) & (self.radii[placed] >= 0)
            is_outside = self.reach > self.radii[self.homes]
            lost = (lodgers & (is_nearer | is_outside)).nonzero()[:, 0]
            self.homes[lost] = -1
            waiting += lost.tolist()

    def _place(self, number: int, distances: Tensor) -> None:
        """Open a ball for an edit, or let it join the nearest one."""
        entry = self.entries[number]
        near, distance = self._nearest(distances)
        if near < 0 or distance > entry.eps + float(self.radii[near]):
            self._open(number, entry.eps)
        elif entry.answers_like(self.entries[near]):
            self.radii[near] = max(float(self.radii[near]), distance + entry.slack)
            self.homes[number], self.reach[number] = near, distance
        elif distance <= entry.slack:  # the same prompt
            if number > near:
                radius = min(entry.eps, float(self.radii[near]))
                self.radii[near] = self.homes[near] = -1
                self._open(number, radius)
        elif entry.label == self.entries[near].label:  # nothing to keep apart
            self._open(number, entry.eps)
        else:
            half = distance / 2
            self.radii[near] = min(float(self.radii[near]), max(half - _GAP, 0.0))
            self._open(number, min(entry.eps, half))

    def _open(self, number: int, radius: float) -> None:
        self.radii[number], self.homes[number], self.reach[number] = radius, number, 0.0

    def _nearest(self, distances: Tensor) -> tuple[int, float]:
        balls = self.balls()
        if not len(balls):
            return -1, float("inf")
        distance, at = distances[balls].min(dim=0)
        return int(balls[at]), float(distance)

    def _distances(self, key: Tensor) -> Tensor:
        """Distances of a key (d_in,) from those of all edits: (n,)."""
        if not self.entries:
            return torch.empty(0)
        return distances(key[None], torch.stack([entry.key for entry in self.entries]))[0]


def distances(left: Tensor, right: Tensor) -> Tensor:
    """Euclidean distances of float32 vectors (n, d) and (m, d): (n, m).

    Summed from the differences: by matrix products, equal keys would lie apart.
    """
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")


def _digest(follows: str, entry: Entry) -> str:
    parts: Iterable[Tensor] = (entry.key, entry.value, torch.tensor(entry.label))
    digest = hashlib.sha256(follows.encode())
    for part in parts:
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()
