"""Entry point of kedit-eamet."""

from collections.abc import Iterable

from kedit_core import MethodSpec, hookimpl


@hookimpl
def kedit_register_methods() -> Iterable[MethodSpec]:
    return [
        MethodSpec(
            name="eamet",
            target="kedit_eamet.method:Eamet",
            hparams="kedit_eamet.hparams:EametHyperParams",
            effect="weights",
            max_batch=None,
            needs=frozenset({"subject", "causal-model", "gradients"}),
            presets="kedit_eamet.presets",
            summary="MEMIT whose targets lie to each other as the keys of their facts do.",
            paper="arXiv:2505.11876",
        )
    ]
