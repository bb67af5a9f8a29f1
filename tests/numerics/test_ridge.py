"""Least squares in the space of the facts, against systems as wide as the matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kedit_core.errors import EditError
from kedit_core.numerics.ridge import Constraint, inverse_by, least_squares
from kedit_core.numerics.solve import cholesky, rank_one_factors
from kedit_core.patch import Patch
from kedit_core.sites import Site

WIDTH, D_OUT = 24, 7


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(width: int = WIDTH) -> Tensor:
    samples = draw(width, 3 * width, seed=9)
    return samples @ samples.mT / samples.shape[1]


def direct(keys: Tensor, residual: Tensor, a: Tensor) -> Tensor:
    """Δ = R Kᵀ (K Kᵀ + A)⁻¹ by a general solver: (d_out, m)."""
    return torch.linalg.solve(keys @ keys.mT + a, keys @ residual.mT).mT


def product(update) -> Tensor:
    return update.left.double() @ update.right.double()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("facts", [1, 5, WIDTH, 40])
@pytest.mark.parametrize("weight", [0.5, 200.0])
def test_space_of_facts_gives_what_the_wide_system_gives(facts, weight):
    keys, residual, c = draw(WIDTH, facts, seed=1), draw(D_OUT, facts, seed=2), moment()

    update = least_squares(keys, residual, inverse_by(cholesky(c), weight)(keys))

    expected = direct(keys, residual, weight * c)
    assert_close(product(update), expected)
    # The normal equation: Δ (λC + K Kᵀ) = R Kᵀ.
    left = product(update) @ (weight * c + keys @ keys.mT)
    assert_close(left, residual @ keys.mT)


@pytest.mark.parametrize("ridge", [0.1, 3.0])
def test_relaxed_equality_is_least_squares_with_the_product_of_both_weights(ridge):
    keys, residual, c = draw(WIDTH, 6, seed=1), draw(D_OUT, 6, seed=2), moment()

    relaxed = least_squares(keys, residual, inverse_by(cholesky(c), 20.0)(keys), ridge)

    weighted = least_squares(keys, residual, inverse_by(cholesky(c), 20.0 * ridge)(keys))
    assert_close(product(relaxed), product(weighted))


def test_without_a_ridge_every_key_is_mapped_exactly():
    keys, residual, c = draw(WIDTH, 6, seed=1), draw(D_OUT, 6, seed=2), moment()

    update = least_squares(keys, residual, inverse_by(cholesky(c))(keys), ridge=0.0)

    assert_close(product(update) @ keys, residual)


@pytest.mark.parametrize("c", [moment(), torch.eye(WIDTH).double()], ids=["moment", "identity"])
def test_without_a_ridge_one_key_gives_the_rank_one_update(c):
    key, change = draw(WIDTH, seed=1), draw(D_OUT, seed=2)

    direction = inverse_by(cholesky(c))(key[:, None])

    update = least_squares(key[:, None], change[:, None], direction, ridge=0.0)

    left, right = rank_one_factors(change, direction[:, 0], key)
    assert_close(product(update), left.double() @ right.double(), 1e-6)  # which is float32


def test_keys_that_stand_twice_are_solved_with_a_ridge_and_refused_without():
    keys, c = draw(WIDTH, 3, seed=1), moment()
    keys, residual = torch.cat([keys, keys[:, :1]], dim=1), draw(D_OUT, 4, seed=2)
    solved = inverse_by(cholesky(c), 10.0)(keys)

    update = least_squares(keys, residual, solved)

    assert_close(product(update), direct(keys, residual, 10 * c))
    assert float(product(update).norm()) < 10 * float(residual.norm())
    with pytest.raises(EditError, match=r"4 keys are not independent \(condition"):
        least_squares(keys, residual, solved, ridge=0.0)


def test_condition_is_that_of_the_system():
    keys, residual = torch.diag(torch.tensor([1.0, 3.0])).double(), draw(D_OUT, 2)

    update = least_squares(keys, residual, keys, ridge=1.0)  # I + KᵀK = diag(2, 10)

    assert update.condition == pytest.approx(5.0)


def test_keys_that_are_no_numbers_are_refused():
    keys = draw(WIDTH, 2)
    keys[0, 0] = torch.inf

    with pytest.raises(EditError, match="not finite"):
        least_squares(keys, draw(D_OUT, 2), keys)


def test_constraint_that_grows_equals_the_sum_of_all_earlier_keys():
    base, weight = moment(), 4.0
    inverse = inverse_by(cholesky(base), weight)
    a, parts = weight * base, []
    for batch in range(12):
        keys = draw(WIDTH, 3 + batch, seed=20 + batch).float()
        constraint = Constraint.of(inverse, WIDTH, parts)
        solved = constraint.solve(keys)
        # Keys are kept in float32.
        assert_close(solved, torch.linalg.solve(a, keys.double()), 1e-6)
        assert constraint.keys.shape[1] < WIDTH + 14  # however many there were: 88 at the end
        parts.append(constraint.part(keys))
        a = a + keys.double() @ keys.double().mT


def test_an_inverse_takes_the_place_of_as_many_keys_as_the_matrix_is_wide():
    keys = [draw(WIDTH, 8, seed=n).float().double() for n in range(5)]
    parts: list[dict[str, Tensor]] = []
    for own in keys[:4]:
        parts.append(Constraint.of(lambda k: k / 4, WIDTH, parts).part(own))  # exact in float32
    all_keys = torch.cat(keys[:4], dim=1)

    assert [sorted(part) for part in parts] == [["factor", "keys", "solved"]] * 3 + [["inverse"]]
    expected = torch.linalg.solve(4 * torch.eye(WIDTH) + all_keys @ all_keys.mT, keys[4])
    assert_close(Constraint.of(lambda k: k / 4, WIDTH, parts).solve(keys[4]), expected)


@pytest.mark.parametrize(
    ("keys", "weight", "condition"),
    [
        (draw(WIDTH, 2).repeat(1, 20), 1e-18, r"\de[+]\d+"),
        (torch.full((WIDTH, 40), torch.inf), 1, "inf"),
    ],
    ids=["light", "infinite"],
)
def test_keys_by_which_the_factor_cannot_grow_are_refused_with_the_condition(
    keys, weight, condition
):
    constraint = Constraint.of(inverse_by(cholesky(moment()), weight), WIDTH)

    with pytest.raises(EditError, match=rf"40 keys .* \(condition {condition}\)"):
        constraint.part(keys)


def test_state_of_patches_brings_the_constraint_back():
    site, inverse = Site("a.b.weight"), inverse_by(cholesky(moment()))
    patches: list[Patch] = []
    for batch in range(3):
        constraint = Constraint.after(inverse, WIDTH, patches, site)
        state = constraint.state(site, draw(WIDTH, 2, seed=batch))
        patches.append(Patch("any", (), state=state))
    keys = draw(WIDTH, 4, seed=7)

    all_keys = torch.cat([draw(WIDTH, 2, seed=batch) for batch in range(3)], dim=1)
    expected = torch.linalg.solve(moment() + all_keys @ all_keys.mT, keys)
    found = Constraint.after(inverse, WIDTH, patches, site).solve(keys)
    assert_close(found, expected, 1e-6)  # patches keep float32
    # Another matrix has no earlier keys, and rolling back leaves those of the edits that stay.
    other = Constraint.after(inverse, WIDTH, patches, Site("a.c.weight"))
    assert other.keys.shape == (WIDTH, 0)
    assert Constraint.after(inverse, WIDTH, patches[:1], site).keys.shape == (WIDTH, 2)


@pytest.mark.parametrize("edits", [1, 4])
def test_earlier_edits_with_another_weight_are_refused(edits):
    site, factor = Site("a.b.weight"), cholesky(moment())
    patches: list[Patch] = []
    for edit in range(edits):
        constraint = Constraint.after(inverse_by(factor, 1.0), WIDTH, patches, site)
        state = constraint.state(site, draw(WIDTH, 8, seed=edit))
        patches.append(Patch("any", (), state=state))
    assert (f"{site.parameter}:inverse" in patches[-1].state) == (edits == 4)

    with pytest.raises(EditError, match="another weight or other statistics"):
        Constraint.after(inverse_by(factor, 2.0), WIDTH, patches, site)


def test_without_the_edit_that_kept_the_inverse_the_keys_before_it_count_again():
    site, inverse, keys = Site("a.b.weight"), inverse_by(cholesky(moment())), draw(WIDTH, 4, seed=7)
    patches: list[Patch] = []
    solved = []
    for batch in range(5):
        constraint = Constraint.after(inverse, WIDTH, patches, site)
        solved.append(constraint.solve(keys))
        state = constraint.state(site, draw(WIDTH, 8, seed=batch))
        patches.append(Patch("any", (), state=state))
    assert [n for n, p in enumerate(patches) if f"{site.parameter}:inverse" in p.state] == [3]

    for kept, expected in enumerate(solved):
        found = Constraint.after(inverse, WIDTH, patches[:kept], site)
        assert torch.equal(found.solve(keys), expected)
