"""What stands for a tensor's bits sees each of them."""

from __future__ import annotations

import pytest
import torch

from kedit_core.digest import bit_sums


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8]
)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (7, 5), (16, 16), (3, 5, 9)])
def test_every_value_counts(shape, dtype):
    tensor = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 99).to(dtype)
    first = bit_sums(tensor)
    flat = tensor.view(-1)

    for n in range(len(flat)):
        kept = flat[n].clone()
        flat[n] += 1
        assert bit_sums(tensor) != first
        flat[n] = kept
    assert bit_sums(tensor) == first


def test_the_sign_of_zero_counts():
    assert bit_sums(torch.zeros(8)) != bit_sums(-torch.zeros(8))


@pytest.mark.parametrize("places", [(0, 1), (0, 63), (8, 71)])
def test_places_count(places):
    tensor = torch.arange(128.0)
    first = bit_sums(tensor)
    moved = tensor.clone()
    moved[list(places)] = tensor[list(reversed(places))]

    assert bit_sums(moved) != first


def test_layout_in_memory_does_not_count():
    tensor = torch.arange(77.0).view(7, 11)
    behind = torch.arange(-1.0, 77.0)[1:].view(7, 11)  # begins in the middle of eight bytes

    assert bit_sums(tensor) == bit_sums(behind) == bit_sums(tensor.t().contiguous().t())


def test_it_stays_small():
    assert len(bit_sums(torch.zeros(1 << 20))) < 20_000
