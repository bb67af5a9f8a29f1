"""Saved edits are read with suspicion and written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kedit_core.editing import (
    CallEffect,
    EditSession,
    ModelHost,
    ModuleSwap,
    Patch,
    Site,
    WeightDelta,
)
from kedit_core.errors import EditError, PatchError
from kedit_core.stack import SavedStack, append_saved, pop_saved, read_stack, write_stack
from tests.core.edits import (
    based,
    bias_patch,
    bits,
    fact,
    preface_patch,
    same,
    shift_patch,
    weight_patch,
)


@pytest.fixture
def session(toy_host) -> EditSession:
    return EditSession(toy_host("gpt2"))


def mixed(host: ModelHost) -> Patch:
    """A patch with an effect of every kind and a state."""
    effects = (
        *weight_patch(host, 1, 2).effects,
        WeightDelta(Site("dense.weight", True, expert=3), torch.ones(2, 3, dtype=torch.bfloat16)),
        *shift_patch(host, "transformer.h.1.mlp").effects,
        *preface_patch("Öl: ").effects,
        *bias_patch(host, 3).effects,
    )
    return Patch(
        "mixed",
        effects,
        state={"count": torch.tensor(3), "moment": torch.eye(2, dtype=torch.float64)},
        notes={"losses": [1.5, 0.25], "word": "Łódź"},
        requests=(fact(),),
        hparams={"layer": 1, "key": "rome"},
        plugin="kedit-mixed 1.0",
        seed=4,
    )


def test_a_patch_comes_back_from_its_files_as_it_was(session, tmp_path):
    patch = based(session, weight_patch(session.host, 1))
    for number, written in enumerate((patch, mixed(session.host))):
        written.save(tmp_path / str(number))
        read = Patch.load(tmp_path / str(number))

        for name in ("method", "notes", "requests", "hparams", "plugin", "seed", "base"):
            assert getattr(read, name) == getattr(written, name)
        assert len(read.effects) == len(written.effects)
        for ours, theirs in zip(read.effects, written.effects, strict=True):
            assert type(ours) is type(theirs)
            assert ours.tensors.keys() == theirs.tensors.keys()
            for name, tensor in theirs.tensors.items():
                assert ours.tensors[name].dtype == tensor.dtype
                assert torch.equal(ours.tensors[name], tensor)
            if isinstance(theirs, WeightDelta):
                assert ours.site == theirs.site
            else:
                assert (ours.type, ours.config) == (theirs.type, theirs.config)
            if isinstance(theirs, ModuleSwap):
                assert ours.path == theirs.path
        assert read.state.keys() == written.state.keys()
        assert all(torch.equal(read.state[k], written.state[k]) for k in written.state)


def test_only_json_and_safetensors_are_written(session, tmp_path):
    session.apply(based(session, weight_patch(session.host, 1)))
    session.save(tmp_path / "edits")
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        "edits/stack.json",
        "edits/0000/patch.json",
        "edits/0000/tensors.safetensors",
    }


# -- reading ----------------------------------------------------------------------------------


def rewrite(folder: Path, change) -> None:
    """Let `change` alter a patch's manifest."""
    data = json.loads((folder / "patch.json").read_text("utf-8"))
    change(data)
    (folder / "patch.json").write_text(json.dumps(data), "utf-8")


def retensor(folder: Path, change) -> None:
    """Let `change` alter a patch's tensors."""
    tensors = load_file(folder / "tensors.safetensors")
    change(tensors)
    save_file(tensors, folder / "tensors.safetensors")


def put(**values):
    return lambda data: data.update(values)


def put_effect(**values):
    return lambda data: data["effects"][0].update(values)


