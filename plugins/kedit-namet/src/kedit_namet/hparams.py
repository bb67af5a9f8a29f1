"""Settings of NAMET."""

from pydantic import Field

from kedit_core.hparams import searched
from kedit_core.targets import CONTEXTS, Contexts, MomentHyperParams


class NametHyperParams(MomentHyperParams):
    """Settings of NAMET; symbols of the paper in brackets."""

    weight_decay: float = Field(
        0.5,
        ge=0,
        json_schema_extra=searched(1e-3, 0.5),
        description="Weight of |δ| / ‖[h_c]‖.",
    )
    max_norm_ratio: float = Field(
        0.75,
        gt=0,
        json_schema_extra=searched(0.4, 0.75, 1.5),
        description="Bound of |δ| relative to ‖[h_c]‖, the norm of the states of all contexts "
        "together.",
    )
    stop_loss: float = Field(1e-2, ge=0, description="Stop when the loss is below this.")
    contexts: Contexts = Field(((10, 12),), description=CONTEXTS)
