"""Registers the effect types of `kedit_core.testing.effects`."""

from collections.abc import Iterable

from kedit_core import EffectSpec, hookimpl


@hookimpl
def kedit_register_effects() -> Iterable[EffectSpec]:
    here = "kedit_core.testing.effects"
    return [
        EffectSpec("shift", f"{here}:Shift", "Adds a vector to a module's output."),
        EffectSpec("preface", f"{here}:Preface", "Puts a text before prompts.", kind="call"),
        EffectSpec("token-bias", f"{here}:TokenBias", "Adds a vector to logits.", kind="call"),
    ]
