"""How much memory a batch may take, on every kind of device and every torch that we allow."""

from __future__ import annotations

import types

import pytest
import torch

from kedit_core.memory import free_bytes


def refuse(device):
    raise RuntimeError("not told")


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (types.SimpleNamespace(mem_get_info=lambda device: (600, 1000)), 300),
        (types.SimpleNamespace(mem_get_info=refuse), 1 << 30),
        (types.SimpleNamespace(), 1 << 30),
    ],
)
def test_half_of_what_a_device_says_is_free(monkeypatch, module, expected):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.delattr(torch.accelerator, "get_memory_info", raising=False)  # new in torch 2.10
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)

    assert free_bytes(torch.device("cuda", 1)) == expected
    assert free_bytes(torch.device("cpu")) == 1 << 30
