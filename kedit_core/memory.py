"""How much memory a computation may take."""

from __future__ import annotations

import torch

_HOST_BYTES = 1 << 30  # of main memory; larger batches are no faster there


def free_bytes(device: torch.device) -> int:
    """Bytes that one batch may take on a device: half of an accelerator's free memory."""
    if device.type == "cpu" or not torch.accelerator.is_available():
        return _HOST_BYTES
    try:
        return int(torch.get_device_module(device).mem_get_info(device)[0]) // 2
    except (RuntimeError, NotImplementedError, AttributeError):  # a device that does not tell
        return _HOST_BYTES
