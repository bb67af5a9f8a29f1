"""Settings of knowledge neurons."""

from pydantic import Field, PositiveInt, model_validator

from kedit_core import HyperParams
from kedit_core.hparams import searched, searched_blocks
from kedit_core.targets import CONTEXTS, Contexts


class KnHyperParams(HyperParams):
    """Settings of knowledge neurons; symbols of the paper in brackets."""

    layers: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        json_schema_extra=searched_blocks((0.5, 1.0), (0.75, 1.0)),
        description="Blocks whose MLP neurons are looked at; all if absent.",
    )
    steps: int = Field(20, gt=0, description="Steps of the Riemann sum of the gradients [m].")
    threshold: float = Field(
        0.2,
        ge=0,
        lt=1,
        json_schema_extra=searched(0.1, 0.2, 0.3),
        description="Part of a prompt's largest attribution that a neuron must pass [t].",
    )
    share: float = Field(
        0.7, gt=0, le=1, description="Share of the prompts in which a neuron must do so [p]."
    )
    neurons: tuple[PositiveInt, PositiveInt] = Field(
        (2, 5),
        json_schema_extra=searched([2, 5], [5, 10], [10, 20]),
        description="Fewest and most neurons to change; the share is moved to get there.",
    )
    others: int = Field(
        20,
        ge=0,
        description="Texts that the model writes itself, instead of other facts, to find neurons "
        "that matter whatever is said.",
    )
    common: float = Field(
        0.1, ge=0, le=1, description="Share of these texts above which a neuron is left out."
    )
    erase: float = Field(1.0, ge=0, description="Weight of the old answer's direction [λ₁].")
    write: float = Field(
        8.0,
        ge=0,
        json_schema_extra=searched(1.0, 2.0, 8.0),
        description="Weight of the new answer's direction [λ₂].",
    )
    contexts: Contexts = Field(
        ((5, 2), (10, 2)), description=f"{CONTEXTS} Each makes one more prompt."
    )

    @model_validator(mode="after")
    def _check(self) -> "KnHyperParams":
        fewest, most = self.neurons
        if fewest > most:
            raise ValueError(f"the fewest neurons ({fewest}) are more than the most ({most})")
        return self
