"""UltraEdit: the algorithm from top to bottom."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kedit_core.editing import EditJob, ModelHost, Patch, Site, WeightDelta
from kedit_core.errors import EditError, SiteError
from kedit_core.forward import label_logits
from kedit_core.tokens import Batch, Row, buckets, join, pad
from kedit_ultraedit.hparams import Matrix, UltraEditHyperParams
from kedit_ultraedit.normaliser import Normaliser


@dataclass(frozen=True)
class Flow:
    """What went through one matrix at the positions that count.

    Attributes:
        inputs: H, (T, d_in), in the model's type.
        gradients: G, (T, d_out), of the loss with respect to the outputs.
    """

    inputs: Tensor
    gradients: Tensor


class UltraEdit:
    """One normalised gradient step, made by ridge regression (Gu et al. 2025, arXiv:2505.14679).

    Neither training nor a subject nor a corpus is needed: one backward pass gives, for each edited
    matrix, hidden states and gradients, and statistics that run through the whole sequence of
    edits make a step of them that fits any model.
    """

    def __init__(self, hparams: UltraEditHyperParams) -> None:
        self.hparams = hparams

    def edit(self, job: EditJob) -> Patch:
        """Compute one change of each matrix for all requests.

        Raises:
            SiteError: a matrix does not exist.
            EditError: the loss is not finite, or there is too little to normalise by.
        """
        host, hparams = job.host, self.hparams
        sites = chosen_sites(host, hparams.matrices)
        rows = [join(host, request.text, request.target_new) for request in job.requests]
        flows, loss = collect(host, sites, rows, hparams)
        normalisers = updated(job.state, flows)
        effects = []
        for site, flow in flows.items():
            step = wanted_step(flow, normalisers[shape_of(flow)], hparams.lr)
            left, right = ridge_regression(flow.inputs, step, hparams.ridge)
            effects.append(WeightDelta(site, left.cpu(), None if right is None else right.cpu()))
        if not any(bool(effect.left.any()) for effect in effects):
            raise EditError(
                "The first edit has one row to normalise by, which says nothing about its spread. "
                "Give several requests together, or choose more blocks."
            )
        state = {name: t for shape, n in normalisers.items() for name, t in n.stored(shape).items()}
        notes = {"nll": loss, "tokens": len(next(iter(flows.values())).inputs)}
        return Patch("ultraedit", tuple(effects), state={**job.state, **state}, notes=notes)


def chosen_sites(host: ModelHost, matrices: Mapping[Matrix, Sequence[int]]) -> list[Site]:
    """The matrices of the model that the settings name, each once, from the lowest block up.

    Raises:
        SiteError: a block does not exist or has no such matrix.
    """
    wanted = sorted((layer, kind) for kind, layers in matrices.items() for layer in layers)
    return list(dict.fromkeys(site for layer, kind in wanted for site in _sites(host, kind, layer)))


def _sites(host: ModelHost, kind: Matrix, layer: int) -> Sequence[Site]:
    block = host.block(layer)
    if kind == "mlp_out":
        return [host.mlp_out(layer)]
    if kind == "attention_out":
        found = [block.attention_out] if block.attention_out else []
    elif kind == "mlp_in":
        found = list(block.mlp_in)
    else:
        pair = block.mlp_in if len(block.mlp_in) == 2 else ()
        found = list(pair[:1] if kind == "gate" else pair[1:])
    if not found:
        raise SiteError(
            f"Block {layer} of {host.name} has no matrix `{kind}`. Name one that `kedit inspect` "
            f"shows for it in `matrices`."
        )
    return found


def collect(
    host: ModelHost, sites: Sequence[Site], rows: Sequence[Row], hparams: UltraEditHyperParams
) -> tuple[dict[Site, Flow], float]:
    """Hidden states and gradients of every matrix, and the mean loss of a target token.

    Each token's loss counts fully, however many requests share a pass, so that neither that nor
    the size of a batch of edits changes a gradient.  The authors take means over ten requests;
    the normalisation takes the difference out.

    Raises:
        EditError: the loss is not finite.
    """
    inputs: dict[Site, list[Tensor]] = defaultdict(list)
    gradients: dict[Site, list[Tensor]] = defaultdict(list)
    total = 0.0
    lengths = [len(row.prompt) + len(row.targets) for row in rows]
    for group in buckets(lengths, hparams.batch_tokens):
        batch = pad(host, [rows[n] for n in group])
        at = _positions(batch, hparams.positions)
        with _watched(host, sites) as (seen, zeros):
            logits = label_logits(host, batch)
            loss = cross_entropy(logits.float(), batch.labels.to(logits.device), reduction="sum")
            found = torch.autograd.grad(loss, [zeros[site] for site in sites])
        total += float(loss.detach())
        for site, gradient in zip(sites, found, strict=True):
            inputs[site].append(_picked(seen[site], len(group), at))
            gradients[site].append(_picked(gradient, len(group), at))
    mean = total / sum(len(row.targets) for row in rows)
    if not torch.isfinite(torch.tensor(mean)):
        raise EditError(f"The loss of the targets is {mean}. Load the model in float32.")
    return {site: Flow(torch.cat(inputs[site]), torch.cat(gradients[site])) for site in sites}, mean


def _positions(batch: Batch, which: str) -> tuple[Tensor, Tensor]:
    """Rows and columns of what counts, in what the decoder reads."""
    if which == "target":
        return batch.rows, batch.columns
    inputs = batch.inputs
    mask = inputs.get("decoder_attention_mask", inputs["attention_mask"])
    rows, columns = mask.nonzero(as_tuple=True)
    return rows, columns


def _picked(states: Tensor, n_rows: int, at: tuple[Tensor, Tensor]) -> Tensor:
    rows, columns = (index.to(states.device) for index in at)
    return states.reshape(n_rows, -1, states.shape[-1])[rows, columns]  # OPT flattens rows


@contextlib.contextmanager
def _watched(
    host: ModelHost, sites: Sequence[Site]
) -> Iterator[tuple[dict[Site, Tensor], dict[Site, Tensor]]]:
    """Inside the block a zero is added to each matrix's output; both inputs and zeros are kept.

    The loss differentiated by a zero is its gradient with respect to that output.  The weights
    are frozen, so nothing below the lowest of these modules enters the graph.
    """
    inputs: dict[Site, Tensor] = {}
    zeros: dict[Site, Tensor] = {}

    def hook(site: Site):
        def watch(module, args, output: Tensor) -> Tensor:
            inputs[site] = args[0].detach()
            zeros[site] = torch.zeros_like(output, requires_grad=True)
            return output + zeros[site]

        return watch

    with contextlib.ExitStack() as stack:
        for site in sites:
            handle = host.base_module(site.module).register_forward_hook(hook(site))
            stack.callback(handle.remove)
        yield inputs, zeros


def shape_of(flow: Flow) -> str:
    """Name of a matrix's shape, under which its normaliser is kept: "d_out x d_in"."""
    return f"{flow.gradients.shape[1]}x{flow.inputs.shape[1]}"


