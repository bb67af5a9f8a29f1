"""Entry point of kedit-lora."""

from collections.abc import Iterable

from kedit_core import EffectSpec, MethodSpec, hookimpl


@hookimpl
def kedit_register_effects() -> Iterable[EffectSpec]:
    return [
        EffectSpec(
            name="lora",
            target="kedit_lora.effect:LowRank",
            summary="Adds low-rank products to the output of a linear layer.",
            paper="arXiv:2106.09685",
        )
    ]


@hookimpl
def kedit_register_methods() -> Iterable[MethodSpec]:
    common = {
        "presets": "kedit_lora.presets",
        "effect": "modules",
        "max_batch": None,
        "removable": True,
        "needs": frozenset({"gradients"}),
    }
    return [
        MethodSpec(
            name="lora",
            target="kedit_lora.method:Lora",
            hparams="kedit_lora.hparams:LoraHyperParams",
            summary="A low-rank adapter for each edit, trained on the target's tokens.",
            paper="arXiv:2106.09685",
            **common,
        ),
        MethodSpec(
            name="adalora",
            target="kedit_lora.method:AdaLora",
            hparams="kedit_lora.hparams:AdaLoraHyperParams",
            summary="LoRA whose ranks go, while it trains, to the layers where they matter.",
            paper="arXiv:2303.10512",
            variant_of="lora",
            **common,
        ),
        MethodSpec(
            name="qlora",
            target="kedit_lora.method:QLora",
            hparams="kedit_lora.hparams:LoraHyperParams",
            summary="LoRA beside the 4-bit weights of a model that bitsandbytes quantised.",
            paper="arXiv:2305.14314",
            variant_of="lora",
            **common,
        ),
    ]
