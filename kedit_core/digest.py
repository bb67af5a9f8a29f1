"""What stands for a tensor's bits in a digest, computed where the tensor is."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bit_sums(tensor: Tensor) -> bytes:
    """Sums of the tensor's bits along the rows and the columns of a square.

    Every bit counts: a value that changes changes its row and its column, and values that change
    places change theirs.  A model of 7 billion parameters in 16 bits takes about two seconds of
    one CPU core, a hash of its bytes four times as long.

    Args:
        tensor: of any shape and type; not on the meta device.

    Returns:
        About twice the square root of the tensor's size.
    """
    flat = tensor.detach().reshape(-1).contiguous()
    if flat.storage_offset() * flat.itemsize % 8:
        flat = flat.clone()
    octets = flat.view(torch.uint8)
    count = len(octets) // 8
    words = octets[: 8 * count].view(torch.int64)
    side = math.isqrt(count)
    square = words[: side * side].view(side, side)
    parts = (square.sum(dim=0), square.sum(dim=1), words[side * side :])  # sums wrap around
    return b"".join(
        part.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for part in (*parts, octets[8 * count :])
    )