MANIFEST_FLAWS = {
    "newer format": (put(format=99), "format 99, this kedit reads 1. Upgrade kedit."),
    "format is text": (put(format="1"), "format '1', this kedit reads 1.$"),
    "no format": (lambda d: d.pop("format"), "patch.json lacks 'format'"),
    "no method": (lambda d: d.pop("method"), "lacks 'method'"),
    "effects are no list": (put(effects=3), "malformed"),
    "an effect is no mapping": (put(effects=["x"]), "malformed"),
    "an effect is missing": (put(effects=[]), "no owner"),
    "unknown kind": (put_effect(kind="code"), "unknown kind 'code'"),
    "no kind": (lambda d: d["effects"][0].pop("kind"), "lacks 'kind'"),
    "other rank": (put_effect(rank=7), "wrong shape"),
    "dense announced": (put_effect(rank=None), "missing"),
    "other shape": (put_effect(shape=[1, 1]), "wrong shape"),
    "expert is text": (put_effect(expert="0"), "expert"),
    "expert is a flag": (put_effect(expert=True), "expert"),
    "unknown state": (put(state=["more"]), "state"),
    "checksums are a list": (lambda d: d["base"].update(checksums=[1]), "malformed"),
    "base is text": (put(base="x"), "malformed"),
    "base lacks its name": (lambda d: d["base"].pop("name"), "lacks 'name'"),
    "seed is text": (put(seed="many"), "malformed"),
    "a request is no mapping": (put(requests=[3]), "malformed"),
}


@pytest.mark.parametrize("flaw", MANIFEST_FLAWS)
def test_a_malformed_manifest_is_refused(session, tmp_path, flaw):
    change, message = MANIFEST_FLAWS[flaw]
    based(session, weight_patch(session.host, 1)).save(tmp_path / "patch")
    rewrite(tmp_path / "patch", change)
    before = bits(session.model)

    with pytest.raises(PatchError, match=message):
        session.load(tmp_path / "patch", force=True)
    assert same(bits(session.model), before)


def test_a_malformed_request_in_a_manifest_is_refused(session, tmp_path):
    weight_patch(session.host, 1).save(tmp_path / "patch")
    rewrite(tmp_path / "patch", put(requests=[{"prompt": "x", "code": "y"}]))
    with pytest.raises(PatchError, match=r"patch\.json holds a malformed request.*code"):
        Patch.load(tmp_path / "patch")


@pytest.mark.parametrize("text", ["", "not json", "[1, 2]", "3", '{"format": 1'])
def test_a_manifest_that_is_no_json_mapping_is_refused(session, tmp_path, text):
    weight_patch(session.host, 1).save(tmp_path / "patch")
    (tmp_path / "patch/patch.json").write_text(text)
    with pytest.raises(PatchError, match=r"JSON|read"):
        Patch.load(tmp_path / "patch")


def scale(value: float):
    return lambda t: t.update({"effect.0.left": t["effect.0.left"] * value})


TENSOR_FLAWS = {
    "not a number": (scale(float("nan")), "not finite"),
    "infinite": (scale(float("inf")), "not finite"),
    "integers": (lambda t: t.update({"effect.0.left": t["effect.0.left"].int()}), "floating"),
    "missing": (lambda t: t.pop("effect.0.right"), "missing"),
    "spare": (lambda t: t.update({"effect.7.left": torch.ones(2, 2)}), "no owner"),
    "spare of an effect": (lambda t: t.update({"effect.0.more": torch.ones(2)}), "missing"),
    "spare state": (lambda t: t.update({"state.more": torch.ones(2)}), "state"),
    "other inner dimension": (
        lambda t: t.update({"effect.0.left": t["effect.0.left"].repeat(1, 3)}),
        "shapes",
    ),
    "vector": (lambda t: t.update({"effect.0.left": t["effect.0.left"][:, 0].clone()}), "shapes"),
}


