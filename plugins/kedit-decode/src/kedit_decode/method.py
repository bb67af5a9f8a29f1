"""DoLa and DeCo: which early layers are read; nothing is computed before a question is asked."""

from __future__ import annotations

from kedit_core.editing import CallEffect, EditJob, ModelHost, Patch
from kedit_core.errors import SiteError
from kedit_decode.hparams import DecoHyperParams, DolaHyperParams


class Dola:
    """Decoding by contrasting layers, Chuang et al. 2023 (arXiv:2309.03883)."""

    def __init__(self, hparams: DolaHyperParams) -> None:
        self.hparams = hparams

    def edit(self, job: EditJob) -> Patch:
        """The layers to contrast; requests are not needed.

        Raises:
            SiteError: there is no such layer.
        """
        config = {
            "depths": _checked(job.host, _dola_depths(job.host, self.hparams)),
            "relative_top": self.hparams.relative_top,
        }
        return Patch("dola", (CallEffect("dola", config),))


class Deco:
    """Dynamic correction decoding, Wang et al. 2024 (arXiv:2410.11779)."""

    def __init__(self, hparams: DecoHyperParams) -> None:
        self.hparams = hparams

    def edit(self, job: EditJob) -> Patch:
        """The layers to add; requests are not needed.

        Raises:
            SiteError: there is no such layer.
        """
        hparams, blocks = self.hparams, len(job.host.blocks)
        depths = hparams.layers
        if depths is None:
            depths = tuple(range(round(hparams.first * blocks), round(hparams.last * blocks) + 1))
        config = {
            "depths": _checked(job.host, [d for d in depths if hparams.layers or d < blocks]),
            "alpha": hparams.alpha,
            "top_p": hparams.top_p,
            "top_k": hparams.top_k,
        }
        return Patch("deco", (CallEffect("deco", config),))


def _dola_depths(host: ModelHost, hparams: DolaHyperParams) -> list[int]:
    """The published choice: every second layer of one half, of 20 in models of over 40 blocks.

    Where the head is the transposed embedding, layer 0 would only repeat the token just read.
    """
    if not isinstance(hparams.layers, str):
        return list(hparams.layers)
    blocks = len(host.blocks)
    if hparams.layers == "high":
        return list(range(blocks // 2 if blocks <= 40 else blocks - 20, blocks, 2))
    start = min(2, blocks - 1) if host.anatomy.tied else 0
    return list(range(start, blocks // 2 if blocks <= 40 else 20, 2)) or [start]


def _checked(host: ModelHost, depths: list[int]) -> list[int]:
    blocks = len(host.blocks)
    for depth in depths:
        if depth >= blocks:
            raise SiteError(
                f"Layer {depth} is no early layer of {host.name}: it has {blocks} blocks, so give "
                f"0 to {blocks - 1} in `layers`."
            )
    return sorted(set(depths))
