"""Side memories beside one matrix: how they are stored, merged, and chosen for a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Shard:
    """The edits that share one mask.

    Attributes:
        mask: (d_out, d_in) True where they may change the matrix.
        change: W' − W, (d_out, d_in), float32.
        kept: the share of W that is left in W' outside the mask; 1 unless decay reaches there.
        stirred: how much each edit's prompts stirred the memory when it was made.
    """

    mask: Tensor
    change: Tensor
    kept: float
    stirred: tuple[float, ...]

    @classmethod
    def of(cls, weight: Tensor, swaps: Sequence[ModuleSwap]) -> Shard:
        """The sum of the edits' own changes.

        Args:
            weight: W, (d_out, d_in).
            swaps: of one shard; at least one.
        """
        device, shape = weight.device, (weight.shape[0], weight.shape[1])
        mask = unpack_mask(swaps[0].state["mask"].to(device), shape)
        values = torch.zeros_like(swaps[0].state["values"], device=device)
        kept = 1.0
        for swap in swaps:
            values = values + swap.state["values"].to(device)
            kept *= float(swap.config["kept"])
        bound = float(swaps[-1].config["max_change"])
        change = torch.zeros(shape, device=device)
        if kept != 1:
            change = weight.float() * (kept - 1)
        change[mask] = values.clamp(-bound, bound)
        return cls(mask, change, kept, tuple(float(s.config["stirred"]) for s in swaps))


@dataclass(frozen=True)
class Memory:
    """One side memory.

    Attributes:
        change: W' − W, (d_out, d_in), float32.
        threshold: it answers prompts that stir it more.
    """

    change: Tensor
    threshold: float


def numbered(swaps: Sequence[ModuleSwap]) -> dict[int, list[ModuleSwap]]:
    """The edits of each shard, oldest shard first."""
    shards: dict[int, list[ModuleSwap]] = {}
    for swap in sorted(swaps, key=lambda swap: int(swap.config["shard"])):
        shards.setdefault(int(swap.config["shard"]), []).append(swap)
    return shards


def memories(weight: Tensor, swaps: Sequence[ModuleSwap]) -> list[Memory]:
    """What edits amount to: their shards, merged where enough of them are there.

    Nothing of a shard is changed by merging, so another edit, or one fewer, only means to do it
    again.

    Args:
        weight: W, (d_out, d_in).
        swaps: edits in their order.
    """
    apart = [[s for s in swaps if s.config["retrieve"] is way] for way in (True, False)]
    retrieved, accumulated = (numbered(part) for part in apart)
    found = _side_by_side(weight, retrieved) if retrieved else []
    return [*found, _all_in_one(weight, accumulated)] if accumulated else found


def _side_by_side(weight: Tensor, shards: Mapping[int, Sequence[ModuleSwap]]) -> list[Memory]:
    """Full groups of shards merged, the others as they are."""
    settings = shards[max(shards)][-1].config
    size, found = int(settings["shards_per_memory"]), []
    for group in range(max(shards) // size + 1):
        numbers = [n for n in shards if n // size == group]
        last = (group + 1) * size - 1
        is_full = max(shards) > last or len(shards.get(last, ())) >= settings["edits_per_shard"]
        parts = [Shard.of(weight, shards[n]) for n in numbers]
        if is_full and len(parts) > 1:
            change = _merged([part.change for part in parts], [1.0] * len(parts), settings)
            found.append(_memory(change, parts, settings))
        else:
            found += [_memory(part.change, [part], settings) for part in parts]
    return found


def _all_in_one(weight: Tensor, shards: Mapping[int, Sequence[ModuleSwap]]) -> Memory:
    """All shards in one memory: group after group is merged into what there is."""
    settings = shards[max(shards)][-1].config
    size = int(settings["shards_per_memory"])
    parts = {n: Shard.of(weight, shards[n]) for n in shards}
    change: Tensor | None = None
    for group in sorted({n // size for n in shards}):
        new = [parts[n].change for n in shards if n // size == group]
        if change is None:
            change = _merged(new, [1.0] * len(new), settings)
        else:
            weights = [ACCUMULATED, *[(1 - ACCUMULATED) / len(new)] * len(new)]
            change = _merged([change, *new], weights, settings)
    assert change is not None
    return _memory(change, list(parts.values()), settings)


def _merged(
    changes: Sequence[Tensor], weights: Sequence[float], settings: Mapping[str, Any]
) -> Tensor:
    if len(changes) == 1:
        return changes[0]
    return merged(changes, weights, str(settings["merge"]), float(settings["density"]))


def _memory(change: Tensor, parts: Sequence[Shard], settings: Mapping[str, Any]) -> Memory:
    least = min(stirred for part in parts for stirred in part.stirred)
    return Memory(change, least * float(settings["threshold_ratio"]))


class SideMemory(Wrapper):
    """Adds, for each row whose prompt stirs a memory enough, that memory's change of the output.

    A memory is chosen when a row's prompt is read, from the tokens of the prompt alone, and kept
    for what is generated after it.  Config and state of one edit are made by `Wise`.

    Attributes:
        swaps: the edits.
    """

    changes: Tensor  # (memories, d_out, d_in)
    thresholds: Tensor  # (memories,)

    def __init__(
        self,
        base: nn.Module,
        changes: Tensor,
        thresholds: Tensor,
        indicator: Indicator,
        relative: bool = False,
    ) -> None:
        super().__init__(base)
        self.register_buffer("changes", changes, persistent=False)
        self.register_buffer("thresholds", thresholds, persistent=False)
        self.indicator, self.relative = indicator, relative
        self.swaps: tuple[ModuleSwap, ...] = ()
        self._stirred = torch.zeros(0, 0, len(thresholds))  # (rows, columns, memories)
        self.chosen = torch.zeros(0, dtype=torch.long)  # (rows,) number of a memory, or −1

    @classmethod
    def build(cls, base: nn.Module, swaps: Sequence[ModuleSwap]) -> SideMemory:
        for swap in swaps:
            _check(swap)
        latest = swaps[-1].config
        weight = cast(Tensor, base.weight).detach()
        found = memories(weight.mT if latest["transposed"] else weight, swaps)
        thresholds = torch.tensor([memory.threshold for memory in found], device=weight.device)
        changes = torch.stack([memory.change for memory in found])
        indicator, relative = Indicator(str(latest["activation"])), latest["choice"] == "relative"
        wrapper = cls(base, changes, thresholds, indicator, relative)
        wrapper.swaps = tuple(swaps)
        return wrapper

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
            added[rows] = (keys[rows].float() @ self.changes[number].mT).to(added.dtype)
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
            [self.indicator(written, read @ change.mT) for change in self.changes], dim=1
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
