"""Entry point of kedit-memit."""

from collections.abc import Iterable

from kedit_core import MethodSpec, hookimpl


@hookimpl
def kedit_register_methods() -> Iterable[MethodSpec]:
    common = {
        "presets": "kedit_memit.presets",
        "effect": "weights",
        "max_batch": None,
        "needs": frozenset({"subject", "causal-model", "gradients"}),
    }
    return [
        MethodSpec(
            name="memit",
            target="kedit_memit.method:Memit",
            hparams="kedit_memit.hparams:MemitHyperParams",
            summary="Many facts at once, spread by least squares over several MLP matrices.",
            paper="arXiv:2210.07229",
            **common,
        ),
        MethodSpec(
            name="pmet",
            target="kedit_memit.method:Pmet",
            hparams="kedit_memit.hparams:PmetHyperParams",
            summary="MEMIT with targets of attention and MLP, of which the MLP's are written.",
            paper="arXiv:2308.08742",
            **common,
        ),
        MethodSpec(
            name="emmet",
            target="kedit_memit.method:Emmet",
            hparams="kedit_memit.hparams:EmmetHyperParams",
            summary="ROME's constraint for many facts at once, in one MLP matrix.",
            paper="arXiv:2403.14236",
            **common,
        ),
    ]
