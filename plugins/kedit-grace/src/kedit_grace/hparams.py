"""Settings of GRACE."""

from typing import Literal

from pydantic import Field

from kedit_core import HyperParams
from kedit_core.hparams import searched, searched_blocks


class GraceHyperParams(HyperParams):
    """Settings of GRACE; symbols of the paper in brackets."""

    layer: int = Field(
        ge=0,
        json_schema_extra=searched_blocks(0.76, 0.65, 0.87, 0.93),
        description="Block whose MLP is wrapped [l].",
    )
    module: Literal["mlp_out", "mlp_in"] = Field(
        "mlp_out", description="Which matrix of the MLP: its output or its only input projection."
    )
    eps: float = Field(
        1.0,
        ge=1e-3,
        json_schema_extra=searched(0.5, 1.0, 2.0, 5.0),
        description="First radius of a ball, in the units of the keys [ε_init].",
    )
    steps: int = Field(100, gt=0, description="Largest number of steps of Adam on a value.")
    lr: float = Field(
        1.0,
        gt=0,
        json_schema_extra=searched(0.3, 1.0, 2.0),
        description="Learning rate of Adam on the value.",
    )
    start: Literal["cold", "warm"] = Field(
        "cold",
        description="Where values start: `cold` uniform in [0, 1), `warm` the layer's own output.",
    )
    stop_loss: float = Field(
        0.05,
        ge=0,
        lt=0.69,
        description="Stop when no token of the target has a larger loss, in nats; below 0.69 each "
        "is then the most likely one.",
    )
    replace: Literal["last", "prompt", "all"] = Field(
        "last",
        description="Where the value is written: at the prompt's `last` token, at the whole "
        "`prompt`, or at `all` tokens, those after the prompt too.",
    )
    decode: Literal["none", "value"] = Field(
        "none",
        description="What tokens after the prompt get, given or generated: nothing, or the value "
        "that the prompt got.",
    )
    skip_known: bool = Field(
        True, description="Leave out what the model already answers rightly, as the paper does."
    )
    batch_size: int = Field(32, gt=0, description="Requests that are optimised side by side.")
