"""Merging against cases worked out by hand."""

import pytest
import torch
from kedit_wise.merging import merged

A = torch.tensor([[4.0, -3.0, 2.0, 0.0, 1.0]])
B = torch.tensor([[2.0, 5.0, 0.0, 0.0, -2.0]])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("linear", [3.0, 1.0, 1.0, 0.0, -0.5]),
        # Where they disagree the sign of the sum wins; where one is silent the other stays whole.
        ("sign", [3.0, 5.0, 2.0, 0.0, -2.0]),
        # Of each the two largest entries: 4, −3 and 2 (tied with −2), 5.
        ("magnitude", None),
        ("ties", None),
    ],
)
def test_two_changes(how, expected):
    b = torch.tensor([[2.0, 5.0, 0.0, 0.0, -1.0]]) if expected is None else B
    found = merged([A, b], [1.0, 1.0], how, density=0.4)
    expected = expected or {"magnitude": [3.0, 1.0, 0, 0, 0], "ties": [3.0, 5.0, 0, 0, 0]}[how]
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_weights_decide_the_sign_and_the_mean():
    a, b, c = (torch.tensor([[x, 1.0]]) for x in (3.0, -2.0, -2.0))
    found = merged([a, b, c], [0.6, 0.2, 0.2], "ties", density=1.0)
    torch.testing.assert_close(found, torch.tensor([[3.0, 1.0]]))
    found = merged([a, b, c], [0.2, 0.4, 0.4], "ties", density=1.0)
    torch.testing.assert_close(found, torch.tensor([[-2.0, 1.0]]))
    found = merged([a, b, c], [0.6, 0.2, 0.2], "linear", density=1.0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0]]))


@pytest.mark.parametrize("how", ["ties", "sign", "magnitude", "linear"])
def test_changes_are_not_modified(how):
    a, b = A.clone(), B.clone()
    merged([a, b], [1.0, 1.0], how, density=0.5)
    assert torch.equal(a, A)
    assert torch.equal(b, B)


def test_share_is_of_all_entries_zeros_among_them():
    """A shard that changes a fifth of the entries loses none at the published density."""
    g = torch.Generator().manual_seed(0)
    shards = [torch.randn(40, 50, generator=g) * (torch.rand(40, 50, generator=g) < 0.2)] * 2
    torch.testing.assert_close(merged(shards, [1, 1], "ties", 0.53), shards[0])
    assert (merged(shards, [1, 1], "ties", 0.1) != 0).sum() == 200
