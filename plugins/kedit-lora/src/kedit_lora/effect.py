"""The effect of an adapter: low-rank products beside a linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kedit_core.editing import ModuleSwap, Wrapper
from kedit_core.effects import unwrapped
from kedit_core.errors import PatchError


class LowRank(Wrapper):
    """Adds scale · B A x to what a linear layer makes of x, for all edits in one product.

    State of each swap, in float32: `A` (r, d_in), `B` (d_out, r), `scale` ().
    """

    right: Tensor
    left: Tensor

    @classmethod
    def build(cls, base: nn.Module, swaps: Sequence[ModuleSwap]) -> LowRank:
        """The wrapper of all edits: their factors side by side.

        Raises:
            PatchError: factors that fit neither each other nor the layer.
        """
        wrapper = cls(base)
        factors = [cls.fold(base, swap) for swap in swaps]
        weight = wrapper.weight
        device = torch.device("cpu") if weight.is_meta else weight.device
        for name, parts, dim in (("left", 0, 1), ("right", 1, 0)):
            joined = torch.cat([pair[parts].to(device) for pair in factors], dim=dim)
            wrapper.register_buffer(name, joined, persistent=False)
        return wrapper

    @classmethod
    def fold(cls, base: nn.Module, swap: ModuleSwap) -> tuple[Tensor, Tensor]:
        """Factors (d_out, r) and (r, d_in) of the change of the weight, in float32.

        Raises:
            PatchError: the state's tensors have other shapes than the layer asks for.
        """
        right, left, scale = (swap.state[name].float() for name in ("A", "B", "scale"))
        rank, (d_out, d_in) = len(right), _shape(base)
        if right.shape != (rank, d_in) or left.shape != (d_out, rank) or scale.ndim:
            raise PatchError(
                f"The adapter of {swap.path} has factors of shapes {tuple(left.shape)} and "
                f"{tuple(right.shape)}, but the layer maps {d_in} numbers to {d_out}."
            )
        return scale * left, right

    def change(self, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = (args[0] if args else kwargs["input"]).float()
        right, left = self.right.to(x.device), self.left.to(x.device)
        return output + (x @ right.mT @ left.mT).to(output.dtype)


def _shape(base: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, maybe quantised or wrapped."""
    base = unwrapped(base)
    if isinstance(base, nn.Linear):
        return base.out_features, base.in_features
    d_in, d_out = base.weight.shape  # GPT-2's Conv1D
    return int(d_out), int(d_in)
