"""What an edit costs: seconds and peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Effort:
    """Cost of a block.

    Attributes:
        seconds: by the wall clock, with the device's queue empty at both ends.
        host_bytes: peak of resident memory above what was resident before; None where the system
            does not tell.
        device_bytes: the same of the accelerator's allocated memory; None without one.
        reserved_bytes: peak of all that the accelerator's allocator held, the model and what it
            keeps for later included; None without one.
    """

    seconds: float = 0.0
    host_bytes: int | None = None
    device_bytes: int | None = None
    reserved_bytes: int | None = None


@contextlib.contextmanager
def measured(device: torch.device) -> Iterator[Effort]:
    """Measure what the block costs; filled in when it ends well."""
    effort = Effort()
    module = _memory_module(device)
    resident = _host_peak(reset=True)
    allocated = 0
    if module is not None:
        module.synchronize(device)
        module.reset_peak_memory_stats(device)
        allocated = module.memory_allocated(device)
    started = time.perf_counter()
    yield effort
    if module is not None:
        module.synchronize(device)
        effort.device_bytes = module.max_memory_allocated(device) - allocated
        effort.reserved_bytes = module.max_memory_reserved(device)
    effort.seconds = time.perf_counter() - started
    peak = _host_peak()
    if peak is not None and resident is not None:
        effort.host_bytes = max(0, peak - resident)


def _give_back_freed() -> None:
    """Let glibc return what is freed to the system; what reuses it would not count."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _memory_module(device: torch.device) -> ModuleType | None:
    """What counts memory on this kind of device: `torch.cuda` and its like."""
    module = getattr(torch, device.type, None)
    return module if hasattr(module, "reset_peak_memory_stats") else None


def _host_peak(reset: bool = False) -> int | None:
    """Peak of resident memory in bytes since the last reset (Linux)."""
    try:
        if reset:
            _give_back_freed()
            _RESET.write_text("5")
        found = next(s for s in _STATUS.read_text().splitlines() if s.startswith("VmHWM"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return None
