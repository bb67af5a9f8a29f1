"""Settings of ROME and R-ROME."""

from typing import Literal

from pydantic import Field, PositiveInt

from kedit_core import HyperParams
from kedit_core.hparams import searched, searched_blocks


class RomeHyperParams(HyperParams):
    """Settings of ROME; symbols of the paper in brackets."""

    layer: int = Field(
        ge=0,
        json_schema_extra=searched_blocks(0.17, 0.1, 0.25, 0.36),
        description="Block whose MLP output matrix is rewritten [l*].",
    )
    key: Literal["rome", "context", "prompt"] = Field(
        "rome",
        description="Key of the update [k*]: `rome` mixes the mean over contexts with the plain "
        "prompt's key as the paper's code does, `context` (R-ROME) and `prompt` (p-ROME) use one "
        "key everywhere.",
    )
    fact_token: Literal["subject_last", "subject_first", "subject_first_after_last", "last"] = (
        Field("subject_last", description="Token at which key and value are taken.")
    )
    steps: int = Field(25, gt=0, description="Evaluations of the loss; one less are steps.")
    lr: float = Field(
        0.5,
        gt=0,
        json_schema_extra=searched(0.1, 0.25, 0.5),
        description="Learning rate of Adam on the value vector.",
    )
    weight_decay: float = Field(
        1e-3, ge=0, json_schema_extra=searched(1e-3, 0.5), description="Weight of |δ| / |v|²."
    )
    max_norm_ratio: float = Field(
        4.0,
        gt=0,
        json_schema_extra=searched(2.0, 4.0, 8.0),
        description="Bound of |δ| relative to |v|.",
    )
    kl_weight: float = Field(
        0.0625,
        ge=0,
        json_schema_extra=searched(0.0625, 0.25, 1.0),
        description="Weight of the KL term that holds '{subject} is a' in place.",
    )
    stop_loss: float = Field(5e-2, ge=0, description="Stop when the loss is below this.")
    contexts: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(
        ((5, 10), (10, 10)),
        description="Sampled texts put before the prompt: pairs (tokens, count).",
    )
    second_moment: bool = Field(
        True, description="Use C = E[k kᵀ] as in the paper; the identity otherwise."
    )
    moment_tokens: int | None = Field(
        None, gt=0, description="Tokens from which C is estimated; 10 times its width by default."
    )
