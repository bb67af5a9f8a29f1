"""Losses against those of torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from kedit_core.numerics.losses import kl_divergence, mean_nll


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_nll_is_the_mean_cross_entropy_of_each_row():
    scores, labels = logits(5, 11), torch.tensor([3, 0, 10, 4, 4])
    rows = torch.tensor([0, 0, 0, 2, 2])

    nll = mean_nll(scores, labels, rows, 3)

    torch.testing.assert_close(nll[0], cross_entropy(scores[:3], labels[:3]))
    torch.testing.assert_close(nll[2], cross_entropy(scores[3:], labels[3:]))
    assert float(nll[1]) == 0.0  # a row without labels


def test_gradient_of_nll_is_that_of_cross_entropy():
    scores = logits(4, 7).requires_grad_(True)
    labels, rows = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 1, 1])

    (ours,) = torch.autograd.grad(mean_nll(scores, labels, rows, 2).sum(), scores)
    expected = cross_entropy(scores[:1], labels[:1]) + cross_entropy(scores[1:], labels[1:])
    (theirs,) = torch.autograd.grad(expected, scores)

    torch.testing.assert_close(ours, theirs)


def test_kl_is_that_of_torch():
    reference, scores = log_softmax(logits(3, 9), dim=-1), logits(3, 9, seed=1)

    found = kl_divergence(reference, scores)

    expected = kl_div(log_softmax(scores, -1), reference, reduction="none", log_target=True)
    torch.testing.assert_close(found, expected.sum(-1))
    assert bool((found > 0).all())


def test_kl_of_a_distribution_to_itself_is_zero():
    scores = logits(4, 100)

    assert float(kl_divergence(log_softmax(scores, -1), scores).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_narrow_logits_are_computed_wide(dtype):
    scores = logits(2, 50).to(dtype)
    labels = torch.tensor([0, 1])

    nll = mean_nll(scores, labels, labels, 2)

    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, cross_entropy(scores.float(), labels, reduction="none"))
