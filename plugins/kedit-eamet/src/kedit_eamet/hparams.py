"""Settings of EAMET."""

from typing import Literal

from pydantic import Field

from kedit_core.hparams import searched
from kedit_core.targets import CONTEXTS, Contexts, MomentHyperParams


class EametHyperParams(MomentHyperParams):
    """Settings of EAMET; symbols of the paper or names in its authors' code in brackets."""

    lr: float = Field(
        0.04,
        gt=0,
        json_schema_extra=searched(0.04, 0.5),
        description="Learning rate of Adam on the target.",
    )
    start: Literal["state", "zero"] = Field(
        "state",
        description="Where δ starts: in the direction of the state h, as long as the key, or at "
        "zero [delta_init].",
    )
    bound: Literal["key", "state"] = Field(
        "key",
        description="What bounds |δ|: key_ratio times the length of the key, or max_norm_ratio "
        "times that of the state; with the second, weight_decay counts [weight_decay_method].",
    )
    key_ratio: float = Field(
        2.0,
        gt=0,
        json_schema_extra=searched(2.0, 5.0, 20.0),
        description="Bound of |δ| relative to the key's length [clamp_ks_factor].",
    )
    norm_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the squared distance of |δ| from that bound [norm_factor].",
    )
    weight_decay: float = Field(
        0.5, ge=0, description="Weight of |δ| / |h|, where the state bounds δ."
    )
    max_norm_ratio: float = Field(
        1.5, gt=0, description="Bound of |δ| relative to |h|, where the state bounds δ."
    )
    cosine_weight: float = Field(
        2.0,
        ge=0,
        description="Weight of KL(p ‖ q) between similarities of keys and of δ [cs_factor].",
    )
    square_weight: float = Field(
        8.0,
        ge=0,
        description="Weight of the squared difference of the strongest 50 similarities "
        "[mse_factor].",
    )
    temperature: float = Field(0.07, gt=0, description="Of the softmax of similarities [τ].")
    block: int = Field(
        64,
        gt=0,
        description="Facts that are optimised side by side; with 1 each is optimised against the "
        "finished ones before it, as in the paper.",
    )
    stop_loss: float = Field(1e-2, ge=0, description="Stop when the loss is below this.")
    contexts: Contexts = Field(((10, 12),), description=CONTEXTS)
