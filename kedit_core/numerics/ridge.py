"""Least squares with many keys at once, from what is already known of A₀⁻¹.

All closed forms of the family are one problem: of all Δ the one that least disturbs what a matrix
stores, and moves the outputs for the columns of K by R,

    minimise ‖Δ K − R‖² + tr(Δ A Δᵀ),    Δ = R (I + Kᵀ A⁻¹ K)⁻¹ Kᵀ A⁻¹

A system as large as the number of facts is solved, not one as wide as the matrix, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_core.errors import EditError
from kedit_core.numerics.solve import condition_of
from kedit_core.patch import Patch
from kedit_core.sites import Site

Inverse = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Update:
    """A change of a matrix in factors, and how well the system behind it could be solved.

    Attributes:
        left: (d_out, n), float64.
        right: (n, d_in), float64.
        condition: of the n × n system.
    """

    left: Tensor
    right: Tensor
    condition: float


def inverse_by(factor: Tensor, weight: float = 1.0) -> Inverse:
    """K ↦ (λ L Lᵀ)⁻¹ K.

    Args:
        factor: L, (m, m), lower triangular.
        weight: λ.
    """

    def apply(keys: Tensor) -> Tensor:
        return torch.cholesky_solve(keys.double(), factor.to(keys.device).double()) / weight

    return apply


def least_squares(keys: Tensor, residual: Tensor, solved: Tensor, ridge: float = 1.0) -> Update:
    """Δ = R (μI + Kᵀ A⁻¹ K)⁻¹ Kᵀ A⁻¹.

    With μ = 1 the problem above; with μ → 0 the equality Δ K = R, of which ROME's update is the
    case of one key (EMMET, Gupta et al. 2024, arXiv:2403.14236, eq. 12).

    Args:
        keys: K, (m, n).
        residual: R, (d, n).
        solved: A⁻¹ K, (m, n).
        ridge: μ, not negative.

    Raises:
        EditError: the system is singular; says its condition.
    """
    k, r, y = keys.double(), residual.double(), solved.double()
    gram = k.mT @ y
    gram = (gram + gram.mT) / 2 + ridge * torch.eye(len(gram), dtype=k.dtype, device=k.device)
    if not bool(torch.isfinite(gram).all()):
        raise EditError(
            "Keys or statistics are not finite. Load the model in float32, and collect the "
            "statistics again with `kedit prepare`."
        )
    eigenvalues = torch.linalg.eigvalsh(gram)
    condition = float(eigenvalues[-1] / eigenvalues[0].clamp(min=1e-300))
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed) or condition > 1e14:
        raise EditError(
            f"The {len(gram)} keys are not independent (condition {condition:.0e}), so that not "
            f"all facts can be written exactly. Take out facts that stand twice, or use a ridge."
        )
    left = torch.cholesky_solve(r.mT, factor).mT
    return Update(left, y.mT, condition)


@dataclass(frozen=True)
class Constraint:
    """A⁻¹ for A = A₀ + K_s K_sᵀ, where the keys K_s of earlier edits become more and more.

    By Woodbury's identity with a Cholesky factor that grows by rows,

        A⁻¹ K = Y − Y_s (I + K_sᵀ Y_s)⁻¹ K_sᵀ Y,    Y = A₀⁻¹ K,  Y_s = A₀⁻¹ K_s

    so that no m × m matrix is inverted or kept for the sake of earlier edits as long as they have
    fewer than m keys.  Once there are m, the next edit keeps A⁻¹ itself.  It takes the place of
    A₀⁻¹, and K_s begins anew, so that a solve takes no longer however many edits there were.

    Attributes:
        base: K ↦ A₀⁻¹ K.
        keys: K_s, (m, N), float64.
        solved: Y_s, (m, N), float64.
        factor: L with L Lᵀ = I + K_sᵀ Y_s, (N, N), float64.
    """

    base: Inverse
    keys: Tensor
    solved: Tensor
    factor: Tensor

    @classmethod
    def of(
        cls, base: Inverse, width: int, parts: Sequence[Mapping[str, Tensor]] = ()
    ) -> Constraint:
        """From what `part` gave for each earlier edit, oldest first.

        Args:
            base: K ↦ A₀⁻¹ K.
            width: m.
            parts: for each edit `keys` (m, n), `solved` (m, n) and `factor` (n, N), or `inverse`.
        """
        whole = [n for n, part in enumerate(parts) if "inverse" in part]
        if whole:
            base, parts = _product_with(parts[whole[-1]]["inverse"]), parts[whole[-1] + 1 :]
        empty = torch.zeros(width, 0, dtype=torch.float64)
        keys = torch.cat([empty, *(part["keys"].double() for part in parts)], dim=1)
        solved = torch.cat([empty, *(part["solved"].double() for part in parts)], dim=1)
        factor = torch.zeros(keys.shape[1], keys.shape[1], dtype=torch.float64)
        row = 0
        for part in parts:
            height, length = part["factor"].shape
            factor[row : row + height, :length] = part["factor"]
            row += height
        return cls(base, keys, solved, factor)

    def solve(self, keys: Tensor) -> Tensor:
        """A⁻¹ K: (m, n), float64.

        Args:
            keys: K, (m, n).
        """
        y = self.base(keys.double())
        if not self.keys.shape[1]:
            return y
        own = self._on(y.device)
        return y - own.solved @ torch.cholesky_solve(own.keys.mT @ y, own.factor)

    def part(self, keys: Tensor) -> dict[str, Tensor]:
        """What one more edit adds: its keys, solved keys and rows of the factor.

        After m earlier keys it is the `inverse` A⁻¹ with its own keys, (m, m), float64.

        Args:
            keys: K, (m, n).

        Raises:
            EditError: the factor cannot grow by them; says the condition of what is to be factored.
        """
        own = self._on(keys.device)
        k = keys.float().double()  # as it is kept, so that the factor belongs to it
        y = self.base(k).float().double()
        beside = torch.linalg.solve_triangular(own.factor, own.keys.mT @ y, upper=False)  # (N, n)
        gram = k.mT @ y
        rest = (gram + gram.mT) / 2 - beside.mT @ beside
        rest = rest + torch.eye(len(rest), dtype=k.dtype, device=k.device)
        corner, failed = torch.linalg.cholesky_ex(rest)
        if bool(failed):
            raise EditError(
                f"The {len(rest)} keys of this edit cannot join those of earlier edits: their "
                f"system is not positive definite (condition {condition_of(rest):.0e}). Raise the "
                f"weight of what is stored (`moment_weight` or `l2`), or load the model in float32."
            )
        rows = torch.cat([beside.mT, corner], dim=1)
        if own.keys.shape[1] < len(k):
            return {"keys": k.float(), "solved": y.float(), "factor": rows}
        above = torch.nn.functional.pad(own.factor, (0, k.shape[1]))
        joined, solved = torch.cat([own.keys, k], dim=1), torch.cat([own.solved, y], dim=1)
        grown = Constraint(self.base, joined, solved, torch.cat([above, rows]))
        inverse = grown.solve(torch.eye(len(k), device=k.device))
        return {"inverse": (inverse + inverse.mT) / 2}

    @classmethod
    def after(cls, base: Inverse, width: int, earlier: Sequence[Patch], site: Site) -> Constraint:
        """With the keys that earlier patches left in their state for this matrix.

        Raises:
            EditError: they were computed with another A₀.
        """
        prefix = f"{site.parameter}:"
        states = (
            {name.removeprefix(prefix): t for name, t in p.state.items() if name.startswith(prefix)}
            for p in earlier
        )
        parts = [state for state in states if state]
        if parts and "keys" in parts[0]:  # a patch that was loaded alone may hold an inverse
            key, solved = (parts[0][name][:, :1].double() for name in ("keys", "solved"))
            if float((base(key) - solved).norm()) > 1e-3 * float(solved.norm()):
                raise EditError(
                    f"Earlier edits of {site.parameter} in this session were made with another "
                    f"weight or other statistics. Use the same settings and corpus for all edits "
                    f"of a session, or roll back."
                )
        return cls.of(base, width, parts)

    def state(self, site: Site, keys: Tensor) -> dict[str, Tensor]:
        """`part`, named for a patch's state, where `after` finds it."""
        return {f"{site.parameter}:{name}": t.cpu() for name, t in self.part(keys).items()}

    def _on(self, device: torch.device) -> Constraint:
        moved = (t.to(device) for t in (self.keys, self.solved, self.factor))
        return Constraint(self.base, *moved)


def _product_with(inverse: Tensor) -> Inverse:
    return lambda keys: inverse.to(keys.device) @ keys
