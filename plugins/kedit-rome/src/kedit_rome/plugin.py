"""Entry point of kedit-rome."""

from collections.abc import Iterable

from kedit_core import MethodSpec, hookimpl


@hookimpl
def kedit_register_methods() -> Iterable[MethodSpec]:
    common = {
        "target": "kedit_rome.method:Rome",
        "hparams": "kedit_rome.hparams:RomeHyperParams",
        "presets": "kedit_rome.presets",
        "effect": "weights",
        "max_batch": 1,
        "needs": frozenset({"subject", "causal-model", "gradients"}),
    }
    return [
        MethodSpec(
            name="rome",
            summary="Rank-one insertion of one fact into one MLP matrix.",
            paper="arXiv:2202.05262",
            **common,
        ),
        MethodSpec(
            name="r-rome",
            summary="ROME with the same key in every place, for long sequences of edits.",
            paper="arXiv:2403.07175",
            variant_of="rome",
            defaults={"key": "context"},
            **common,
        ),
    ]
