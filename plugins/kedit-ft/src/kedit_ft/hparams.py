"""Settings of FT-M and FT-L."""

from typing import Literal

from pydantic import Field

from kedit_core import HyperParams
from kedit_core.hparams import searched, searched_blocks


class FineTuningHyperParams(HyperParams):
    """Settings of fine-tuning; symbols of the papers in brackets."""

    layers: tuple[int, ...] = Field(
        min_length=1,
        json_schema_extra=searched_blocks((0.68, 0.68), (0.35, 0.35), (0.17, 0.17), (0.9, 0.9)),
        description="Blocks whose MLP output matrices are trained.",
    )
    objective: Literal["target", "prompt_last"] = Field(
        "target",
        description="`target`: cross-entropy on the target's tokens (FT-M). `prompt_last`: all of "
        "the target's tokens at the prompt's last position (FT-L).",
    )
    steps: int = Field(25, gt=0, description="Passes over the requests.")
    lr: float = Field(
        5e-4,
        gt=0,
        json_schema_extra=searched(1e-4, 5e-4, 2e-3, 5e-3),
        description="Learning rate of Adam.",
    )
    batch_size: int = Field(32, gt=0, description="Requests in one gradient step.")
    max_change: float | None = Field(
        None,
        gt=0,
        json_schema_extra=searched(5e-4, 2e-3, 1e-2),
        description="Bound of each weight's change [ε, an L∞ ball]; none if absent.",
    )
    stop_loss: float = Field(1e-2, ge=0, description="Stop when the mean loss is below this.")
