"""The smallest effect of each kind, for tests of the session and as examples for authors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kedit_core.effects import Wrapper
from kedit_core.errors import PatchError
from kedit_core.probing import hidden_of, with_hidden


class Shift(Wrapper):
    """Adds a constant vector to a module's output.  State: `vector` (d_out,)."""

    vector: Tensor

    @classmethod
    def build(
        cls, base: nn.Module, config: Mapping[str, Any], state: Mapping[str, Tensor]
    ) -> Shift:
        wrapper = cls(base)
        wrapper.register_buffer("vector", state["vector"].clone(), persistent=False)
        return wrapper

    @classmethod
    def fold(
        cls, base: nn.Module, config: Mapping[str, Any], state: Mapping[str, Tensor]
    ) -> Tensor:
        raise PatchError("A shift of a module's output is no change of its weight matrix.")

    def change(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_of(output)
        return with_hidden(output, hidden + self.vector.to(hidden))


@dataclass(frozen=True)
class Preface:
    """Puts a text before every prompt.  Config: `text`."""

    text: str

    @classmethod
    def build(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Preface:
        return cls(str(config["text"]))

    def prompt(self, prompt: str) -> str:
        return self.text + prompt

    def logits(self, logits: Tensor) -> Tensor:
        return logits


@dataclass(frozen=True)
class TokenBias:
    """Adds a constant to the logits; state: `bias` (vocabulary,)."""

    bias: Tensor

    @classmethod
    def build(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> TokenBias:
        return cls(state["bias"])

    def prompt(self, prompt: str) -> str:
        return prompt

    def logits(self, logits: Tensor) -> Tensor:
        return logits + self.bias.to(logits)
