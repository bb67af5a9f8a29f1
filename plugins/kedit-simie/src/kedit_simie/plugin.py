"""Entry point of kedit-simie."""

from collections.abc import Iterable

from kedit_core import MethodSpec, hookimpl


@hookimpl
def kedit_register_methods() -> Iterable[MethodSpec]:
    return [
        MethodSpec(
            name="simie",
            target="kedit_simie.method:SimIE",
            hparams="kedit_simie.hparams:SimIEHyperParams",
            effect="weights",
            max_batch=1,
            needs=frozenset({"causal-model"}),
            presets="kedit_simie.presets",
            summary="Makes a sequence of another method's edits one least-squares solution.",
            paper="openreview:VdEG08ZJCH",
        )
    ]
