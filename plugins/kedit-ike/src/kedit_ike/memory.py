"""The facts in force, and which of them a prompt gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kedit_core.editing import CallEffect, Middleware
from kedit_core.encoder import Encoder
from kedit_core.errors import PatchError
from kedit_ike.words import fact_lines, statement


@dataclass(frozen=True)
class Preface:
    """What stands before a question.

    Attributes:
        demonstrations: the farthest first.
        lines: the instruction, the fact, and the beginning of the question's line.
        lengths: for each demonstration, and then for the lines, the tokens from there on.
        room: tokens that the preface and the question may have; None for any number.
    """

    demonstrations: tuple[str, ...]
    lines: str
    lengths: tuple[int, ...]
    room: int | None

    def before(self, prompt: str) -> str:
        """The preface and the prompt; the farthest demonstrations are dropped where it would be
        longer than the model takes, the fact never.

        A text has at most as many tokens as bytes, and one for a space that a tokenizer puts
        before it.
        """
        first = 0
        if self.room is not None:
            left = self.room - len(prompt.encode()) - 1
            while first < len(self.demonstrations) and self.lengths[first] > left:
                first += 1
        return "".join(self.demonstrations[first:]) + self.lines + prompt


class FactMemory(Middleware):
    """Puts before each prompt the fact whose own prompt is most like it.

    Where a prompt was edited twice, the later fact counts.

    Args:
        prefaces: one of each fact.
        embeddings: of the facts' own prompts, (facts, d), each of length 1.
        thresholds: (facts,) least cosine with which a fact is put before a prompt.
        encoder: what made the embeddings.
    """

    def __init__(
        self, prefaces: Sequence[Preface], embeddings: Tensor, thresholds: Tensor, encoder: Encoder
    ) -> None:
        self.prefaces, self.embeddings, self.thresholds = prefaces, embeddings, thresholds
        self.encoder = encoder

    @classmethod
    def build(cls, calls: Sequence[CallEffect]) -> FactMemory:
        """A memory of one fact for each effect.

        Raises:
            PatchError: the facts were embedded by different encoders.
        """
        latest = {call.config["prompt"]: call for call in calls}
        facts = [call.config for call in latest.values()]
        encoders = dict.fromkeys(str(fact["encoder"]) for fact in facts)
        if len(encoders) > 1:
            raise PatchError(
                "The facts in force were embedded by different encoders, so that their nearness "
                "cannot be compared. Use one setting of `encoder` for all."
            )
        single = len(facts) == 1 and not facts[0]["gate_single"]
        thresholds = [-torch.inf if single else float(fact["min_similarity"]) for fact in facts]
        return cls(
            prefaces=[_preface(fact) for fact in facts],
            embeddings=torch.stack([call.state["embedding"] for call in latest.values()]).float(),
            thresholds=torch.tensor(thresholds),
            encoder=Encoder(*encoders),
        )

    def prompts(self, prompts: Sequence[str]) -> list[str]:
        """Each prompt after the preface that it gets."""
        chosen = self.chosen(prompts)
        return [
            prompt if number is None else self.prefaces[number].before(prompt)
            for prompt, number in zip(prompts, chosen, strict=True)
        ]

    def chosen(self, prompts: Sequence[str]) -> list[int | None]:
        """The number of the fact that each prompt gets: one pass of the encoder, one product."""
        if len(self.prefaces) == 1 and self.thresholds[0] == -torch.inf:
            return [0] * len(prompts)
        different = list(dict.fromkeys(prompts))
        if not different:
            return []
        nearest = (self.encoder.embed(different) @ self.embeddings.mT).max(dim=1)
        is_near = nearest.values >= self.thresholds[nearest.indices]
        found = {
            prompt: number if near else None
            for prompt, number, near in zip(
                different, nearest.indices.tolist(), is_near.tolist(), strict=True
            )
        }
        return [found[prompt] for prompt in prompts]


def _preface(fact: Mapping[str, Any]) -> Preface:
    new = statement(str(fact["prompt"]), str(fact["target"]))
    return Preface(
        demonstrations=tuple(map(str, fact["demonstrations"])),
        lines=fact_lines(str(fact["instruction"]), new),
        lengths=tuple(map(int, fact["lengths"])),
        room=fact["room"],
    )
