"""Settings of MEMIT, EMMET and PMET."""

from typing import Self

from pydantic import Field, PositiveFloat, field_validator, model_validator

from kedit_core.hparams import searched
from kedit_core.targets import MomentHyperParams


class MemitHyperParams(MomentHyperParams):
    """Settings of MEMIT; symbols of the paper in brackets."""

    history: bool = Field(
        False,
        description="Keys of the session's earlier edits are stored things too, as many edits "
        "in one solution would have it (arXiv:2605.26670).",
    )


class PmetHyperParams(MemitHyperParams):
    """Settings of PMET; symbols of the paper in brackets."""

    kl_weight: float = Field(
        1.0, ge=0, description="Weight of the KL term that holds '{subject} is a' in place [φ]."
    )
    reached_factor: float = Field(
        0.1,
        gt=0,
        description="Factor of the target's loss while each of its tokens is the most likely one.",
    )
    reached_kl: float = Field(
        0.01, ge=0, description="The target is good enough then, when the KL term is below this."
    )
    moment_weight: PositiveFloat | tuple[PositiveFloat, ...] = Field(
        6_000.0,
        json_schema_extra=searched(60.0, 600.0, 6_000.0),
        description="Weight of what the matrices store already [λ]: one for all layers, or a list "
        "with one for each.",
    )


class EmmetHyperParams(MemitHyperParams):
    """Settings of EMMET; symbols of the paper in brackets."""

    moment_weight: PositiveFloat | tuple[PositiveFloat, ...] = Field(
        1.0,
        json_schema_extra=searched(0.1, 1.0, 10.0, 100.0),
        description="Weight of what the matrix stores already [λ'].",
    )
    ridge: float = Field(
        0.1,
        ge=0,
        description="How far equality is relaxed [μ]; with 0 the facts are written exactly, as a "
        "single one without history always is.",
    )

    @field_validator("layers")
    @classmethod
    def _one(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if len(layers) != 1:
            raise ValueError("EMMET rewrites one layer")
        return layers

    @model_validator(mode="after")
    def _history_is_relaxed(self) -> Self:
        if self.history and not self.ridge:
            raise ValueError("with history the facts are not written exactly; give a ridge above 0")
        return self