def updated(state: Mapping[str, Tensor], flows: Mapping[Site, Flow]) -> dict[str, Normaliser]:
    """The normalisers after these rows, one for all matrices of a shape."""
    normalisers: dict[str, Normaliser] = {}
    for flow in flows.values():
        shape = shape_of(flow)
        new = Normaliser.of(torch.cat([flow.inputs.double(), flow.gradients.double()], 1))
        before = normalisers.get(shape) or Normaliser.restored(state, shape)
        normalisers[shape] = before.merged(new) if before else new
    return normalisers


def wanted_step(flow: Flow, normaliser: Normaliser, lr: float) -> Tensor:
    """V, how each output should change: v = −η ‖ĥ‖² ĝ, (T, d_out) in float64."""
    rows = torch.cat([flow.inputs.double(), flow.gradients.double()], 1)
    h, g = normaliser.applied(rows).split([flow.inputs.shape[1], flow.gradients.shape[1]], 1)
    return -lr * h.square().sum(1, keepdim=True) * g


def ridge_regression(inputs: Tensor, step: Tensor, ridge: float) -> tuple[Tensor, Tensor | None]:
    """The change of a matrix that makes about this step for these inputs, and is small.

    Minimises ‖H ΔWᵀ − V‖² + λ ‖ΔW‖², of which the paper's is λ = 1:

        ΔWᵀ = (HᵀH + λI)⁻¹ Hᵀ V = Hᵀ (HHᵀ + λI)⁻¹ V

    The second form is solved where there are fewer rows than inputs.

    Args:
        inputs: H, (T, d_in), not normalised.
        step: V, (T, d_out).
        ridge: λ.

    Returns:
        left (d_out, T) and right (T, d_in), or, where that is no larger, ΔW (d_out, d_in) and
        None; in float32.
    """
    h, v = inputs.double(), step.double()
    rows, d_in = h.shape
    if rows < d_in:
        gram = h @ h.mT + ridge * torch.eye(rows, dtype=h.dtype, device=h.device)
        left = torch.cholesky_solve(v, torch.linalg.cholesky(gram)).mT
        if rows * (d_in + len(left)) < d_in * len(left):
            return left.float(), h.float()
        return (left @ h).float(), None
    moment = h.mT @ h + ridge * torch.eye(d_in, dtype=h.dtype, device=h.device)
    return torch.cholesky_solve(h.mT @ v, torch.linalg.cholesky(moment)).mT.float(), None
