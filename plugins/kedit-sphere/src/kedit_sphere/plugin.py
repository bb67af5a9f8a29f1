"""Entry point of kedit-sphere."""

from collections.abc import Iterable

from kedit_core import MethodSpec, hookimpl


@hookimpl
def kedit_register_methods() -> Iterable[MethodSpec]:
    return [
        MethodSpec(
            name="sphere",
            target="kedit_sphere.method:Sphere",
            hparams="kedit_sphere.hparams:SphereHyperParams",
            effect="weights",
            max_batch=None,
            needs=frozenset({"subject", "causal-model", "gradients"}),
            presets="kedit_sphere.presets",
            summary="AlphaEdit that keeps off the principal directions of each matrix's rows.",
            paper="arXiv:2510.01172",
        )
    ]
