"""Running mean and variance of rows, as a value that is merged and never changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Normaliser:
    """What n rows x have in common; kept on the CPU in float64.

    Attributes:
        count: n, a scalar.
        mean: x̄, (width,).
        squares: M₂ = Σ (x − x̄)², (width,).
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Normaliser:
        """Of some rows: (n, width), at least one."""
        x = rows.double()
        mean = x.mean(0)
        squares = (x - mean).square().sum(0)
        return cls(torch.tensor(float(len(x)), dtype=torch.float64), mean.cpu(), squares.cpu())

    @classmethod
    def restored(cls, state: Mapping[str, Tensor], name: str) -> Normaliser | None:
        """The one that `stored` wrote under this name, or None."""
        if f"{name}.count" not in state:
            return None
        return cls(state[f"{name}.count"], state[f"{name}.mean"], state[f"{name}.squares"])

    def stored(self, name: str) -> dict[str, Tensor]:
        """Its tensors by name, to be kept in a patch's state."""
        named = {"count": self.count, "mean": self.mean, "squares": self.squares}
        return {f"{name}.{part}": tensor for part, tensor in named.items()}

    def merged(self, other: Normaliser) -> Normaliser:
        """Of the rows of both (Chan et al. 1979): M₂ = M₂ᵃ + M₂ᵇ + (x̄ᵇ − x̄ᵃ)² nᵃ nᵇ / n."""
        count = self.count + other.count
        shift = other.mean - self.mean
        return Normaliser(
            count,
            self.mean + shift * (other.count / count),
            self.squares + other.squares + shift.square() * (self.count * other.count / count),
        )

    def applied(self, rows: Tensor) -> Tensor:
        """(x − x̄) / σ in float64, with the unbiased variance σ² = M₂ / (n − 1).

        A single row has no variance, and is its own mean: it becomes zero.
        """
        deviation = (self.squares / (self.count - 1).clamp(min=1)).sqrt()
        x = rows.double()
        return (x - self.mean.to(x.device)) / (deviation.to(x.device) + _EPSILON)
