"""Settings of DoLa and DeCo."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, model_validator

from kedit_core import HyperParams

Layers = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]


class DolaHyperParams(HyperParams):
    """Settings of DoLa; symbols of the paper in brackets.

    A layer's number is that of the block which its state enters: 0 is the embeddings.
    """

    layers: Literal["low", "high"] | Layers = Field(
        "high",
        description="Early layers to choose from [J]: every second one of the lower or upper half, "
        "or a list.  `low` suits questions with long answers, `high` those with short ones.",
    )
    relative_top: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Tokens with less than this share of the highest probability are out [α].",
    )


class DecoHyperParams(HyperParams):
    """Settings of DeCo; symbols of the paper in brackets.

    A layer's number is that of the block which its state enters: 0 is the embeddings.
    """

    layers: Layers | None = Field(
        None,
        description="Early layers to choose from [a to b]; by default all from `first` to `last`.",
    )
    first: float = Field(
        0.625, ge=0, lt=1, description="First early layer as a share of all blocks: 20 of 32."
    )
    last: float = Field(
        0.875, ge=0, lt=1, description="Last early layer as a share of all blocks: 28 of 32."
    )
    alpha: float = Field(0.6, ge=0, description="Weight of the early layer's logits [α].")
    top_p: float = Field(
        0.9, gt=0, le=1, description="Candidates are the likeliest tokens of this probability."
    )
    top_k: int = Field(20, gt=0, description="And at most so many of them.")

    @model_validator(mode="after")
    def _in_order(self) -> "DecoHyperParams":
        if self.first > self.last:
            raise ValueError("the first early layer lies above the last one")
        return self
