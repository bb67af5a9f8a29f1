"""Settings of IKE, ICE and PROMPT."""

from typing import Literal

from pydantic import Field, NonNegativeInt, field_validator

from kedit_core import HyperParams


class InContextHyperParams(HyperParams):
    """Settings that all three share."""

    instruction: str = Field("", description="Sentence before the new fact; none if empty.")
    min_similarity: float = Field(
        0.6,
        ge=-1,
        le=1,
        description="Where several facts are stored: least cosine of a prompt and the nearest "
        "fact's own prompt; prompts below it are asked as they are.",
    )
    gate_single: bool = Field(
        False,
        description="Ask for `min_similarity` where a single fact is stored, too; as published, "
        "that one is put before every prompt.",
    )
    encoder: str = Field(
        "", description="Folder or hub id of the sentence encoder; all-MiniLM-L6-v2 if empty."
    )


class IkeHyperParams(InContextHyperParams):
    """Settings of IKE; symbols of the paper in brackets."""

    k: int = Field(32, ge=0, description="Demonstrations before the new fact [k].")
    demonstrations: str = Field(
        "starter",
        min_length=1,
        description="Training facts to demonstrate: a dataset's name, and its file after a colon.",
    )
    form: Literal["ike", "easyedit"] = Field(
        "ike",
        description="`ike`: one demonstration of each of the nearest facts, of mixed kinds, the "
        "most similar last.  `easyedit`: the nearest demonstrations of any kind, the most similar "
        "first.",
    )
    ratio: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt] = Field(
        (1, 3, 4), description="Copies : updates : retentions among them, for the form `ike`."
    )
    final_copy: bool = Field(
        False, description="Demonstrate the new fact itself, too, right before the question."
    )
    reserve: int = Field(
        128,
        ge=0,
        description="Tokens to leave free for the answer and a chat template; demonstrations that "
        "leave less are dropped, the farthest first.",
    )

    @field_validator("ratio")
    @classmethod
    def _some(cls, ratio: tuple[int, int, int]) -> tuple[int, int, int]:
        if not sum(ratio):
            raise ValueError("at least one of the three kinds needs a share above 0")
        return ratio
