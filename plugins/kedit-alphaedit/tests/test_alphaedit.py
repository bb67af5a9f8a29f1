"""AlphaEdit on the toy models: where it writes, what it remembers, and its presets."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from kedit_core import EditError, EditRequest, SettingError, discover
from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.editing import EditSession, ModelHost, Patch
from kedit_core.hparams import presets_of, resolve
from kedit_core.models import config_facts
from kedit_core.numerics.states import states_at_marks
from kedit_core.testing.toys import TOYS, load_toy, toy_corpus, toy_facts
from kedit_core.tokens import rewrite_row

torch.set_num_threads(1)

QUICK = {"layers": [0, 1], "steps": 6, "moment_tokens": 500}


def session_on(name: str, folder: Path) -> EditSession:
    model, tokenizer = load_toy(name)
    host = ModelHost(model, tokenizer, f"toy-{name}")
    corpus = Corpus(str(toy_corpus()))
    return EditSession(host, artifacts=ArtifactStore(folder), corpus=corpus)


def requests(count: int) -> list[EditRequest]:
    return [
        EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=fact.target_new)
        for fact in toy_facts()[:count]
    ]


def edit(session: EditSession, wanted: list[EditRequest], **settings) -> Patch:
    outcome = session.edit("alphaedit", wanted, preset="toy", hparams={**QUICK, **settings})
    return outcome.patches[0]


def same(one: Patch, other: Patch) -> bool:
    return all(
        torch.equal(a.dense(), b.dense()) for a, b in zip(one.deltas, other.deltas, strict=True)
    ) and all(torch.equal(one.state[name], other.state[name]) for name in one.state)


@pytest.mark.parametrize("toy", TOYS)
def test_change_is_blind_to_what_is_orthogonal_to_the_null_space(toy, tmp_path):
    session = session_on(toy, tmp_path)

    patch = edit(session, requests(4))

    for delta, rank in zip(patch.deltas, patch.notes["ranks"], strict=True):
        folders = (tmp_path / "second-moment").glob("*/key.json")
        (key,) = (k.parent for k in folders if f'"{delta.site.parameter}"' in k.read_text())
        moment = load_file(key / "tensors.safetensors")["moment"].double()
        _, vectors = torch.linalg.eigh(moment)
        stored = vectors[:, rank:]  # what ordinary text uses
        change = delta.dense().double()
        assert 0 < rank < len(moment)
        assert float((change @ stored).norm()) < 1e-5 * float(change.norm())


def test_first_edit_is_made_again_after_a_rollback_and_in_another_session(tmp_path):
    """Fault: keys of earlier edits are kept in the process, and outlive the edits."""
    session, wanted = session_on("llama", tmp_path), requests(6)
    first = edit(session, wanted[:3])
    mark = session.savepoint()
    second = edit(session, wanted[3:])
    assert not same(first, second)

    session.rollback(mark)
    assert same(edit(session, wanted[3:]), second)
    session.rollback()
    assert same(edit(session, wanted[:3]), first)
    assert same(edit(session_on("llama", tmp_path), wanted[:3]), first)


@pytest.mark.parametrize("toy", TOYS)
def test_later_edits_spare_what_earlier_ones_wrote(toy, tmp_path):
    session, wanted = session_on(toy, tmp_path), requests(8)
    host = session.host
    row = rewrite_row(host, wanted[0])
    points = {"out": (host.blocks[1].path, "output")}

    def written() -> Tensor:
        return states_at_marks(host, [row], points)["out"]

    settings = {"layers": [1], "l2": 0.01}
    edit(session, wanted[:4], **settings)
    remembered, before = session.stack[0], written()
    edit(session, wanted[4:], **settings)
    moved = (written() - before).norm()
    # The same two edits, of which the second knows nothing of the first.
    session.rollback()
    session.apply(Patch("other", remembered.effects))
    edit(session, wanted[4:], **settings)
    moved_unaware = (written() - before).norm()

    assert moved < 0.5 * moved_unaware


def test_layers_share_the_change_and_each_remembers_its_keys(tmp_path):
    session = session_on("gpt2", tmp_path)
    patch = edit(session, requests(3))
    assert [delta.site for delta in patch.deltas] == [session.host.mlp_out(n) for n in (0, 1)]
    for delta in patch.deltas:
        assert delta.rank == 3
        assert patch.state[f"{delta.site.parameter}:keys"].shape == (delta.shape[1], 3)


@pytest.mark.parametrize("toy", TOYS)
def test_keys_that_are_remembered_are_those_of_the_edited_model(toy, tmp_path):
    session, wanted = session_on(toy, tmp_path), requests(3)
    rows = [rewrite_row(session.host, request) for request in wanted]
    site = session.host.mlp_out(1)
    points = {"key": (site.module, "input")}
    before = states_at_marks(session.host, rows, points)["key"].mT

    patch = edit(session, wanted, contexts=[])

    after = states_at_marks(session.host, rows, points)["key"].mT
    torch.testing.assert_close(patch.state[f"{site.parameter}:keys"], after, rtol=1e-5, atol=1e-6)
    assert float((after - before).norm()) > 1e-3 * float(before.norm())


def test_sequence_of_more_facts_than_the_matrix_is_wide_is_saved_and_goes_on(tmp_path):
    session, wanted = session_on("llama", tmp_path), requests(128)
    settings = {"layers": [1], "steps": 1, "contexts": []}
    parameter = session.host.mlp_out(1).parameter
    for start, end in ((0, 112), (112, 120)):  # as many as the width, and more
        edit(session, wanted[start:end], **settings)
    mark = session.savepoint()
    session.save(tmp_path / "edits")
    third = edit(session, wanted[120:], **settings)

    assert session.stack[1].state.keys() == {f"{parameter}:inverse"}
    assert third.state[f"{parameter}:keys"].shape == (112, 8)
    session.rollback(mark)
    assert same(edit(session, wanted[120:], **settings), third)
    other = session_on("llama", tmp_path)
    other.load(tmp_path / "edits")
    assert same(edit(other, wanted[120:], **settings), third)


@pytest.mark.parametrize("change", [{"l2": 1.0}, {"nullspace_energy": 0.05}])
def test_other_settings_within_a_session_are_refused(change, tmp_path):
    session, wanted = session_on("llama", tmp_path), requests(2)
    edit(session, wanted[:1])
    with pytest.raises(EditError, match="another weight or other statistics"):
        edit(session, wanted[1:], **change)
    assert len(session.stack) == 1


def test_preparing_tells_what_is_free_and_leaves_nothing_to_collect(tmp_path, monkeypatch, caplog):
    session = session_on("llama", tmp_path)
    with caplog.at_level(logging.INFO):
        session.prepare("alphaedit", preset="toy", hparams=QUICK)
    assert "directions are free" in caplog.text
    monkeypatch.setattr("kedit_core.numerics.stats.collect", None)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    edit(session, requests(1))


CONFIGS = {
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48}),
    "gpt-j-6b": ("gptj", {"n_embd": 4096, "n_layer": 28}),
    "llama-2-7b": (
        "llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008},
    ),
    "llama-3-8b": (
        "llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336},
    ),
    "qwen2.5-7b": ("qwen2", {"hidden_size": 3584, "num_hidden_layers": 28}),
}
# First and last layer, steps, lr, weight decay, clamp and L2 as the sources give them.
PUBLISHED = {
    "gpt2-xl": (13, 17, 20, 0.5, 0.5, 0.75, 10),
    "gpt-j-6b": (3, 8, 25, 0.5, 0.5, 0.75, 10),
    "llama-2-7b": (3, 4, 25, 0.5, 0.5, 0.75, 1),
    "llama-3-8b": (4, 8, 25, 0.1, 0.5, 0.75, 10),
    "qwen2.5-7b": (7, 11, 25, 0.1, 0.5, 0.75, 10),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_preset_is_chosen_by_config_and_gives_the_published_settings(name):
    kind, shape = CONFIGS[name]
    config = config_facts(AutoConfig.for_model(kind, **shape).to_dict())

    settings = resolve(discover().method("alphaedit"), config=config)

    h = settings.hparams
    assert settings.origin["layers"] == f"preset {name}"
    assert h.layers == tuple(range(h.layers[0], h.layers[-1] + 1))
    found = (h.layers[0], h.layers[-1], h.steps, h.lr, h.weight_decay, h.max_norm_ratio, h.l2)
    assert found == PUBLISHED[name]
    assert (h.nullspace_threshold, h.nullspace_energy) == (0.02, None)


def test_every_preset_is_valid_and_names_its_source():
    spec = discover().method("alphaedit")
    for preset in presets_of(spec):
        assert preset.source
        resolve(spec, preset=preset.name)


def test_threshold_and_share_are_not_both_given():
    with pytest.raises(SettingError, match="null for the other one"):
        resolve(discover().method("alphaedit"), settings={"layers": [1], "nullspace_energy": 0.02})
