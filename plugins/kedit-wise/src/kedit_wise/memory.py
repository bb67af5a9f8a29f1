"""Side memories beside one matrix: how they are stored, merged, and chosen for a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from kedit_core.editing import ModuleSwap, Wrapper
from kedit_core.errors import PatchError
from kedit_core.probing import hidden_of, with_hidden
from kedit_wise.merging import WAYS, merged

ACCUMULATED = 0.6  # weight of what was merged before, against all new shards together


@dataclass(frozen=True)
class Indicator:
    """How much a text stirs a memory, token by token.

    Attributes:
        activation: name of the activation function through which outputs are compared, as the
            authors' code does; empty where they are compared as they are (eq. 4 of the paper).
    """

    activation: str = ""

    def __call__(self, outputs: Tensor, added: Tensor) -> Tensor:
        """Length of the change of each output.

        Args:
            outputs: W k, (tokens, d_out).
            added: (W' − W) k, (tokens, d_out).

        Returns:
            (tokens,)
        """
        if not self.activation:
            return added.norm(dim=-1)
        activate = ACT2FN[self.activation]
        return (activate(outputs + added) - activate(outputs)).norm(dim=-1)


def row_means(values: Tensor, owner: Tensor, rows: int) -> Tensor:
    """Mean of token values over each row: (tokens,) to (rows,)."""
    zeros = torch.zeros(rows, device=values.device)
    counts = zeros.index_add(0, owner, torch.ones_like(values))
    return zeros.index_add(0, owner, values) / counts.clamp(min=1)


def pack_mask(mask: Tensor) -> Tensor:
    """A boolean matrix as bits, eight to a byte: (⌈numel / 8⌉,) uint8."""
    bits = nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8))
    return (bits.reshape(-1, 8) << _places(mask)).sum(dim=1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """What `pack_mask` packed."""
    bits = (packed[:, None] >> _places(packed)) & 1
    return bits.flatten()[: shape[0] * shape[1]].reshape(shape).bool()


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


Ids = tuple[int, ...]


def ids(swaps: Sequence[ModuleSwap]) -> Ids:
    """What tells these edits, as long as they live, from all others."""
    return tuple(map(id, swaps))


def mask_of(swap: ModuleSwap, weight: Tensor) -> Tensor:
    """(d_out, d_in) True where the edits of the same shard may change the weight."""
    return unpack_mask(swap.state["mask"].to(weight.device), (weight.shape[0], weight.shape[1]))


@dataclass(frozen=True)
class Shard:
    """What the edits that share one mask amount to.

    Attributes:
        change: W' − W, (d_out, d_in), float32.
        total: sum of the edits' own changes where the mask is True, not yet bounded.
        kept: the share of W that is left in W' outside the mask; 1 unless decay reaches there.
        count: of the edits.
    """

    change: Tensor
    total: Tensor
    kept: float
    count: int

    @classmethod
    def of(cls, weight: Tensor, swaps: Sequence[ModuleSwap], begun: Shard | None = None) -> Shard:
        """The sum of the edits' own changes.

        Args:
            weight: W, (d_out, d_in).
            swaps: of one shard; at least one.
            begun: what the first of them amount to, where it is known.
        """
        begun = begun or cls(weight, torch.zeros((), device=weight.device), 1.0, 0)
        total, kept = begun.total, begun.kept
        for swap in swaps[begun.count :]:
            total = total + swap.state["values"].to(weight.device)
            kept *= float(swap.config["kept"])
        bound = float(swaps[-1].config["max_change"])
        change = torch.zeros(weight.shape, device=weight.device)
        if kept != 1:
            change = weight.float() * (kept - 1)
        change[mask_of(swaps[0], weight)] = total.clamp(-bound, bound)
        return cls(change, total, kept, len(swaps))


@dataclass(frozen=True)
class Memory:
    """One side memory.

    Attributes:
        change: W' − W, (d_out, d_in), float32.
        threshold: it answers prompts that stir it more.
    """

    change: Tensor
    threshold: float

    @classmethod
    def of(cls, change: Tensor, swaps: Iterable[ModuleSwap], settings: Mapping[str, Any]) -> Memory:
        least = min(float(swap.config["stirred"]) for swap in swaps)
        return cls(change, least * float(settings["threshold_ratio"]))


def numbered(swaps: Sequence[ModuleSwap]) -> dict[int, list[ModuleSwap]]:
    """The edits of each shard, oldest shard first."""
    shards: dict[int, list[ModuleSwap]] = {}
    for swap in sorted(swaps, key=lambda swap: int(swap.config["shard"])):
        shards.setdefault(int(swap.config["shard"]), []).append(swap)
    return shards


class Memories:
    """What edits amount to: their shards, merged where enough of them are there.

    Nothing of a shard is changed by merging, so another edit, or one fewer, only means to do it
    again, and only where that edit belongs.

    Args:
        weight: W, (d_out, d_in).
        swaps: edits in their order.
        former: what others amounted to, of which some may be the same.

    Attributes:
        found: the memories.
        shards: those that are not merged side by side, by their edits.
    """

    def __init__(
        self, weight: Tensor, swaps: Sequence[ModuleSwap], former: Memories | None = None
    ) -> None:
        self.swaps = tuple(swaps)  # kept alive, so that their ids stay theirs
        self.found: list[Memory] = []
        self.shards: dict[Ids, Shard] = {}
        self._merged: dict[tuple[object, ...], Tensor] = {}
        # With decay everywhere a change depends on W, which other methods may have edited since.
        is_same = former is not None and all(swap.config["kept"] == 1 for swap in swaps)
        known = former if former is not None and is_same else self
        apart = [[s for s in swaps if s.config["retrieve"] is way] for way in (True, False)]
        retrieved, accumulated = (numbered(part) for part in apart)
        if retrieved:
            self._side_by_side(weight, retrieved, known)
        if accumulated:
            self._all_in_one(weight, accumulated, known)

    def _side_by_side(
        self, weight: Tensor, shards: Mapping[int, Sequence[ModuleSwap]], known: Memories
    ) -> None:
        """Full groups of shards merged, the others as they are."""
        latest = max(shards)
        settings = shards[latest][-1].config
        size = int(settings["shards_per_memory"])
        for group, numbers in groupby(shards, lambda number: number // size):
            parts = [shards[number] for number in numbers]
            last = (group + 1) * size - 1
            is_full = latest > last or len(shards.get(last, ())) >= settings["edits_per_shard"]
            if is_full and len(parts) > 1:
                change = self._group(weight, parts, settings, known)
                self.found.append(Memory.of(change, chain(*parts), settings))
                continue
            for part in parts:
                shard = self.shards[ids(part)] = known._shard(weight, part)
                self.found.append(Memory.of(shard.change, part, settings))

    def _all_in_one(
        self, weight: Tensor, shards: Mapping[int, Sequence[ModuleSwap]], known: Memories
    ) -> None:
        """All shards in one memory: group after group is merged into what there is."""
        settings = shards[max(shards)][-1].config
        size = int(settings["shards_per_memory"])
        change: Tensor | None = None
        for _, numbers in groupby(shards, lambda number: number // size):
            new: list[Tensor] = []
            for part in (shards[number] for number in numbers):
                self.shards[ids(part)] = known._shard(weight, part)
                new.append(self.shards[ids(part)].change)
            if change is None:
                change = _mixed(new, [1.0] * len(new), settings)
            else:
                weights = [ACCUMULATED, *[(1 - ACCUMULATED) / len(new)] * len(new)]
                change = _mixed([change, *new], weights, settings)
        assert change is not None
        self.found.append(Memory.of(change, chain(*shards.values()), settings))

    def _shard(self, weight: Tensor, swaps: Sequence[ModuleSwap]) -> Shard:
        """The shard of these edits, from what is there of it."""
        key = ids(swaps)
        return self.shards.get(key) or Shard.of(weight, swaps, self.shards.get(key[:-1]))

    def _group(
        self,
        weight: Tensor,
        parts: Sequence[Sequence[ModuleSwap]],
        settings: Mapping[str, Any],
        known: Memories,
    ) -> Tensor:
        """The change of a full group, of which the shards are not kept."""
        key = (settings["merge"], settings["density"], *map(ids, parts))
        change = known._merged.get(key)
        if change is None:
            changes = [known._shard(weight, part).change for part in parts]
            change = _mixed(changes, [1.0] * len(changes), settings)
        self._merged[key] = change
        return change


def _mixed(
    changes: Sequence[Tensor], weights: Sequence[float], settings: Mapping[str, Any]
) -> Tensor:
    if len(changes) == 1:
        return changes[0]
    return merged(changes, weights, str(settings["merge"]), float(settings["density"]))


class SideMemory(Wrapper):
    """Adds, for each row whose prompt stirs a memory enough, that memory's change of the output.

    A memory is chosen when a row's prompt is read, from the tokens of the prompt alone, and kept
    for what is generated after it.  Config and state of one edit are made by `Wise`.

    Attributes:
        memories: what the edits amount to.
        chosen: (rows,) number of each row's memory, or −1.
    """

    thresholds: Tensor  # (memories,)

    def __init__(
        self, base: nn.Module, memories: Memories, indicator: Indicator, relative: bool = False
    ) -> None:
        super().__init__(base)
        self.memories = memories
        self.changes = [memory.change for memory in memories.found]  # each (d_out, d_in)
        thresholds = [memory.threshold for memory in memories.found]
        device = self.changes[0].device
        self.register_buffer("thresholds", torch.tensor(thresholds, device=device), False)
        self.indicator, self.relative = indicator, relative
        self._stirred = torch.zeros(0, 0, len(thresholds))  # (rows, columns, memories)
        self.chosen = torch.zeros(0, dtype=torch.long)

    @classmethod
    def build(
        cls, base: nn.Module, swaps: Sequence[ModuleSwap], former: Memories | None = None
    ) -> SideMemory:
        """The wrapper of all edits.

        Raises:
            PatchError: a setting is unknown.
        """
        for swap in swaps:
            _check(swap)
        latest = swaps[-1].config
        weight = cast(Tensor, base.weight).detach()
        memories = Memories(weight.mT if latest["transposed"] else weight, swaps, former)
        return cls(
            base, memories, Indicator(str(latest["activation"])), latest["choice"] == "relative"
        )

    def rebuilt(self, base: nn.Module, swaps: Sequence[ModuleSwap]) -> SideMemory:
        return self.build(base, swaps, self.memories)

    @classmethod
    def fold(cls, base: nn.Module, swap: ModuleSwap) -> tuple[Tensor, Tensor | None]:
        raise PatchError("Which prompts a side memory answers cannot be written into weights.")

    def change(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        reading, hidden = self.reading, hidden_of(output)
        # OPT flattens rows.
        keys = args[0].reshape(reading.rows, reading.width, -1)
        outputs = hidden.reshape(reading.rows, reading.width, -1)
        self._choose(keys, outputs)
        used = [n for n in self.chosen.unique().tolist() if n >= 0]
        if not used:
            return output
        added = torch.zeros_like(outputs)
        for number in used:
            rows = self.chosen == number
            added[rows] = (keys[rows].float() @ self.changes[number].to(keys.device).mT).to(
                added.dtype
            )
        return with_hidden(output, hidden + added.reshape(hidden.shape))

    @torch.no_grad()
    def _choose(self, keys: Tensor, outputs: Tensor) -> None:
        """Choose each row's memory from what this pass and those before it show of its prompt.

        A column that is read again, as where a cache is set back, counts once.

        Args:
            keys: (rows, columns, d_in).
            outputs: W k, (rows, columns, d_out).
        """
        reading = self.reading
        prompt = reading.prompt_mask().to(keys.device)
        new = prompt[:, reading.start :]
        if not reading.is_whole and not bool(new.any()):
            return  # a generated token: the choice stands
        stirred = keys.new_full((*prompt.shape, len(self.thresholds)), torch.nan).float()
        if len(self._stirred) == reading.rows:
            before = self._stirred[:, : reading.start]
            stirred[:, : before.shape[1]] = before
        read, written = keys[new].float(), outputs[new].float()
        stirred[:, reading.start :][new] = torch.stack(
            [self.indicator(written, read @ c.to(read.device).mT) for c in self.changes], dim=1
        )
        self._stirred = stirred
        means = stirred.where(prompt[..., None], torch.nan).nanmean(dim=1)
        strength = means / self.thresholds if self.relative else means
        enough = strength.where(means > self.thresholds, -1.0)
        self.chosen = torch.where(enough.amax(dim=1) < 0, -1, enough.argmax(dim=1))


def _check(swap: ModuleSwap) -> None:
    """Refuse settings that would only fail, or be passed over, when the model is asked.

    Raises:
        PatchError: one of them is unknown.
    """
    known = {"activation": ("", *ACT2FN), "merge": WAYS, "choice": ("largest", "relative")}
    for name, values in known.items():
        if swap.config[name] not in values:
            raise PatchError(
                f"The side memory of {swap.path} has {name} '{swap.config[name]}', which is none."
            )
