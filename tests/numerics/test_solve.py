"""Closed forms against independent solutions."""

from __future__ import annotations

import logging
from math import inf

import pytest
import torch
from torch import Tensor

from kedit_core.errors import EditError
from kedit_core.numerics.ridge import inverse_by
from kedit_core.numerics.solve import cholesky, condition_of, rank_one_factors


def moment_of(width: int, samples: int, seed: int = 0) -> Tensor:
    keys = torch.randn(samples, width, generator=torch.Generator().manual_seed(seed))
    return keys.T @ keys / samples


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whitened(moment: Tensor, key: Tensor) -> Tensor:
    """C⁻¹ k."""
    return inverse_by(cholesky(moment))(key[:, None])[:, 0]


def constrained_least_squares(weight: Tensor, key: Tensor, value: Tensor, moment: Tensor) -> Tensor:
    """Minimise tr(ΔCΔᵀ) subject to (W + Δ) k = v by its KKT system, in float64.

    Each row of Δ is independent: [2C  k; kᵀ 0] [δ; μ] = [0; rᵢ].
    """
    m = len(key)
    system = torch.zeros(m + 1, m + 1, dtype=torch.float64)
    system[:m, :m] = 2 * moment.double()
    system[:m, m] = system[m, :m] = key.double()
    right = torch.zeros(m + 1, len(value), dtype=torch.float64)
    right[m] = value.double() - weight.double() @ key.double()
    return torch.linalg.solve(system, right)[:m].T


@pytest.mark.parametrize(("d_out", "d_in"), [(3, 5), (8, 8), (16, 4)])
def test_inserted_key_maps_to_its_value(d_out, d_in):
    weight, key, value = draw(d_out, d_in), draw(d_in, seed=2), draw(d_out, seed=3)

    direction = whitened(moment_of(d_in, 200), key)
    left, right = rank_one_factors(value - weight @ key, direction, key)

    assert left.shape == (d_out, 1)
    assert right.shape == (1, d_in)
    assert left.dtype == right.dtype == torch.float32
    torch.testing.assert_close((weight + left @ right) @ key, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d_in", [4, 12])
def test_update_is_the_one_that_disturbs_stored_associations_least(d_in):
    weight, key, value = draw(6, d_in), draw(d_in, seed=2), draw(6, seed=3)
    moment = moment_of(d_in, 300)

    left, right = rank_one_factors(value - weight @ key, whitened(moment, key), key)

    expected = constrained_least_squares(weight, key, value, moment)
    torch.testing.assert_close((left @ right).double(), expected, rtol=1e-4, atol=1e-6)


def test_without_moment_the_update_has_least_frobenius_norm():
    key, change = draw(7), draw(5, seed=2)

    left, right = rank_one_factors(change, key, key)

    torch.testing.assert_close(left @ right, change[:, None] @ key[None, :] / (key @ key))


def test_well_conditioned_moment_is_factored_as_it_is():
    moment = moment_of(8, 100).double()

    factor = cholesky(moment)

    torch.testing.assert_close(factor @ factor.mT, moment, rtol=1e-12, atol=1e-12)


def test_singular_moment_gets_the_least_ridge_that_suffices(caplog):
    basis = torch.linalg.qr(draw(6, 6).double()).Q
    moment = basis[:, :3] @ basis[:, :3].mT  # rank 3 of 6
    scale = moment.diagonal().mean()

    with caplog.at_level(logging.INFO, logger="kedit_core.numerics.solve"):
        factor = cholesky(moment - 1e-11 * torch.eye(6, dtype=torch.float64))

    ridge = (factor @ factor.mT - moment).diagonal().mean() + 1e-11
    assert float(ridge / scale) == pytest.approx(1e-10, rel=1e-3)
    assert "ridge of 1e-10" in caplog.text


def test_fewer_samples_than_dimensions_still_give_an_exact_update():
    weight, key, value = draw(4, 20), draw(20, seed=2), draw(4, seed=3)

    direction = whitened(moment_of(20, 5), key)
    left, right = rank_one_factors(value - weight @ key, direction, key)

    torch.testing.assert_close((weight + left @ right) @ key, value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("moment", "condition"),
    [
        (torch.full((3, 3), torch.nan), "inf"),
        (torch.diag(torch.tensor([1.0, torch.inf, 1.0])), "inf"),
        (torch.zeros(3, 3), "inf"),
        (torch.diag(torch.tensor([1.0, -1.0, 300.0])), "3e[+]02"),
        (-torch.eye(3), "1e[+]00"),
    ],
    ids=["nan", "inf", "zero", "indefinite", "negative"],
)
def test_what_is_no_second_moment_is_refused_with_its_condition(moment, condition):
    with pytest.raises(EditError, match=rf"not positive definite \(condition {condition}\)"):
        cholesky(moment)


@pytest.mark.parametrize(
    ("eigenvalues", "condition"),
    [((2.0, 0.5, 8.0), 16.0), ((1.0, -0.25, 1.0), 4.0), ((1.0, 0.0, 1.0), inf)],
)
def test_condition_is_the_ratio_of_the_extreme_eigenvalues(eigenvalues, condition):
    matrix = torch.diag(torch.tensor(eigenvalues, dtype=torch.float64))

    assert condition_of(matrix) == pytest.approx(condition)


def test_key_orthogonal_to_the_direction_is_refused():
    with pytest.raises(EditError, match="orthogonal"):
        rank_one_factors(torch.ones(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))


def test_mixed_keys_explode_where_one_key_in_both_places_does_not():
    # The subject is the first token: its plain key is almost orthogonal to its keys after texts.
    change, moment = draw(4), moment_of(16, 400)
    mean = draw(16, seed=2)
    plain = draw(16, seed=3)
    u = whitened(moment, mean).float()
    plain = plain - (plain @ u) / (u @ u) * u + 1e-4 * u / u.norm()

    mixed_left, mixed_right = rank_one_factors(change, u, plain)
    same = {
        name: rank_one_factors(change, whitened(moment, key), key)
        for name, key in {"context": mean, "prompt": plain}.items()
    }

    reference = float(change.norm())
    assert float((mixed_left @ mixed_right).norm()) > 1e3 * reference
    for left, right in same.values():
        assert float((left @ right).norm()) < 3 * reference
    for key in (mean, plain):
        assert float(key.double() @ whitened(moment, key)) > 0  # kᵀC⁻¹k
