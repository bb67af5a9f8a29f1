"""Settings of WISE."""

from typing import Literal

from pydantic import Field, model_validator

from kedit_core import HyperParams
from kedit_core.hparams import searched, searched_blocks
from kedit_core.targets import CONTEXTS, Contexts


class WiseHyperParams(HyperParams):
    """Settings of WISE; symbols of the paper in brackets."""

    layer: int = Field(
        ge=0,
        json_schema_extra=searched_blocks(0.87, 0.78, 0.94),
        description="Block beside whose MLP the side memory stands.",
    )
    matrix: Literal["mlp_out", "mlp_in"] = Field(
        "mlp_out", description="The MLP's matrix that the side memory is a copy of [W_v]."
    )
    steps: int = Field(70, gt=0, description="Gradient steps of one edit, at most.")
    lr: float = Field(
        1.0,
        gt=0,
        json_schema_extra=searched(0.5, 1.0, 2.0),
        description="Learning rate of plain gradient descent [η].",
    )
    momentum: float = Field(
        0.0, ge=0, lt=1, description="Of the gradient descent; none in the paper."
    )
    weight_decay: float = Field(1e-5, ge=0, description="Decay of the side memory's weights.")
    decay: Literal["masked", "legacy", "none"] = Field(
        "masked",
        description="Which weights decay: those that the edit may change, all of them as in the "
        "authors' code, or none.",
    )
    max_change: float = Field(1.0, gt=0, description="Bound of each weight's change.")
    mask_ratio: float = Field(
        0.2, gt=0, le=1, description="Share of the weights that a shard may change [ρ]."
    )
    irrelevant_max: float = Field(
        5.0, ge=0, description="Texts that have nothing to do with the edit should stir less [α]."
    )
    edited_min: float = Field(
        20.0,
        ge=0,
        json_schema_extra=searched(10.0, 20.0, 40.0),
        description="Edited prompts should stir more [β].",
    )
    margin: float = Field(10.0, ge=0, description="Difference that should lie between them [γ].")
    indicator: Literal["paper", "legacy"] = Field(
        "paper",
        description="How much a text stirs a memory: the mean length of the change of the matrix's "
        "output over its tokens, or as in the authors' code after the model's activation function.",
    )
    threshold_ratio: float = Field(
        0.88,
        gt=0,
        json_schema_extra=searched(0.5, 0.7, 0.88),
        description="A memory answers a prompt that stirs it more than this share of what stirred "
        "it least of its edits [of ε].",
    )
    choice: Literal["largest", "relative"] = Field(
        "largest",
        description="Of several memories that may answer a prompt, the one that it stirs most, or "
        "most in relation to the memory's threshold.",
    )
    edits_per_shard: int = Field(500, gt=0, description="Edits that share one mask.")
    shards_per_memory: int = Field(2, gt=0, description="Shards that are merged into one [k].")
    merge: Literal["ties", "magnitude", "sign", "linear"] = Field(
        "ties", description="How shards are merged."
    )
    density: float = Field(
        0.53,
        gt=0,
        le=1,
        description="Share of the matrix's entries that `ties` and `magnitude` keep of a shard.",
    )
    retrieve: bool = Field(
        True, description="Merged memories stand side by side; otherwise all are merged into one."
    )
    contexts: Contexts = Field(((5, 5), (10, 5)), description=CONTEXTS)
    irrelevant: int = Field(
        8, gt=0, description="Texts that have nothing to do with an edit, for each edit [x_i]."
    )
    irrelevant_tokens: int = Field(12, gt=0, description="Length of these texts in tokens.")
    replay: int = Field(
        0,
        ge=0,
        description="Earlier edits of other memories that should not stir this one, and as many of "
        "this one that should.",
    )
    stop_loss: float = Field(0.02, ge=0, description="Stop when the loss is at most this …")
    stop_change: float = Field(1e-4, ge=0, description="… and changed by no more than this.")

    @model_validator(mode="after")
    def _decays_alike(self) -> "WiseHyperParams":
        if self.decay == "legacy" and self.momentum:
            raise ValueError(
                "decay=legacy shrinks all weights by one factor, so momentum must be 0"
            )
        return self
