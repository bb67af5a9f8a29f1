"""Losses of edits, from logits at chosen positions."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_core.numerics.states import wide


def mean_nll(logits: Tensor, labels: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """Negative log-likelihood of each row's target, averaged over its tokens.

    Args:
        logits: (labels, vocabulary).
        labels: (labels,) token to predict.
        rows: (labels,) row of each label.
        n_rows: number of rows.

    Returns:
        (n_rows,) in float32 or wider, nats per token.
    """
    nll = -torch.log_softmax(wide(logits), dim=-1).gather(1, labels[:, None])[:, 0]
    zeros = nll.new_zeros(n_rows)
    counts = zeros.index_add(0, rows, torch.ones_like(nll))
    return zeros.index_add(0, rows, nll) / counts.clamp(min=1)


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(p_reference ‖ p) for each pair of next-token distributions.

    Args:
        reference: (n, vocabulary) log-probabilities.
        logits: (n, vocabulary).

    Returns:
        (n,) in float32 or wider, nats.
    """
    log_p = torch.log_softmax(wide(logits), dim=-1)
    return (reference.exp() * (reference - log_p)).sum(dim=-1)
