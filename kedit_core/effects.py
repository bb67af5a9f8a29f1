"""The three kinds of effect that a patch can have; `EditSession` puts them in force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from kedit_core.errors import PatchError
from kedit_core.reading import Reading
from kedit_core.sites import Site


@dataclass(frozen=True)
class WeightDelta:
    """A change of one matrix, as factors or dense.

    Attributes:
        site: the matrix.
        left: (d_out, rank), or the dense change (d_out, d_in) if `right` is None.
        right: (rank, d_in), or None.

    Raises:
        PatchError: the shapes do not fit each other, or a factor is no tensor of floating point.
    """

    site: Site
    left: Tensor
    right: Tensor | None = None

    @classmethod
    def of_factors(cls, site: Site, left: Tensor, right: Tensor) -> WeightDelta:
        """The change left @ right: as these factors, or dense where that is smaller."""
        is_small = left.numel() + right.numel() < left.shape[0] * right.shape[1]
        return cls(site, left, right) if is_small else cls(site, left @ right)

    def __post_init__(self) -> None:
        factors = (self.left,) if self.right is None else (self.left, self.right)
        for factor in factors:
            if not (isinstance(factor, Tensor) and factor.is_floating_point()):
                kind = factor.dtype if isinstance(factor, Tensor) else type(factor).__name__
                raise PatchError(
                    f"The change of {self.site.parameter} is of {kind}, not a tensor of floating "
                    f"point."
                )
        fits = all(f.ndim == 2 for f in factors)
        if fits and self.right is not None:
            fits = self.left.shape[1] == self.right.shape[0]
        if not fits:
            shapes = " and ".join(str(tuple(f.shape)) for f in factors)
            raise PatchError(f"The change of {self.site.parameter} has shapes {shapes}.")

    def __repr__(self) -> str:
        return f"WeightDelta({self.site}, shape={self.shape}, rank={self.rank})"

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    @property
    def rank(self) -> int | None:
        """Inner dimension of the factors; None for a dense change."""
        return None if self.right is None else self.left.shape[1]

    def to(self, device: torch.device) -> WeightDelta:
        """The same change with its factors on a device."""
        right = None if self.right is None else self.right.to(device)
        return replace(self, left=self.left.to(device), right=right)

    def dense(self) -> Tensor:
        """The change as a float32 matrix (d_out, d_in)."""
        if self.right is None:
            return self.left.float()
        return self.left.float() @ self.right.float()

    def product(self, inputs: Tensor) -> Tensor:
        """`inputs` (…, d_in) times the change, transposed: (…, d_out), in the inputs' type."""
        x = inputs.float()
        left = self.left.to(x.device).float()
        if self.right is None:
            return (x @ left.mT).to(inputs.dtype)
        return (x @ self.right.to(x.device).float().mT @ left.mT).to(inputs.dtype)

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = {"left": self.left, "right": self.right}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class ModuleSwap:
    """A module is replaced by a wrapper that keeps it as `base`.

    Attributes:
        path: of the module to wrap, for example `model.layers.3.mlp.down_proj`.
        type: name of a registered effect type of kind "module".
        config: JSON values for the type's `build`.
        state: tensors for the type's `build`.
    """

    path: str
    type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"ModuleSwap({self.path!r}, {self.type!r}, shapes={_shapes(self.state)})"

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(self.state)


@dataclass(frozen=True)
class CallEffect:
    """Middleware round every question that a `ModelView` asks.

    Attributes:
        type: name of a registered effect type of kind "call".
        config: JSON values for the type's `build`.
        state: tensors for the type's `build`.
    """

    type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"CallEffect({self.type!r}, shapes={_shapes(self.state)})"

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(self.state)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


Effect = WeightDelta | ModuleSwap | CallEffect


class Wrapper(nn.Module):
    """Base of wrapped modules: keeps `base`, through which all names resolve.

    Attributes:
        passes_through: True while the session is suspended; the wrapper then does nothing.
        reading: the rows that the model reads in the present forward pass.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.passes_through = False
        self.reading = Reading()

    def __getattr__(self, name: str) -> Any:
        """What models ask of the module itself, such as `weight.dtype`, the base answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
        return getattr(unwrapped(self.base), name)

    def rebuilt(self, base: nn.Module, swaps: Sequence[ModuleSwap]) -> Wrapper:
        """What stands in this wrapper's place when edits have come or gone: what `build` makes.

        To override where what was made for the edits that stay is worth keeping.
        """
        return cast(ModuleEffect, type(self)).build(base, swaps)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base(*args, **kwargs)
        return output if self.passes_through else self.change(output, *args, **kwargs)

    def change(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        """What the wrapper makes of the base's output."""
        raise NotImplementedError


def unwrapped(module: nn.Module) -> nn.Module:
    """The module without the wrappers round it."""
    while isinstance(module, Wrapper):
        module = module.base
    return module


def has_active_wrapper(module: nn.Module) -> bool:
    """Whether an edit in the module, or in one inside it, may want to know which rows it sees."""
    return any(isinstance(m, Wrapper) and not m.passes_through for m in module.modules())


@runtime_checkable
class ModuleEffect(Protocol):
    """What an effect type of kind "module" points to: a class with these class methods."""

    @classmethod
    def build(cls, base: nn.Module, swaps: Sequence[ModuleSwap]) -> Wrapper:
        """One wrapper for all effects of the type that follow each other on a module.

        Args:
            base: the module, which may be a wrapper of another type.
            swaps: one of each edit, oldest first; at least one.
        """
        ...

    @classmethod
    def fold(cls, base: nn.Module, swap: ModuleSwap) -> tuple[Tensor, Tensor | None]:
        """The change of the base's weight that one effect amounts to.

        Returns:
            Factors (d_out, rank) and (rank, d_in), or the dense change (d_out, d_in) and None.

        Raises:
            PatchError: the effect cannot be expressed as a change of weights; says why.
        """
        ...


class Middleware:
    """Base of what an effect type of kind "call" builds: stands round every question.

    Attributes:
        depths: of the residual streams that `logits` wants to see: n for what enters block n.
    """

    depths: Sequence[int] = ()

    @classmethod
    def build(cls, calls: Sequence[CallEffect]) -> Middleware:
        """One middleware for all effects of the type; it acts where the first of them does.

        Args:
            calls: one of each edit, oldest first; at least one.
        """
        raise NotImplementedError

    def prompts(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that are really asked."""
        return list(prompts)

    def logits(self, logits: Tensor, early: Mapping[int, Tensor]) -> Tensor:
        """What becomes of next-token logits.

        Args:
            logits: (n, vocabulary), float32 when answers are read.
            early: for each of `depths` the logits (n, vocabulary) that the model's head makes
                of that residual stream.
        """
        return logits


def is_finite(effect: Effect) -> bool:
    """Whether all numbers of the effect are finite."""
    floats = (t for t in effect.tensors.values() if t.is_floating_point())
    return all(bool(torch.isfinite(t).all()) for t in floats)
