"""Settings of LoRA, AdaLoRA and QLoRA."""

from pydantic import Field, model_validator

from kedit_core import HyperParams
from kedit_core.hparams import searched, searched_blocks


class LoraHyperParams(HyperParams):
    """Settings of LoRA and QLoRA; symbols of the papers in brackets."""

    target_modules: tuple[str, ...] = Field(
        (),
        description="Linear layers that get an adapter, by the last part of their names as in "
        "PEFT; all of the blocks' linear layers where empty.",
    )
    layers: tuple[int, ...] = Field(
        (),
        json_schema_extra=searched_blocks((0.69, 0.87), (0.5, 0.69), (0.0, 1.0)),
        description="Blocks that get adapters; all where empty.",
    )
    rank: int = Field(8, gt=0, description="Rank of each adapter [r].")
    alpha: float = Field(
        32,
        gt=0,
        json_schema_extra=searched(16, 32),
        description="The adapters' product is scaled by alpha/rank [α].",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of an adapter's inputs dropped in training."
    )
    steps: int = Field(50, gt=0, description="Passes over the requests.")
    lr: float = Field(
        5e-3,
        gt=0,
        json_schema_extra=searched(5e-4, 2e-3, 5e-3),
        description="Learning rate of Adam.",
    )
    batch_size: int = Field(32, gt=0, description="Requests in one gradient step.")
    stop_loss: float = Field(1e-2, ge=0, description="Stop when the mean loss is below this.")


class AdaLoraHyperParams(LoraHyperParams):
    """Settings of AdaLoRA; symbols of the paper in brackets."""

    rank: int = Field(8, gt=0, description="Mean rank that is left in the end [r of b⁽ᵀ⁾].")
    initial_rank: int = Field(
        12, gt=1, description="Rank of each adapter at first; alpha is divided by it [r of b⁽⁰⁾]."
    )
    orthogonality: float = Field(
        0.5, ge=0, description="Weight of the penalty that keeps factors orthogonal [γ]."
    )
    steps: int = Field(50, gt=1, description="Passes over the requests.")

    @model_validator(mode="after")
    def _prunes(self) -> "AdaLoraHyperParams":
        if self.initial_rank <= self.rank:
            raise ValueError(f"initial_rank must be larger than rank, which is {self.rank}")
        return self
