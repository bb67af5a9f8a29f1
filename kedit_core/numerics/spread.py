"""Writing many facts into several layers, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kedit_core.editing import Patch, WeightDelta
from kedit_core.host import ModelHost
from kedit_core.job import EditJob
from kedit_core.numerics.facts import FactRows, mean_keys
from kedit_core.numerics.ridge import Constraint, Update, inverse_by, least_squares
from kedit_core.numerics.states import Side, states_at_marks, wide
from kedit_core.numerics.stats import moment_factors
from kedit_core.numerics.values import Value
from kedit_core.sites import Site
from kedit_core.targets import MomentHyperParams

Solver = Callable[[Site, Tensor, Tensor], Update]


@dataclass(frozen=True)
class Spread:
    """What writing the facts came to.

    Attributes:
        deltas: one of each layer.
        residuals: mean |R| at each layer, before it was shared out.
        conditions: of each layer's system.
        keys: of each matrix the facts' keys, (d_in, n).  They are those of the changed model too:
            nothing that a layer reads depends on its own change or a later layer's.
    """

    deltas: tuple[WeightDelta, ...]
    residuals: tuple[float, ...]
    conditions: tuple[float, ...]
    keys: Mapping[Site, Tensor]


def spread(
    host: ModelHost,
    layers: Sequence[int],
    facts: FactRows,
    targets: Tensor,
    solve: Solver,
    *,
    at: str,
    share: Literal["even", "root"] = "even",
    averaged: bool = False,
) -> Spread:
    """Change the MLP output matrices of some layers so that a module writes the targets.

    Layer by layer, ascending, on weights that are partly changed already (Meng et al. 2023,
    arXiv:2210.07229, algorithm 1): keys K of the layer, what is still missing at the module,

        R = (Z − H) / (layers left, this one too),

    and the solver's change for them.  The weights come back as they were.

    Args:
        host: a causal model.
        layers: ascending.
        facts: their rows.
        targets: Z, (d, n).
        solve: from site, K (d_in, n) and R (d, n) to the change.
        at: path of the module whose output should become Z.
        share: divide by the number of layers left, or by its square root (PMET).
        averaged: H is the mean over the rows after contexts, instead of the rows without
            (NAMET, arXiv:2505.11876v1).

    Raises:
        SiteError: a layer does not exist or has no single MLP output matrix.
    """
    sites = [host.mlp_out(layer) for layer in layers]
    deltas, residuals, conditions = [], [], []
    read: dict[Site, Tensor] = {}
    with host.scratch(*sites):
        for left, site in zip(range(len(sites), 0, -1), sites, strict=True):
            read[site] = keys = mean_keys(host, site.module, facts.rows)
            missing = targets.to(keys) - outputs(host, at, facts, averaged=averaged).to(keys)
            residuals.append(float(missing.norm(dim=0).mean()))
            update = solve(site, keys, missing / (left if share == "even" else left**0.5))
            deltas.append(add(host, site, update))
            conditions.append(update.condition)
    return Spread(tuple(deltas), tuple(residuals), tuple(conditions), read)


def by_least_squares(constraints: Mapping[Site, Constraint], ridge: float = 1.0) -> Solver:
    """The solver Δ = R (μI + Kᵀ A⁻¹ K)⁻¹ Kᵀ A⁻¹ with the A of each matrix.

    Args:
        constraints: A⁻¹ of each matrix.
        ridge: μ.
    """

    def solve(site: Site, keys: Tensor, residual: Tensor) -> Update:
        return least_squares(keys, residual, constraints[site].solve(keys), ridge)

    return solve


def by_moments(job: EditJob, hparams: MomentHyperParams) -> Solver:
    """The solver Δ = R Kᵀ (λC + K Kᵀ)⁻¹, with a λ for each layer.

    Raises:
        SiteError: a layer does not exist or has no single MLP output matrix.
        ArtifactError, EditError: as `moment_factors`.
    """
    return by_least_squares(moment_constraints(job, hparams, hparams.moment_weights))


def moment_constraints(
    job: EditJob,
    hparams: MomentHyperParams,
    weights: Sequence[float],
    earlier: Sequence[Patch] = (),
) -> dict[Site, Constraint]:
    """λC of the MLP output matrix of each layer, and the keys of earlier edits beside it.

    Args:
        job: gives what `moment_factors` asks for.
        hparams: layers and number of tokens.
        weights: λ of each layer.
        earlier: patches that left their keys in their state.

    Raises:
        SiteError: a layer does not exist or has no single MLP output matrix.
        ArtifactError, EditError: as `moment_factors` and `Constraint.after`.
    """
    sites = [job.host.mlp_out(layer) for layer in hparams.layers]
    factors = moment_factors(job, sites, hparams.moment_tokens)
    return {
        site: Constraint.after(inverse_by(factors[site], weight), len(factors[site]), earlier, site)
        for site, weight in zip(sites, weights, strict=True)
    }


def write_values(
    method: str,
    host: ModelHost,
    layers: Sequence[int],
    facts: FactRows,
    values: Sequence[Value],
    solve: Solver,
    *,
    at: str,
    share: Literal["even", "root"] = "even",
    averaged: bool = False,
    history: Mapping[Site, Constraint] | None = None,
) -> Patch:
    """The patch that `spread` makes of optimised values.

    Its notes tell how well they were reached: `nll` and `steps` of each fact, `residuals` and
    `conditions` of each layer; and the `contexts` of the facts.

    Args:
        method: its name.
        values: one of each fact.
        history: of each matrix the constraint in which the facts' keys count from now on; the
            patch's state has what `Constraint.after` reads.
        host, layers, facts, solve, at, share, averaged: as for `spread`.

    Raises:
        SiteError: as `spread`.
        EditError: a system is singular.
    """
    targets = torch.stack([value.target for value in values], dim=1)  # Z: (d, n)
    written = spread(host, layers, facts, targets, solve, at=at, share=share, averaged=averaged)
    state: dict[str, Tensor] = {}
    for site, constraint in (history or {}).items():
        state |= constraint.state(site, written.keys[site])
    notes = {
        "nll": [value.nll for value in values],
        "steps": [len(value.losses) for value in values],
        "residuals": list(written.residuals),
        "conditions": list(written.conditions),
        "contexts": list(facts.contexts),
    }
    return Patch(method, written.deltas, state=state, notes=notes)


def outputs(host: ModelHost, module: str, facts: FactRows, *, averaged: bool = False) -> Tensor:
    """What a module writes for each fact: (d, facts), float32 or wider.

    Args:
        host: a causal model.
        module: its path.
        facts: their rows.
        averaged: the mean over the rows after contexts, instead of the row without.
    """
    points: dict[str, tuple[str, Side]] = {"output": (module, "output")}
    if not averaged or len(facts.rows[0]) == 1:
        return wide(states_at_marks(host, facts.clean, points)["output"]).mT
    rows = [row for fact in facts.rows for row in fact[1:]]
    states = wide(states_at_marks(host, rows, points)["output"])
    sizes = [len(fact) - 1 for fact in facts.rows]
    return torch.stack([own.mean(dim=0) for own in states.split(sizes)], dim=1)


def add(host: ModelHost, site: Site, update: Update) -> WeightDelta:
    """Add a change to a matrix inside `host.scratch`, with factors in float32, and cast.

    Returns:
        The same for a patch, on the CPU.
    """
    weight = host.weight(site)
    left, right = update.left.float(), update.right.float()
    with torch.no_grad():
        old = wide(weight)
        weight.copy_(old + left.to(old) @ right.to(old))
    return WeightDelta.of_factors(site, left.cpu(), right.cpu())
