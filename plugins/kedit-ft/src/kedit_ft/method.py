"""Fine-tuning of MLP output matrices: FT-M and FT-L."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kedit_core.editing import EditJob, ModelHost, Patch, Site, WeightDelta
from kedit_core.errors import EditError
from kedit_core.numerics.losses import mean_nll
from kedit_core.numerics.tail import Tail
from kedit_core.tokens import Row, join
from kedit_ft.hparams import FineTuningHyperParams


class FineTuning:
    """Gradient descent on the MLP output matrices of a few blocks.

    FT-L is the bounded baseline of Zhu et al. 2020 (arXiv:2012.00363), FT-M the objective of
    Zhang et al. 2024 (arXiv:2401.01286).  Trained is the change ΔW beside the frozen weights, in
    float32, so that 16-bit weights lose nothing on the way.
    """

    def __init__(self, hparams: FineTuningHyperParams) -> None:
        self.hparams = hparams

    def edit(self, job: EditJob) -> Patch:
        """Train the changes on all requests together.

        Raises:
            SiteError: a layer does not exist or has no single MLP output matrix.
            EditError: the loss is not finite.
        """
        host, hparams = job.host, self.hparams
        layers = sorted(set(hparams.layers))
        sites = [host.mlp_out(layer) for layer in layers]
        changes = [torch.zeros_like(host.weight(s), dtype=torch.float32) for s in sites]
        for change in changes:
            change.requires_grad_(True)
        rows = [join(host, request.text, request.target_new) for request in job.requests]
        size = hparams.batch_size
        batches = [rows[n : n + size] for n in range(0, len(rows), size)]
        losses = [_loss(host, batch, layers[0], hparams.objective) for batch in batches]

        with _added(host, sites, changes):
            history = self._train(changes, losses)
        effects = tuple(
            WeightDelta(site, change.detach().cpu())
            for site, change in zip(sites, changes, strict=True)
        )
        return Patch("ft", effects, notes={"losses": history})

    def _train(self, changes: list[Tensor], losses: Sequence[Callable[[], Tensor]]) -> list[float]:
        """Adam over the batches until the mean loss is small; its history."""
        optimiser = torch.optim.Adam(changes, lr=self.hparams.lr)
        history: list[float] = []
        for step in range(self.hparams.steps):
            measured = []
            for loss_of_batch in losses:
                optimiser.zero_grad()
                loss = loss_of_batch()
                measured.append(float(loss.detach()))
                if not torch.isfinite(loss):
                    raise EditError(
                        f"The loss became {measured[-1]} in step {step}. Lower the learning rate, "
                        f"or load the model in float32."
                    )
                if measured[-1] >= self.hparams.stop_loss:
                    loss.backward()
                    optimiser.step()
                    self._bound(changes)
            history.append(sum(measured) / len(measured))
            if history[-1] < self.hparams.stop_loss:
                break
        return history

    @torch.no_grad()
    def _bound(self, changes: Sequence[Tensor]) -> None:
        bound = self.hparams.max_change
        if bound is not None:
            for change in changes:
                change.clamp_(-bound, bound)


def _loss(
    host: ModelHost, rows: Sequence[Row], first_layer: int, objective: str
) -> Callable[[], Tensor]:
    """The mean loss of some rows as a function of the changes in force.

    Changes of a matrix reach every token, so no token is fixed; blocks below are.
    """
    if objective == "target":
        tail = Tail(host, rows, first_layer, [0] * len(rows))
        return lambda: mean_nll(tail.logits(), tail.labels, tail.label_rows, len(rows)).mean()
    # All tokens of the target are asked for where the first one is predicted.
    first = [Row(row.prompt, row.targets[:1]) for row in rows]
    tail = Tail(host, first, first_layer, [0] * len(rows))
    owner = torch.tensor([n for n, row in enumerate(rows) for _ in row.targets])
    labels = torch.tensor([token for row in rows for token in row.targets])

    def loss() -> Tensor:
        logits = tail.logits()
        at = owner.to(logits.device)
        return mean_nll(logits[at], labels.to(logits.device), at, len(rows)).mean()

    return loss


@contextlib.contextmanager
def _added(host: ModelHost, sites: Sequence[Site], changes: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block each site's module computes with its change added to the weight."""

    def hook(change: Tensor) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + (args[0].float() @ change.mT).to(output.dtype)

        return add

    handles = [
        host.base_module(site.module).register_forward_hook(hook(change))
        for site, change in zip(sites, changes, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
