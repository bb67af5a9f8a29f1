"""Entry point of kedit-namet."""

from collections.abc import Iterable

from kedit_core import MethodSpec, hookimpl


@hookimpl
def kedit_register_methods() -> Iterable[MethodSpec]:
    return [
        MethodSpec(
            name="namet",
            target="kedit_namet.method:Namet",
            hparams="kedit_namet.hparams:NametHyperParams",
            effect="weights",
            max_batch=None,
            needs=frozenset({"subject", "causal-model", "gradients"}),
            presets="kedit_namet.presets",
            summary="MEMIT whose targets are to be met after other texts, not by the plain prompt.",
            paper="arXiv:2505.11876v1",
        )
    ]
