"""Settings of methods that optimise a target for each fact and write it by least squares."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kedit_core.hparams import HyperParams, searched, searched_blocks

# Texts to put before a prompt: pairs (tokens, count) of sampled ones, or the texts themselves.
Contexts = tuple[tuple[PositiveInt, PositiveInt] | Annotated[str, Field(min_length=1)], ...]
CONTEXTS = "Texts put before the prompt: pairs (tokens, count) of sampled ones, or texts of yours."


class ValueHyperParams(HyperParams):
    """How the target of a fact is optimised, and where its key is read.

    A method's own class adds what is its own, and may change defaults.
    """

    fact_token: Literal["subject_last", "subject_first", "subject_first_after_last", "last"] = (
        Field("subject_last", description="Token at which keys and targets are taken.")
    )
    steps: int = Field(25, gt=0, description="Evaluations of the loss; one less are steps.")
    lr: float = Field(
        0.5,
        gt=0,
        json_schema_extra=searched(0.1, 0.25, 0.5),
        description="Learning rate of Adam on the target.",
    )
    weight_decay: float = Field(
        0.5, ge=0, json_schema_extra=searched(1e-3, 0.5), description="Weight of |δ| / |h|²."
    )
    max_norm_ratio: float = Field(
        0.75,
        gt=0,
        json_schema_extra=searched(0.75, 1.5, 4.0),
        description="Bound of |δ| relative to |h|.",
    )
    kl_weight: float = Field(
        0.0625, ge=0, description="Weight of the KL term that holds '{subject} is a' in place."
    )
    stop: Literal["loss", "most-probable"] = Field(
        "loss",
        description="When a target is good enough: its loss is below stop_loss, or also when "
        "every token of it is the most likely one in all contexts (arXiv:2502.01636).",
    )
    stop_loss: float = Field(5e-2, ge=0, description="Stop when the loss is below this.")
    contexts: Contexts = Field(((10, 5),), description=CONTEXTS)
    moment_tokens: int | None = Field(
        None, gt=0, description="Tokens from which C is estimated; 10 times its width by default."
    )


class _Layers(HyperParams):
    """A base of its own, so that it is declared, and searched, before what depends on it."""

    layers: tuple[NonNegativeInt, ...] = Field(
        min_length=1,
        json_schema_extra=searched_blocks((0.12, 0.26), (0.2, 0.2), (0.1, 0.1), (0.35, 0.35)),
        description="Blocks whose MLP output matrices are rewritten, ascending [R]; the target is "
        "optimised at the last of them [L].",
    )

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if list(layers) != sorted(set(layers)):
            raise ValueError("give each layer once, in ascending order")
        return layers


class TargetHyperParams(ValueHyperParams, _Layers):
    """Base of their settings; symbols of MEMIT (Meng et al. 2023, arXiv:2210.07229) in brackets."""


class MomentHyperParams(TargetHyperParams):
    """With a second moment as the only constraint, weighted in each layer on its own."""

    moment_weight: PositiveFloat | tuple[PositiveFloat, ...] = Field(
        15_000.0,
        json_schema_extra=searched(15.0, 150.0, 1_500.0, 15_000.0),
        description="Weight of what the matrices store already [λ]: one for all layers, or a list "
        "with one for each.",
    )

    @field_validator("moment_weight")
    @classmethod
    def _one_for_each_layer(
        cls, weight: float | tuple[float, ...], info: ValidationInfo
    ) -> float | tuple[float, ...]:
        layers = info.data.get("layers", ())  # missing where they are wrong themselves
        if isinstance(weight, tuple) and layers and len(weight) != len(layers):
            raise ValueError(f"{len(weight)} weights for {len(layers)} layers")
        return weight

    @property
    def moment_weights(self) -> tuple[float, ...]:
        """λ of each layer."""
        if isinstance(self.moment_weight, tuple):
            return self.moment_weight
        return (self.moment_weight,) * len(self.layers)


class NullSpaceHyperParams(TargetHyperParams):
    """Settings of methods that write where ordinary text reads little; symbols of AlphaEdit
    (Fang et al. 2025, arXiv:2410.02355) in brackets."""

    nullspace_threshold: float | None = Field(
        0.02,
        gt=0,
        description="Directions whose eigenvalue in C is below this are free to write in [U₀]; "
        "it depends on the scale of C.",
    )
    nullspace_energy: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Instead of the threshold: the free directions are those with the smallest "
        "eigenvalues that together hold at most this share of C's trace without its largest.",
    )
    l2: float = Field(
        10.0,
        gt=0,
        json_schema_extra=searched(1.0, 10.0, 100.0),
        description="Weight of the squared norm of the change [L₂].",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.nullspace_threshold is None) == (self.nullspace_energy is None):
            raise ValueError(
                "give nullspace_threshold or nullspace_energy, and null for the other one"
            )
        return self
