"""Where a weight lives: a parameter's name, how it is stored, and which slice of it is meant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Site:
    """One matrix of a model, named by structure so that a patch can find it again.

    Attributes:
        parameter: canonical parameter name, for example `model.layers.8.mlp.down_proj.weight`.
        transposed: True where the parameter is stored (d_in, d_out), as in GPT-2's Conv1D.
        expert: index into the first dimension of a stacked (experts, ·, ·) parameter, or None.
    """

    parameter: str
    transposed: bool = False
    expert: int | None = None

    @property
    def module(self) -> str:
        """Path of the module that owns the parameter."""
        return self.parameter.rpartition(".")[0]

    def view(self, parameter: Tensor) -> Tensor:
        """The matrix as (d_out, d_in), sharing memory with `parameter`."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix.mT if self.transposed else matrix
