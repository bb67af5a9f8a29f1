"""Null spaces of second moments, against dense projectors and the paper's own system."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.editing import EditSession, ModelHost
from kedit_core.errors import EditError
from kedit_core.job import EditJob
from kedit_core.numerics.nullspace import NullSpace, null_spaces
from kedit_core.numerics.ridge import Constraint, least_squares
from kedit_core.targets import NullSpaceHyperParams
from kedit_core.testing.toys import load_toy, toy_corpus

WIDTH, D_OUT, FACTS = 24, 7, 4


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(values: Tensor) -> Tensor:
    """C with the given eigenvalues."""
    vectors, _ = torch.linalg.qr(draw(len(values), len(values), seed=9))
    return vectors @ values.diag() @ vectors.mT


def space_of(c: Tensor, **choice: float) -> NullSpace:
    return NullSpace.of(*torch.linalg.eigh(c), **choice)


def projector(c: Tensor, rank: int) -> Tensor:
    """U₀ U₀ᵀ, dense."""
    _, vectors = torch.linalg.eigh(c)
    return vectors[:, :rank] @ vectors[:, :rank].mT


VALUES = torch.logspace(-3, 1, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize(("threshold", "rank"), [(2e-3, 2), (0.02, 8), (5.0, 22)])
def test_keys_are_projected_on_eigenvectors_below_the_threshold(threshold, rank):
    c, keys = moment(VALUES), draw(WIDTH, FACTS, seed=1)
    assert int((threshold > VALUES).sum()) == rank

    space = space_of(c, threshold=threshold)

    assert space.rank == rank
    assert space.vectors.shape[1] == min(rank, WIDTH - rank)
    torch.testing.assert_close(space.project(keys), projector(c, rank) @ keys)


@pytest.mark.parametrize("energy", [0.01, 0.2, 0.9])
def test_free_directions_hold_at_most_the_share_of_the_trace(energy):
    rank = space_of(moment(VALUES), energy=energy).rank

    trace = float(VALUES[:-1].sum())
    assert float(VALUES[:rank].sum()) <= energy * trace < float(VALUES[: rank + 1].sum())


@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_share_of_the_trace_heeds_neither_scale_nor_attention_sinks(scale):
    """Fault: the rank depends on the scale of C, or on the few positions with huge states."""
    values = VALUES.clone()
    rank = space_of(moment(values), energy=0.1).rank
    values[-1] = 1e5

    assert space_of(scale * moment(values), energy=0.1).rank == rank
    assert space_of(scale * moment(VALUES), threshold=0.02).rank != 8


def test_growing_constraint_solves_the_papers_system_batch_after_batch():
    c, l2 = moment(VALUES), 10.0
    space = space_of(c, threshold=0.02)
    p, previous = projector(c, space.rank), torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    parts: list[dict[str, Tensor]] = []
    for batch in range(15):  # twice as many keys as the matrix is wide
        keys, residual = 9 * draw(WIDTH, FACTS, seed=batch), draw(D_OUT, FACTS, seed=10 + batch)
        after = keys + 0.1 * draw(WIDTH, FACTS, seed=20 + batch)  # keys once all is written
        constraint = Constraint.of(space.inverse(l2), WIDTH, parts)

        update = least_squares(keys, residual, constraint.solve(keys))

        system = p @ (keys @ keys.mT + previous) + l2 * torch.eye(WIDTH)
        expected = torch.linalg.solve(system, p @ keys @ residual.mT).mT
        found = update.left.double() @ update.right.double()
        # Factors and what a patch keeps of earlier keys are in float32.
        assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
        assert float((found @ (torch.eye(WIDTH) - p)).norm()) <= 1e-5 * float(found.norm())
        parts.append(constraint.part(after))
        previous = previous + after @ after.mT


def job_on(folder: Path) -> EditJob:
    model, tokenizer = load_toy("llama")
    session = EditSession(
        ModelHost(model, tokenizer, "toy"),
        artifacts=ArtifactStore(folder),
        corpus=Corpus(str(toy_corpus())),
    )
    return EditJob(
        host=session.host,
        requests=(),
        artifacts=session.artifacts,
        fingerprint=session.fingerprint,
        corpus=session.corpus,
        seed=0,
        unedited=session.suspended,
    )


def settings(**choice: float) -> NullSpaceHyperParams:
    nothing = {"nullspace_threshold": None, "nullspace_energy": None}
    return NullSpaceHyperParams(layers=(1,), moment_tokens=500, **{**nothing, **choice})


def test_second_moment_is_decomposed_once_for_all_thresholds(tmp_path, monkeypatch):
    job = job_on(tmp_path)
    sites = [job.host.mlp_out(1)]
    (wide,) = null_spaces(job, sites, settings(nullspace_energy=0.5)).values()

    monkeypatch.setattr(torch.linalg, "eigh", None)
    (narrow,) = null_spaces(job, sites, settings(nullspace_energy=0.1)).values()

    assert 0 < narrow.rank < wide.rank < wide.width


def test_matrix_without_a_free_direction_is_refused(tmp_path):
    job = job_on(tmp_path)
    with pytest.raises(EditError, match=r"No direction of .*down_proj.* is free.*Raise"):
        null_spaces(job, [job.host.mlp_out(1)], settings(nullspace_threshold=1e-12))


def test_hardly_any_protection_is_told(tmp_path, caplog):
    job = job_on(tmp_path)
    with caplog.at_level(logging.WARNING):
        null_spaces(job, [job.host.mlp_out(1)], settings(nullspace_threshold=1e6))
    assert "hardly anything is protected" in caplog.text


@pytest.mark.parametrize("both", [{}, {"nullspace_threshold": 0.02, "nullspace_energy": 0.1}])
def test_threshold_and_share_exclude_each_other(both):
    with pytest.raises(ValueError, match="and null for the other"):
        settings(**both)
