"""Entry point of kedit-core-edit."""

from collections.abc import Iterable

from kedit_core import MethodSpec, hookimpl


@hookimpl
def kedit_register_methods() -> Iterable[MethodSpec]:
    return [
        MethodSpec(
            name="core",
            target="kedit_core_edit.method:Core",
            hparams="kedit_core_edit.hparams:CoreHyperParams",
            effect="weights",
            max_batch=None,
            needs=frozenset({"subject", "ground-truth", "causal-model", "gradients"}),
            presets="kedit_core_edit.presets",
            summary="MEMIT with contexts made of the fact's own words, and like states after them.",
            paper="arXiv:2505.23026",
        )
    ]
