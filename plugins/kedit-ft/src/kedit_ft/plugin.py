"""Entry point of kedit-ft."""

from collections.abc import Iterable

from kedit_core import MethodSpec, hookimpl


@hookimpl
def kedit_register_methods() -> Iterable[MethodSpec]:
    common = {
        "target": "kedit_ft.method:FineTuning",
        "hparams": "kedit_ft.hparams:FineTuningHyperParams",
        "presets": "kedit_ft.presets",
        "effect": "weights",
        "max_batch": None,
        "needs": frozenset({"gradients"}),
    }
    return [
        MethodSpec(
            name="ft-m",
            summary="Fine-tuning of MLP matrices on the target's tokens.",
            paper="arXiv:2401.01286",
            defaults={"objective": "target"},
            **common,
        ),
        MethodSpec(
            name="ft-l",
            summary="Fine-tuning at the prompt's last token, each weight bound to a small range.",
            paper="arXiv:2012.00363",
            variant_of="ft-m",
            defaults={"objective": "prompt_last", "max_change": 5e-4},
            **common,
        ),
    ]
