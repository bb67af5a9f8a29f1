"""What all tests share: one thread, a cache folder of their own, fresh toy models."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kedit_core.editing import EditSession, ModelHost
from kedit_core.testing.toys import TOYS, load_toy

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of all tests of the real model; the user's own is never touched."""
    folder = tmp_path_factory.mktemp("shared-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEDIT_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def cache(
    request: pytest.FixtureRequest,
    shared_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The cache folder of this test."""
    if request.node.get_closest_marker("real"):
        return shared_cache
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("KEDIT_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """A test that leaves gradients switched off fails itself, and not those after it."""
    yield
    was_on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert was_on, "gradients are off after this test"


@pytest.fixture(scope="session")
def benchmark_data(request: pytest.FixtureRequest) -> Path:
    """The folder of the public benchmarks' files: `KEDIT_DATA`, or `../shared/data`."""
    folder = Path(os.environ.get("KEDIT_DATA", request.config.rootpath / "../shared/data"))
    if not folder.is_dir():
        pytest.skip(f"the benchmarks' files are not in {folder}; KEDIT_DATA says where")
    return folder.resolve()


@pytest.fixture(scope="session")
def loaded_toys():
    """Each toy's model and tokenizer as they come from disk; never given to a test as they are."""
    return {name: load_toy(name) for name in TOYS}


@pytest.fixture
def toy_host(loaded_toys):
    """Makes a host with its own copy of a toy."""

    def make(name: str, dtype: torch.dtype = torch.float32) -> ModelHost:
        model, tokenizer = copy.deepcopy(loaded_toys[name])
        return ModelHost(model.to(dtype), tokenizer, f"toy-{name}")

    return make


@pytest.fixture(params=TOYS)
def host(request: pytest.FixtureRequest, toy_host) -> ModelHost:
    """A fresh host of every toy in turn."""
    return toy_host(request.param)


@pytest.fixture
def session(host: ModelHost) -> EditSession:
    """A session on a fresh toy, nothing edited."""
    return EditSession(host)
