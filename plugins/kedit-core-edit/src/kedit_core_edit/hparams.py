"""Settings of CoRE."""

from typing import Literal

from pydantic import Field

from kedit_core.targets import MomentHyperParams


class CoreHyperParams(MomentHyperParams):
    """Settings of CoRE; names in its authors' code in brackets."""

    context_count: int = Field(
        15,
        ge=3,
        description="Texts put before a fact while its target is optimised, a third of them "
        "begun by its former answer, by its subject and by its new one; one or two left over go "
        "to the first of these [ctx_num].",
    )
    context_tokens: int = Field(
        10, gt=0, description="Tokens by which each of them goes on [ctx_len]."
    )
    variance_weight: float = Field(
        0.01,
        ge=0,
        description="Weight of how far the states after different contexts lie apart, summed over "
        "all pairs [reg_lambda].",
    )
    variance_range: int = Field(
        28, gt=0, description="Blocks above the last edited one that count [layer_range]."
    )
    keys: Literal["sampled", "own"] = Field(
        "sampled",
        description="Contexts of the keys: those of `contexts` as in the authors' code, or the "
        "fact's own.",
    )
