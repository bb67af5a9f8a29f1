"""SPHERE: its projector, and what it takes out of AlphaEdit's changes on the toy models."""

from __future__ import annotations

import pytest
import torch
from kedit_sphere.method import suppressed
from torch import Tensor

from kedit_core import EditRequest, discover
from kedit_core.editing import EditSession, Patch
from kedit_core.hparams import presets_of, resolve
from kedit_core.testing.toys import TOYS, toy_facts

torch.set_num_threads(1)

QUICK = {"layers": [1], "steps": 6, "moment_tokens": 500}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def principal(weight: Tensor, ratio: float) -> Tensor:
    """U, (d_in, r), of the (d_in, d_in) matrix ŴᵀŴ/d_out."""
    rows = weight.double() / weight.double().norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(rows.mT @ rows / len(rows))
    shares = values.flip(0).cumsum(0) / values.sum()
    rank = next(n for n, share in enumerate(shares, 1) if share >= ratio)
    return vectors.flip(1)[:, :rank]


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (12, 12)])
@pytest.mark.parametrize(("ratio", "strength"), [(0.5, 0.5), (0.9, 0.8), (0.05, 1.0), (0.5, 0.0)])
def test_small_gram_matrix_gives_the_projector_of_the_wide_one(shape, ratio, strength):
    weight, change = draw(*shape, seed=1), draw(3, shape[1], seed=2)

    found = suppressed(change, weight, ratio, strength)

    u = principal(weight, ratio)
    expected = change - strength * change @ u @ u.mT
    torch.testing.assert_close(found, expected)


def requests(count: int) -> list[EditRequest]:
    return [
        EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=fact.target_new)
        for fact in toy_facts()[:count]
    ]


def edit(session: EditSession, wanted: list[EditRequest], method="sphere", **settings) -> Patch:
    outcome = session.edit(method, wanted, preset="toy", hparams={**QUICK, **settings})
    return outcome.patches[0]


@pytest.mark.parametrize("toy", TOYS)
def test_change_is_that_of_the_null_space_less_its_principal_part(toy, toy_host):
    """Fault: a matrix that is stored transposed is projected on its other side."""
    session = EditSession(toy_host(toy))
    with session.trial("alphaedit", requests(3), preset="toy", hparams=QUICK) as outcome:
        plain = outcome.patches[0].deltas[0].dense().double()
    u = principal(session.host.weight(session.host.mlp_out(1)), 0.5)

    (delta,) = edit(session, requests(3), suppression_strength=0.8).deltas

    expected = plain - 0.8 * plain @ u @ u.mT
    assert float((delta.dense() - expected).norm()) < 1e-5 * float(plain.norm())
    assert float((expected - plain).norm()) > 1e-2 * float(plain.norm())


def test_later_layers_make_up_for_what_was_taken_out(toy_host):
    """The change in force is the one without its principal part: more is left to later layers."""
    session = EditSession(toy_host("llama"))
    residuals = []
    for strength in (0.0, 1.0):
        settings = {"layers": [0, 1], "suppression_strength": strength}
        with session.trial("sphere", requests(3), preset="toy", hparams={**QUICK, **settings}) as o:
            residuals.append(o.patches[0].notes["residuals"])
    assert residuals[0][0] == residuals[1][0]
    assert residuals[0][1] < residuals[1][1]


def test_second_edit_goes_by_the_edited_weight_and_the_earlier_keys(toy_host):
    session, wanted = EditSession(toy_host("llama")), requests(4)
    edit(session, wanted[:2])
    mark = session.savepoint()
    second = edit(session, wanted[2:])
    assert second.state
    session.rollback(mark)
    again = edit(session, wanted[2:])
    session.rollback()
    alone = edit(session, wanted[2:])

    assert torch.equal(again.deltas[0].dense(), second.deltas[0].dense())
    assert not torch.equal(alone.deltas[0].dense(), second.deltas[0].dense())


def test_every_preset_is_valid_and_names_its_source():
    spec = discover().method("sphere")
    for preset in presets_of(spec):
        assert preset.source
        resolve(spec, preset=preset.name)
