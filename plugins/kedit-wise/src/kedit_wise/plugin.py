"""Entry point of kedit-wise."""

from collections.abc import Iterable

from kedit_core import EffectSpec, MethodSpec, hookimpl


@hookimpl
def kedit_register_methods() -> Iterable[MethodSpec]:
    common = {
        "target": "kedit_wise.method:Wise",
        "hparams": "kedit_wise.hparams:WiseHyperParams",
        "presets": "kedit_wise.presets",
        "paper": "arXiv:2405.14768",
        "effect": "modules",
        "max_batch": 1,
        "removable": True,
        "needs": frozenset({"causal-model", "gradients"}),
    }
    return [
        MethodSpec(
            name="wise",
            summary="Lifelong edits in side memories; each prompt asks the one it stirs most.",
            defaults={"retrieve": True},
            **common,
        ),
        MethodSpec(
            name="wise-merge",
            summary="Lifelong edits merged into one side memory beside one MLP matrix.",
            variant_of="wise",
            defaults={"retrieve": False},
            **common,
        ),
    ]


@hookimpl
def kedit_register_effects() -> Iterable[EffectSpec]:
    return [
        EffectSpec(
            name="wise",
            target="kedit_wise.memory:SideMemory",
            summary="Changes of one matrix, each in force for the prompts that stir it.",
            paper="arXiv:2405.14768",
        )
    ]
