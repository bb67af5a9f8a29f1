"""Settings of UltraEdit."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from kedit_core import HyperParams
from kedit_core.hparams import searched, searched_blocks

Matrix = Literal["mlp_out", "mlp_in", "gate", "up", "attention_out", "experts_out"]
Blocks = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]


class UltraEditHyperParams(HyperParams):
    """Settings of UltraEdit; symbols of the paper in brackets."""

    matrices: dict[Matrix, Blocks] = Field(
        min_length=1,
        json_schema_extra=searched_blocks(
            {"mlp_out": (0.9, 0.97)},
            {"mlp_out": (0.67, 0.96)},
            {"mlp_out": (0.9, 0.97), "attention_out": (0.83, 0.97)},
            {"mlp_in": (0.67, 0.96)},
        ),
        description="Blocks whose matrices are changed, by kind: `mlp_out`; `mlp_in`, all that "
        "lead into the MLP, or of two `gate`, which runs first, and `up`; `attention_out`; "
        "`experts_out`, of routed experts.",
    )
    lr: float = Field(
        1e-6,
        gt=0,
        json_schema_extra=searched(1e-6, 1e-5, 1e-4, 3e-4, 1e-3),
        description="Size of the step at a module's output [η].",
    )
    ridge: float = Field(
        1.0, gt=0, description="Weight of the squared norm of the change; 1 in the paper."
    )
    positions: Literal["target", "all"] = Field(
        "target",
        description="Tokens whose hidden states count: those that predict the target, or all.",
    )
    batch_tokens: int = Field(
        1024, gt=0, description="Tokens of one pass with their padding; memory depends on it."
    )
