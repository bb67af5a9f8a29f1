"""The smallest effect of each kind, for tests of the session and as examples for authors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kedit_core.effects import CallEffect, Middleware, ModuleSwap, Wrapper
from kedit_core.errors import PatchError
from kedit_core.probing import hidden_of, with_hidden


class Shift(Wrapper):
    """Adds a constant vector to a module's output.  State: `vector` (d_out,)."""

    vector: Tensor

    @classmethod
    def build(cls, base: nn.Module, swaps: Sequence[ModuleSwap]) -> Shift:
        wrapper = cls(base)
        vectors = torch.stack([swap.state["vector"] for swap in swaps])
        wrapper.register_buffer("vector", vectors.sum(0), persistent=False)
        return wrapper

    @classmethod
    def fold(cls, base: nn.Module, swap: ModuleSwap) -> tuple[Tensor, Tensor | None]:
        raise PatchError("A shift of a module's output is no change of its weight matrix.")

    def change(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_of(output)
        return with_hidden(output, hidden + self.vector.to(hidden))


@dataclass(frozen=True)
class Preface(Middleware):
    """Puts texts before every prompt, the latest first.  Config: `text`."""

    text: str

    @classmethod
    def build(cls, calls: Sequence[CallEffect]) -> Preface:
        return cls("".join(str(call.config["text"]) for call in reversed(calls)))

    def prompts(self, prompts: Sequence[str]) -> list[str]:
        return [self.text + prompt for prompt in prompts]


@dataclass(frozen=True)
class TokenBias(Middleware):
    """Adds a constant to the logits; state: `bias` (vocabulary,)."""

    bias: Tensor

    @classmethod
    def build(cls, calls: Sequence[CallEffect]) -> TokenBias:
        return cls(torch.stack([call.state["bias"] for call in calls]).sum(0))

    def logits(self, logits: Tensor, early: Mapping[int, Tensor]) -> Tensor:
        return logits + self.bias.to(logits)
