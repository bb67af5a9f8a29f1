"""The three kinds of effect that a patch can have; `EditSession` puts them in force."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from kedit_core.errors import PatchError
from kedit_core.sites import Site


@dataclass(frozen=True)
class WeightDelta:
    """A change of one matrix, as factors or dense.

    Attributes:
        site: the matrix.
        left: (d_out, rank), or the dense change (d_out, d_in) if `right` is None.
        right: (rank, d_in), or None.

    Raises:
        PatchError: the shapes do not fit each other.
    """

    site: Site
    left: Tensor
    right: Tensor | None = None

    def __post_init__(self) -> None:
        factors = (self.left,) if self.right is None else (self.left, self.right)
        fits = all(f.ndim == 2 for f in factors)
        if fits and self.right is not None:
            fits = self.left.shape[1] == self.right.shape[0]
        if not fits:
            shapes = " and ".join(str(tuple(f.shape)) for f in factors)
            raise PatchError(f"The change of {self.site.parameter} has shapes {shapes}.")

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    @property
    def rank(self) -> int | None:
        """Inner dimension of the factors; None for a dense change."""
        return None if self.right is None else self.left.shape[1]

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

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(self.state)


Effect = WeightDelta | ModuleSwap | CallEffect


class Wrapper(nn.Module):
    """Base of wrapped modules: keeps `base`, through which all names resolve.

    While the session is suspended, `passes_through` is True and the wrapper does nothing.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.passes_through = False

    def __getattr__(self, name: str) -> Any:
        """What models ask of the module itself, such as `weight.dtype`, the base answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
        wrapped = self.base
        while isinstance(wrapped, Wrapper):
            wrapped = wrapped.base
        return getattr(wrapped, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base(*args, **kwargs)
        return output if self.passes_through else self.change(output, *args, **kwargs)

    def change(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        """What the wrapper makes of the base's output."""
        raise NotImplementedError


@runtime_checkable
class ModuleEffect(Protocol):
    """What an effect type of kind "module" points to: a class with these class methods."""

    @classmethod
    def build(
        cls, base: nn.Module, config: Mapping[str, Any], state: Mapping[str, Tensor]
    ) -> Wrapper: ...

    @classmethod
    def fold(
        cls, base: nn.Module, config: Mapping[str, Any], state: Mapping[str, Tensor]
    ) -> Tensor:
        """The dense change (d_out, d_in) of the base's weight that does the same.

        Raises:
            PatchError: the effect cannot be expressed as a change of weights; says why.
        """
        ...


@runtime_checkable
class CallMiddleware(Protocol):
    """What an effect type of kind "call" builds."""

    def prompt(self, prompt: str) -> str:
        """The prompt that is really asked."""
        ...

    def logits(self, logits: Tensor) -> Tensor:
        """What becomes of next-token logits (…, vocabulary)."""
        ...


def is_finite(effect: Effect) -> bool:
    """Whether all numbers of the effect are finite."""
    floats = (t for t in effect.tensors.values() if t.is_floating_point())
    return all(bool(torch.isfinite(t).all()) for t in floats)
