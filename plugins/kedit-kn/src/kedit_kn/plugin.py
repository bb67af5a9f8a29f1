"""Entry point of kedit-kn."""

from collections.abc import Iterable

from kedit_core import MethodSpec, hookimpl


@hookimpl
def kedit_register_methods() -> Iterable[MethodSpec]:
    return [
        MethodSpec(
            name="kn",
            target="kedit_kn.method:KnowledgeNeurons",
            hparams="kedit_kn.hparams:KnHyperParams",
            presets="kedit_kn.presets",
            effect="weights",
            max_batch=1,
            needs=frozenset({"ground-truth", "gradients"}),
            summary="Rewrites the few MLP neurons that express the old answer.",
            paper="arXiv:2104.08696",
        )
    ]
