"""What a block costs is its own time and its own peak of memory."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from kedit_bench import effort
from kedit_bench.effort import Effort, measured

CPU = torch.device("cpu")
MB = 1 << 20


def fill(megabytes: int) -> bytearray:
    """Memory of which every page is touched."""
    block = bytearray(megabytes * MB)
    for start in range(0, len(block), 4096):
        block[start] = 1
    return block


@pytest.fixture
def tells() -> None:
    """Skip where the system does not tell what is resident at most."""
    with measured(CPU) as found:
        pass
    if found.host_bytes is None:
        pytest.skip("the system does not tell a process its peak of resident memory")


def test_seconds_are_those_of_the_block():
    started = time.perf_counter()
    time.sleep(0.1)
    with measured(CPU) as found:
        time.sleep(0.2)
    time.sleep(0.1)

    assert 0.2 <= found.seconds <= time.perf_counter() - started - 0.2


def test_nothing_is_filled_in_before_the_end():
    with measured(CPU) as found:
        assert found == Effort(0.0, None, None)
    assert found.seconds > 0


def test_memory_that_is_freed_inside_counts(tells):
    with measured(CPU) as found:
        fill(60)

    assert found.host_bytes is not None
    assert 40 * MB < found.host_bytes < 120 * MB


def test_memory_that_was_there_before_does_not_count(tells):
    kept = fill(60)
    fill(100)  # an earlier and higher peak
    with measured(CPU) as found:
        kept[0] = 2

    assert found.host_bytes is not None
    assert found.host_bytes < 20 * MB


def test_tensors_count(tells):
    with measured(CPU) as found:
        torch.ones(60 * MB // 4)

    assert found.host_bytes is not None
    assert 40 * MB < found.host_bytes < 120 * MB


def test_memory_that_was_freed_before_counts_again(tells):
    fill(30)  # blocks of up to 30 MB come from the heap from here on
    heap = [fill(1) for _ in range(50)]
    del heap  # freed, and kept by the process
    with measured(CPU) as found:
        fill(29)

    assert found.host_bytes is not None
    assert 20 * MB < found.host_bytes < 120 * MB


def test_a_system_that_does_not_tell_gives_no_number(monkeypatch, tmp_path):
    for name in ("_STATUS", "_RESET"):
        monkeypatch.setattr(effort, name, tmp_path / "none" / name)
    with measured(CPU) as found:
        pass

    assert found.host_bytes is None
    assert found.seconds > 0


@pytest.mark.parametrize("status", ["Name:\tx\n", "VmHWM:\tmuch\n", ""])
def test_a_status_without_the_peak_gives_no_number(monkeypatch, tmp_path, status):
    for name in ("_STATUS", "_RESET"):
        monkeypatch.setattr(effort, name, tmp_path / name)
    # The reset writes to a file of its own here, so the status stays as it is.
    (tmp_path / "_STATUS").write_text(status)
    with measured(CPU) as found:
        pass

    assert found.host_bytes is None


def test_the_processor_has_no_memory_of_its_own():
    with measured(CPU) as found:
        pass
    assert found.device_bytes is None


def test_an_error_passes_through():
    with pytest.raises(ZeroDivisionError), measured(CPU):
        _ = 1 / 0


class Accelerator:
    """Counts memory as `torch.cuda` does, by device, and how often its queue was emptied."""

    def __init__(self) -> None:
        self.now = {0: 500, 1: 10}
        self.peak = {0: 900, 1: 80}
        self.emptied: list[int] = []

    def synchronize(self, device: torch.device) -> None:
        self.emptied.append(device.index)

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak[device.index] = self.now[device.index]

    def memory_allocated(self, device: torch.device) -> int:
        return self.now[device.index]

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peak[device.index]

    def max_memory_reserved(self, device: torch.device) -> int:
        return 2 * self.peak[device.index]


@pytest.mark.parametrize("number", [0, 1])
def test_an_accelerators_peak_is_that_of_the_models_device(monkeypatch, number):
    other = Accelerator()
    monkeypatch.setattr(torch, "cuda", other)

    with measured(torch.device("cuda", number)) as found:
        for device, by in ((0, 7000), (1, 300)):
            other.peak[device] = other.now[device] + by

    assert found.device_bytes == {0: 7000, 1: 300}[number]
    assert found.reserved_bytes == 2 * {0: 7500, 1: 310}[number]
    assert other.emptied == [number, number]


def test_a_device_that_counts_nothing_gives_no_number(monkeypatch):
    monkeypatch.setattr(torch, "mps", SimpleNamespace(synchronize=None))
    with measured(torch.device("mps")) as found:
        pass
    assert found.device_bytes is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_accelerator_tells_its_peak():
    device = torch.device("cuda", torch.cuda.current_device())
    with measured(device) as found:
        torch.ones(32 * MB // 4, device=device)

    assert found.device_bytes is not None
    assert 32 * MB <= found.device_bytes < 40 * MB
    assert found.reserved_bytes is not None
    assert found.reserved_bytes >= found.device_bytes
