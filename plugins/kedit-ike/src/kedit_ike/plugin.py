"""Entry point of kedit-ike."""

from collections.abc import Iterable

from kedit_core import EffectSpec, MethodSpec, hookimpl

INSTRUCTION = "Take the following new fact as true, and answer in agreement with it."


@hookimpl
def kedit_register_methods() -> Iterable[MethodSpec]:
    common = {
        "presets": "kedit_ike.presets",
        "effect": "calls",
        "max_batch": None,
        "removable": True,
        "paper": "arXiv:2305.12740",
    }
    return [
        MethodSpec(
            name="ike",
            target="kedit_ike.method:Ike",
            hparams="kedit_ike.hparams:IkeHyperParams",
            summary="The new fact before the question, after demonstrations of other edits.",
            **common,
        ),
        MethodSpec(
            name="ice",
            target="kedit_ike.method:InContext",
            hparams="kedit_ike.hparams:InContextHyperParams",
            summary="The new fact before the question.",
            variant_of="ike",
            **common,
        ),
        MethodSpec(
            name="prompt",
            target="kedit_ike.method:InContext",
            hparams="kedit_ike.hparams:InContextHyperParams",
            summary="The new fact before the question, after a sentence that asks to heed it.",
            variant_of="ike",
            defaults={"instruction": INSTRUCTION},
            **common,
        ),
    ]


@hookimpl
def kedit_register_effects() -> Iterable[EffectSpec]:
    return [
        EffectSpec(
            name="in-context",
            target="kedit_ike.memory:FactMemory",
            summary="Puts the stored fact that suits a prompt best before it.",
            kind="call",
        )
    ]
