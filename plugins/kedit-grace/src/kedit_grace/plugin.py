"""Entry point of kedit-grace."""

from collections.abc import Iterable

from kedit_core import EffectSpec, MethodSpec, hookimpl


@hookimpl
def kedit_register_methods() -> Iterable[MethodSpec]:
    return [
        MethodSpec(
            name="grace",
            target="kedit_grace.method:Grace",
            hparams="kedit_grace.hparams:GraceHyperParams",
            presets="kedit_grace.presets",
            effect="modules",
            max_batch=None,
            removable=True,
            needs=frozenset({"causal-model", "gradients"}),
            summary="A codebook beside one layer: learned values for known prompts, nothing else.",
            paper="arXiv:2211.11031",
        )
    ]


@hookimpl
def kedit_register_effects() -> Iterable[EffectSpec]:
    return [
        EffectSpec(
            name="codebook",
            target="kedit_grace.codebook:Codebook",
            summary="Writes a value where the prompt's key lies in one of its balls.",
            paper="arXiv:2211.11031",
        )
    ]
