"""Entry point of kedit-decode."""

from collections.abc import Iterable

from kedit_core import EffectSpec, MethodSpec, hookimpl


@hookimpl
def kedit_register_methods() -> Iterable[MethodSpec]:
    common = {
        "presets": "kedit_decode.presets",
        "effect": "calls",
        "max_batch": None,
        "sequential": False,
        "removable": True,
        "writes_facts": False,
        "needs": frozenset({"causal-model"}),
    }
    return [
        MethodSpec(
            name="dola",
            target="kedit_decode.method:Dola",
            hparams="kedit_decode.hparams:DolaHyperParams",
            summary="Next tokens by what the last layer says beyond an early one.",
            paper="arXiv:2309.03883",
            **common,
        ),
        MethodSpec(
            name="deco",
            target="kedit_decode.method:Deco",
            hparams="kedit_decode.hparams:DecoHyperParams",
            summary="Next tokens with the logits of the layer that is surest of one of them.",
            paper="arXiv:2410.11779",
            **common,
        ),
    ]


@hookimpl
def kedit_register_effects() -> Iterable[EffectSpec]:
    return [
        EffectSpec(
            name="dola",
            target="kedit_decode.contrast:DolaLogits",
            summary="Log-probabilities less those of an early layer.",
            kind="call",
        ),
        EffectSpec(
            name="deco",
            target="kedit_decode.correct:DecoLogits",
            summary="Logits with those of an early layer added.",
            kind="call",
        ),
    ]
