"""Settings of ROME and R-ROME."""

from typing import Literal

from pydantic import Field

from kedit_core import HyperParams
from kedit_core.hparams import searched, searched_blocks
from kedit_core.targets import CONTEXTS, Contexts, ValueHyperParams


class _Layer(HyperParams):
    """A base of its own, so that it is declared, and searched, before what depends on it."""

    layer: int = Field(
        ge=0,
        json_schema_extra=searched_blocks(0.17, 0.1, 0.25, 0.36),
        description="Block whose MLP output matrix is rewritten [l*].",
    )


class RomeHyperParams(ValueHyperParams, _Layer):
    """Settings of ROME; symbols of the paper in brackets."""

    key: Literal["rome", "context", "prompt"] = Field(
        "rome",
        description="Key of the update [k*]: `rome` mixes the mean over contexts with the plain "
        "prompt's key as the paper's code does, `context` (R-ROME) and `prompt` (p-ROME) use one "
        "key everywhere.",
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
    contexts: Contexts = Field(((5, 10), (10, 10)), description=CONTEXTS)
    second_moment: bool = Field(
        True, description="Use C = E[k kᵀ] as in the paper; the identity otherwise."
    )