@pytest.mark.parametrize("flaw", TENSOR_FLAWS)
def test_malformed_tensors_are_refused(session, tmp_path, flaw):
    change, message = TENSOR_FLAWS[flaw]
    based(session, weight_patch(session.host, 1)).save(tmp_path / "patch")
    retensor(tmp_path / "patch", change)
    before = bits(session.model)

    with pytest.raises(PatchError, match=message):
        session.load(tmp_path / "patch", force=True)
    assert same(bits(session.model), before)


class Alarm:
    """Would leave a mark if anyone unpickled it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def test_a_pickle_in_place_of_tensors_is_refused_and_not_run(session, tmp_path):
    weight_patch(session.host, 1).save(tmp_path / "patch")
    (tmp_path / "patch/tensors.safetensors").write_bytes(pickle.dumps(Alarm(tmp_path / "ran")))
    with pytest.raises(PatchError, match="no safetensors file"):
        session.load(tmp_path / "patch", force=True)
    assert not (tmp_path / "ran").exists()


def test_cut_or_missing_tensors_are_refused(session, tmp_path):
    weight_patch(session.host, 1).save(tmp_path / "patch")
    tensors = tmp_path / "patch/tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    with pytest.raises(PatchError, match="no safetensors file"):
        Patch.load(tmp_path / "patch")
    tensors.unlink()
    with pytest.raises(PatchError, match="does not exist"):
        Patch.load(tmp_path / "patch")


@pytest.fixture
def saved(session, tmp_path) -> Path:
    """A saved session of one patch."""
    session.apply(based(session, weight_patch(session.host, 1)))
    session.save(tmp_path / "edits")
    session.rollback()
    return tmp_path / "edits"


def relist(folder: Path, **values) -> None:
    """Change the only entry of a saved session."""
    data = json.loads((folder / "stack.json").read_text("utf-8"))
    data["patches"][0].update(values)
    (folder / "stack.json").write_text(json.dumps(data), "utf-8")


def test_a_stack_does_not_lead_out_of_its_folder(session, saved, tmp_path):
    based(session, weight_patch(session.host, 1)).save(tmp_path / "outside")
    (saved / "link").symlink_to(tmp_path / "outside")
    outside = ["../outside", str(tmp_path / "outside"), "0000/../../outside", "..", ".", ""]
    for name in [*outside, "..\\outside", "link"]:
        relist(saved, patch=name)
        with pytest.raises(PatchError, match=r"outside the folder|is a link"):
            session.load(saved)
    relist(saved, patch="0000")
    session.load(saved)


def test_a_malformed_stack_is_refused(session, saved):
    good = json.loads((saved / "stack.json").read_text("utf-8"))
    flaws = [
        {**good, "format": 99},
        {**good, "patches": 3},
        {**good, "patches": ["0000"]},
        {**good, "patches": [{"patch": "0000"}]},
        {**good, "patches": [{"patch": "0007", "overlay": False}]},
        {key: good[key] for key in good if key != "patches"},
        [],
    ]
    for flaw in flaws:
        (saved / "stack.json").write_text(json.dumps(flaw), "utf-8")
        with pytest.raises(PatchError):
            session.load(saved)
        assert not session.is_edited


def test_a_file_in_place_of_saved_edits_is_named(session, tmp_path):
    (tmp_path / "facts.yaml").write_text("[]")
    with pytest.raises(PatchError, match=r"facts\.yaml is a file, not a folder of saved edits"):
        session.load(tmp_path / "facts.yaml")


def test_a_folder_that_holds_no_edit_is_named(session, tmp_path):
    with pytest.raises(PatchError, match="is no saved edit"):
        session.load(tmp_path / "nothing")


# -- writing ----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["tensors", "fsync", "manifest", "rename"])
def test_a_full_disk_leaves_the_earlier_save_and_nothing_else(
    session, saved, tmp_path, monkeypatch, where
):
    before = contents(tmp_path)
    session.load(saved)
    session.apply(based(session, weight_patch(session.host, 2)))
    edited = bits(session.model)

    with monkeypatch.context() as patched:
        if where == "tensors":
            patched.setattr("kedit_core.patch.save_file", full)
        elif where == "fsync":
            patched.setattr(os, "fsync", full)
        elif where == "manifest":
            patched.setattr(Path, "write_text", full)
        else:
            rename = Path.rename
            patched.setattr(
                Path,
                "rename",
                lambda self, to: full() if self.name.startswith(".edits") else rename(self, to),
            )
        with pytest.raises(PatchError, match="No space left"):
            session.save(saved)
        if where != "rename":
            with pytest.raises(PatchError, match="No space left"):
                session.stack[0].save(tmp_path / "patch")

    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["edits"]
    assert same(bits(session.model), edited)
    session.save(saved)
    session.rollback()
    session.load(saved)
    assert same(bits(session.model), edited)


def test_what_others_have_saved_since_is_not_replaced(session, saved):
    seen = read_stack(saved)
    session.load(seen)
    session.apply(based(session, weight_patch(session.host, 2)))
    more = tuple((patch, False) for patch in session.stack)
    mine = SavedStack(seen.model, seen.fingerprint, more)
    write_stack(saved, mine, instead_of=seen)
    before = contents(saved)
    pop_saved(saved)
    append_saved(saved, *more[1])  # as before, but not by who has read it
    assert contents(saved) == before

    with pytest.raises(EditError, match=r"has changed since it was read.*same command"):
        write_stack(saved, seen, instead_of=seen)
    assert contents(saved.parent) == {f"edits/{name}": text for name, text in before.items()}
    write_stack(saved, seen, instead_of=read_stack(saved))
    assert len(read_stack(saved).entries) == 1


def test_saving_again_replaces_the_earlier_save(session, saved):
    session.load(saved)
    session.apply(based(session, weight_patch(session.host, 2)))
    session.save(saved)
    session.pop()
    session.save(saved)
    assert sorted(p.name for p in saved.iterdir()) == ["0000", "stack.json"]


def test_what_is_no_saved_session_is_not_overwritten(session, tmp_path):
    session.apply(weight_patch(session.host, 1))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/diary.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("folder", "file"):
        with pytest.raises(PatchError, match="something else"):
            session.save(tmp_path / name)
        with pytest.raises(PatchError, match="exists already"):
            session.stack[0].save(tmp_path / name)
    assert (tmp_path / "folder/diary.txt").read_text() == (tmp_path / "file").read_text() == "dear"

    (tmp_path / "empty").mkdir()
    session.save(tmp_path / "empty")
    assert (tmp_path / "empty/stack.json").is_file()


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"effects": (None,)}, "None in the by-hand patch is no effect"),
        ({"state": {"count": 3}}, "State 'count' of the by-hand patch is no tensor"),
        ({"notes": {"loss": torch.ones(1)}}, "Note 'loss' .* is no JSON value: .* Tensor"),
        ({"notes": {"losses": [1.0, float("nan")]}}, "Note 'losses' .* is no JSON value"),
    ],
)
def test_what_could_not_be_saved_is_no_patch(parts, told):
    with pytest.raises(PatchError, match=told):
        Patch("by-hand", **{"effects": (), **parts})


@pytest.mark.parametrize(
    ("change", "kind"), [(torch.ones(2, 2, dtype=torch.int64), "torch.int64"), ([[1.0]], "list")]
)
def test_a_change_that_could_not_be_loaded_is_none(change, kind):
    with pytest.raises(PatchError, match=f"w is of {kind}, not a tensor of floating point"):
        WeightDelta(Site("w"), change)


def test_a_config_that_is_no_json_is_refused_when_saved(session, tmp_path):
    patch = Patch("by-hand", (CallEffect("preface", {"text": torch.ones(1)}),))
    with pytest.raises(PatchError, match="cannot be saved"):
        patch.save(tmp_path / "patch")
    assert not (tmp_path / "patch").exists()
