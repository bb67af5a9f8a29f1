"""Entry point of kedit-alphaedit."""

from collections.abc import Iterable

from kedit_core import MethodSpec, hookimpl


@hookimpl
def kedit_register_methods() -> Iterable[MethodSpec]:
    return [
        MethodSpec(
            name="alphaedit",
            target="kedit_alphaedit.method:AlphaEdit",
            hparams="kedit_alphaedit.hparams:AlphaEditHyperParams",
            effect="weights",
            max_batch=None,
            needs=frozenset({"subject", "causal-model", "gradients"}),
            presets="kedit_alphaedit.presets",
            summary="Many facts, batch after batch, written where ordinary text reads little.",
            paper="arXiv:2410.02355",
        )
    ]
