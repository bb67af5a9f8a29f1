"""UltraEdit: the algorithm from top to bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kedit_core.editing import EditJob, ModelHost, Patch, Site, WeightDelta
from kedit_core.errors import EditError, SiteError
from kedit_core.numerics.solve import condition_of
from kedit_core.tokens import join
from kedit_ultraedit.flow import Flow, flows
from kedit_ultraedit.hparams import Matrix, UltraEditHyperParams
from kedit_ultraedit.normaliser import Normaliser


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
            EditError: the loss is not finite, a system is not positive definite, or there is too
                little to normalise by.
        """
        host, hparams = job.host, self.hparams
        sites = chosen_sites(host, hparams.matrices)
        rows = [join(host, request.text, request.target_new) for request in job.requests]
        found, loss = flows(host, sites, rows, hparams.positions, hparams.batch_tokens)
        normalisers = updated(job.state, found)
        effects, conditions = [], []
        for site, flow in found.items():
            step = wanted_step(flow, normalisers[flow.shape], hparams.lr)
            left, right, condition = ridge_regression(flow.inputs, step, hparams.ridge)
            delta = (
                WeightDelta(site, left.float())
                if right is None
                else WeightDelta.of_factors(site, left.float(), right.float())
            )
            effects.append(delta.to(torch.device("cpu")))
            conditions.append(condition)
        if not any(bool(effect.left.any()) for effect in effects):
            raise EditError(
                "The first edit has one row to normalise by, which says nothing about its spread. "
                "Give several requests together, or choose more blocks."
            )
        state = {name: t for shape, n in normalisers.items() for name, t in n.stored(shape).items()}
        notes = {
            "nll": loss,
            "tokens": len(next(iter(found.values())).inputs),
            "condition_estimates": conditions,
        }
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
    elif kind == "experts_out":
        found = list(block.experts)
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


def updated(state: Mapping[str, Tensor], flows: Mapping[Site, Flow]) -> dict[str, Normaliser]:
    """The normalisers after these rows, one for all matrices of a shape."""
    normalisers: dict[str, Normaliser] = {}
    for flow in flows.values():
        new = Normaliser.of(flow.rows)
        before = normalisers.get(flow.shape) or Normaliser.restored(state, flow.shape)
        normalisers[flow.shape] = before.merged(new) if before else new
    return normalisers


def wanted_step(flow: Flow, normaliser: Normaliser, lr: float) -> Tensor:
    """V, how each output should change: v = −η ‖ĥ‖² ĝ, (T, d_out) in float64."""
    widths = [flow.inputs.shape[1], flow.gradients.shape[1]]
    h, g = normaliser.applied(flow.rows).split(widths, dim=1)
    return -lr * h.square().sum(1, keepdim=True) * g


def ridge_regression(
    inputs: Tensor, step: Tensor, ridge: float
) -> tuple[Tensor, Tensor | None, float]:
    """The change of a matrix that makes about this step for these inputs, and is small.

    Minimises ‖H ΔWᵀ − V‖² + λ ‖ΔW‖², of which the paper's is λ = 1:

        ΔWᵀ = (HᵀH + λI)⁻¹ Hᵀ V = Hᵀ (HHᵀ + λI)⁻¹ V

    The second form is solved where there are fewer rows than inputs.

    Args:
        inputs: H, (T, d_in), not normalised.
        step: V, (T, d_out).
        ridge: λ.

    Returns:
        Two factors of ΔW, (d_out, T) and (T, d_in), or of as many rows as inputs ΔW itself and
        None, in float64; and (max l / min l)² over the diagonal of the system's Cholesky factor,
        which the condition is never below (eigenvalues would cost more than the factor).

    Raises:
        EditError: the system is not positive definite; says its condition.
    """
    h, v = inputs.double(), step.double()
    rows, d_in = h.shape
    system = h @ h.mT if rows < d_in else h.mT @ h
    system = system + ridge * torch.eye(len(system), dtype=h.dtype, device=h.device)
    factor, failed = torch.linalg.cholesky_ex(system)
    if bool(failed):
        raise EditError(
            f"A system is not positive definite (condition {condition_of(system):.0e}): what the "
            f"matrix reads is too large beside `ridge` {ridge:g}, or not finite. Raise `ridge`, or "
            f"load the model in float32."
        )
    diagonal = factor.diagonal()
    condition = float((diagonal.max() / diagonal.min()).square())
    if rows < d_in:
        return torch.cholesky_solve(v, factor).mT, h, condition
    return torch.cholesky_solve(h.mT @ v, factor).mT, None, condition
