"""Settings of SPHERE."""

from pydantic import Field

from kedit_core.hparams import searched
from kedit_core.targets import NullSpaceHyperParams


class SphereHyperParams(NullSpaceHyperParams):
    """Settings of SPHERE; symbols of the paper in brackets."""

    cumulative_ratio: float = Field(
        0.5,
        gt=0,
        le=1,
        description="The leading directions of a matrix's rows are those that hold this share of "
        "their spread [η].",
    )
    suppression_strength: float = Field(
        0.5,
        ge=0,
        le=1,
        json_schema_extra=searched(0.2, 0.5, 0.8),
        description="How much of a change along them is taken out [α].",
    )
