"""Fine-tuning of MLP output matrices: FT-M and FT-L."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kedit_core.editing import EditJob, ModelHost, Patch, Site, WeightDelta
from kedit_core.errors import EditError
from kedit_core.forward import added
from kedit_core.numerics.losses import mean_nll
from kedit_core.numerics.tail import Tail
from kedit_core.tokens import Row, join
from kedit_ft.hparams import FineTuningHyperParams


class FineTuning:
    """Gradient descent on the MLP output matrices of a few blocks, those of all experts where a
    block has routed ones.

    FT-L is the bounded baseline of Zhu et al. 2020 (arXiv:2012.00363), FT-M the objective of
    Zhang et al. 2024 (arXiv:2401.01286).  Trained is the change ΔW beside the frozen weights, in
    float32, so that 16-bit weights lose nothing on the way.
    """

    def __init__(self, hparams: FineTuningHyperParams) -> None:
        self.hparams = hparams

    def edit(self, job: EditJob) -> Patch:
        """Train the changes on all requests together.

        Raises:
            SiteError: a layer does not exist or has no MLP output matrix.
            EditError: the loss is not finite.
        """
        host, hparams = job.host, self.hparams
        layers = sorted(set(hparams.layers))
        sites = [site for layer in layers for site in _outputs(host, layer)]
        changes = [_zeros(host, site).requires_grad_(True) for site in sites]
        rows = [join(host, request.text, request.target_new) for request in job.requests]
        size = hparams.batch_size
        batches = [rows[n : n + size] for n in range(0, len(rows), size)]
        losses = [_loss(host, batch, layers[0], hparams.objective) for batch in batches]

        with _added(host, sites, changes):
            history = self._train(changes, losses)
        effects = tuple(
            delta
            for site, change in zip(sites, changes, strict=True)
            for delta in _deltas(site, change.detach().cpu())
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


def _outputs(host: ModelHost, layer: int) -> Sequence[Site]:
    """The MLP output matrix of a block, or the stacks of its experts' ones."""
    block = host.block(layer)
    return block.experts if block.mlp_out is None and block.experts else [host.mlp_out(layer)]


def _zeros(host: ModelHost, site: Site) -> Tensor:
    """(d_out, d_in), or a stack as it is stored: (experts, ·, ·)."""
    if host.stored(site).ndim == 2:
        return torch.zeros_like(host.weight(site), dtype=torch.float32)
    return torch.zeros_like(host.parameter(replace(site, expert=0)), dtype=torch.float32)


def _deltas(site: Site, change: Tensor) -> Iterator[WeightDelta]:
    """One for a matrix; of a stack one for each expert that has changed."""
    if change.ndim == 2:
        yield WeightDelta(site, change)
        return
    for expert, part in enumerate(change):
        if bool(part.any()):
            own = replace(site, expert=expert)
            yield WeightDelta(own, own.view(change))


class _Sum(nn.Module):
    """A stack of matrices with its change added."""

    def __init__(self, change: Tensor) -> None:
        super().__init__()
        self._change = change

    def forward(self, stack: Tensor) -> Tensor:
        return (stack.float() + self._change).to(stack.dtype)


@contextlib.contextmanager
def _added(host: ModelHost, sites: Sequence[Site], changes: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block each site's module computes with its change added to the weight."""
    with contextlib.ExitStack() as undo:
        for site, change in zip(sites, changes, strict=True):
            if change.ndim == 2:
                undo.enter_context(added(host, site, change))
            else:
                module, name = host.base_module(site.module), site.parameter.rpartition(".")[2]
                # torch sets the parameter to itself, which counts as a write.
                undo.enter_context(host.restoring([host.stored(site)]))
                parametrize.register_parametrization(module, name, _Sum(change))
                undo.callback(parametrize.remove_parametrizations, module, name, False)
        yield
