"""Settings of SimIE."""

from typing import Any

from pydantic import Field

from kedit_core import HyperParams
from kedit_core.hparams import searched


class SimIEHyperParams(HyperParams):
    """Settings of SimIE; symbols of the paper in brackets."""

    base: str = Field("rome", description="Method that edits weights, whose edits are combined.")
    base_preset: str | None = Field(
        None, description="Its preset; by default the one that suits the model."
    )
    base_settings: dict[str, Any] = Field(
        default_factory=dict, description="Settings of it that override its preset."
    )
    init_model: bool = Field(
        True, description="Whether the base edits the unedited model each time, or the present one."
    )
    ridge: float = Field(
        1.0,
        gt=0,
        json_schema_extra=searched(0.01, 0.1, 1.0, 10.0),
        description="Weight of the original matrices against the edits [λ].",
    )
