"""Entry point of kedit-ultraedit."""

from collections.abc import Iterable

from kedit_core import MethodSpec, hookimpl


@hookimpl
def kedit_register_methods() -> Iterable[MethodSpec]:
    return [
        MethodSpec(
            name="ultraedit",
            target="kedit_ultraedit.method:UltraEdit",
            hparams="kedit_ultraedit.hparams:UltraEditHyperParams",
            presets="kedit_ultraedit.presets",
            effect="weights",
            max_batch=None,
            needs=frozenset({"gradients"}),
            summary="One normalised gradient step by ridge regression, for very long sequences.",
            paper="arXiv:2505.14679",
        )
    ]
