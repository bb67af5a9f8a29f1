"""Saved edits: whole, readable, and for the weights that they were made on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch as replaced

import torch
from transformers import AutoModelForCausalLM

from kedit_core.errors import KEditError, PatchError
from kedit_core.host import ModelHost
from kedit_core.patch import TENSORS, Patch
from kedit_core.plugins import Catalog
from kedit_core.session import EditSession
from kedit_core.testing.bench import Bench
from kedit_core.testing.model_state import assert_same, model_state, patch_content
from kedit_core.testing.selection import only_for
from kedit_core.view import ModelView


def check_saved_edits_load_again(bench: Bench) -> None:
    """Saved, rolled back and loaded, an edit gives the same logits bit for bit."""
    session, folder = bench.edited(), bench.folder()
    logits = session.view().logits(bench.prompts())
    session.save(folder)
    session.rollback()
    session.load(folder)
    assert torch.equal(logits, session.view().logits(bench.prompts())), (
        "loaded again, the edit gives other logits."
    )


def check_saved_edits_load_onto_another_copy(bench: Bench) -> None:
    """Loaded onto a fresh copy of the model, an edit gives the same logits bit for bit."""
    session, other, folder = bench.edited(), bench.session(), bench.folder()
    session.save(folder)
    other.load(folder)
    assert torch.equal(
        session.view().logits(bench.prompts()), other.view().logits(bench.prompts())
    ), "on a fresh copy of the model, the loaded edit gives other logits."


def check_sequences_load_again(bench: Bench) -> None:
    """Two saved edits are loaded in their order, with the method's state."""
    bench.needs_sequences()
    session, other, folder = bench.edited(), bench.session(), bench.folder()
    bench.edit(session, bench.request("subject last"))
    session.save(folder)
    other.load(folder)
    saved, loaded = (list(map(patch_content, s.stack)) for s in (session, other))
    assert saved == loaded, "the loaded patches differ from the saved ones."
    assert_same(
        {"weights": model_state(session.host)["weights"]}, model_state(other.host), "Loaded again"
    )


def check_other_weights_are_refused(bench: Bench) -> None:
    """A saved edit is refused by other weights, which stay as they are."""
    folder, host = bench.folder(), bench.host()
    bench.edited().save(folder)
    with torch.no_grad():
        for parameter in host.model.parameters():
            parameter.view(-1)[0] += 1.0
    session = bench.session(host)
    before = model_state(host)
    _refuses(session, folder, "other weights")
    assert_same(before, model_state(host), "After the refusal")


def check_damaged_files_are_refused(bench: Bench) -> None:
    """A saved edit that was cut off is refused, and nothing changes."""
    folder = bench.folder()
    bench.edited().save(folder)
    file = next(folder.rglob(TENSORS))
    file.write_bytes(file.read_bytes()[:-1] if file.stat().st_size > 64 else b"")
    session = bench.session()
    before = model_state(session.host)
    _refuses(session, folder, "a file that was cut off")
    assert_same(before, model_state(session.host), "After the refusal")


def check_failing_disk_leaves_no_folder(bench: Bench) -> None:
    """When the disk is full, nothing half-written is left."""
    session, folder = bench.edited(), bench.folder() / "edits"
    _save_to_full_disk(session, folder)
    left = sorted(folder.parent.glob("*")) + sorted(folder.parent.glob(".*"))
    assert not left, f"the failed save left {left[0].name}."


def check_failing_disk_leaves_the_earlier_save(bench: Bench) -> None:
    """When the disk is full, what was saved before is still there, byte for byte."""
    session, folder = bench.edited(), bench.folder()
    session.save(folder)
    before = _contents(folder)
    _save_to_full_disk(session, folder)
    assert _contents(folder) == before, "the failed save changed the earlier one."


def check_manifest_is_strict_json_without_paths(bench: Bench) -> None:
    """What is saved as JSON has no NaN and names no place of this machine."""
    folder = bench.folder()
    bench.edited().save(folder)
    for file in folder.rglob("*.json"):
        data = json.loads(file.read_text("utf-8"), parse_constant=_refuse_constant)
        paths = [text for text in _texts(data) if Path(text).is_absolute()]
        assert not paths, f"{file.name} names the path {paths[0]!r}."


def check_patch_survives_its_file(bench: Bench) -> None:
    """A patch read from its file is the patch that was written."""
    folder, patch = bench.folder(), bench.patch()
    patch.save(folder)
    loaded = Patch.load(folder)
    assert patch_content(loaded) == patch_content(patch), "its numbers differ."
    for name in ("method", "requests", "plugin", "seed", "base"):
        assert getattr(loaded, name) == getattr(patch, name), f"its {name} differs."
    assert json.dumps(dict(loaded.hparams)) == json.dumps(dict(patch.hparams)), "hparams differ."


@only_for("weights")
def check_weight_patch_loads_without_its_plugin(bench: Bench) -> None:
    """Who gets a saved weight edit does not need the method's plugin."""
    folder = bench.folder()
    bench.edited().save(folder)
    session = EditSession(bench.host(), catalog=Catalog())
    session.load(folder)
    assert torch.equal(
        session.view().logits(bench.prompts()), bench.edited().view().logits(bench.prompts())
    ), "loaded without plugins, the edit gives other logits."


def check_export_is_a_checkpoint_or_refused(bench: Bench) -> None:
    """An exported folder loads with transformers alone and answers alike, or there is none."""
    from kedit_core.export import export_hf

    session, folder = bench.edited(), bench.folder()
    try:
        export_hf(session, folder)
    except KEditError:
        assert bench.spec.effect != "weights", "an edit of weights was refused."
        assert not folder.exists(), "a refused export left a folder."
        return
    model = AutoModelForCausalLM.from_pretrained(folder)
    exported = ModelView(ModelHost(model, bench.host().tokenizer)).logits(bench.prompts())
    # Folding a module sums in another order.
    edited = session.view().logits(bench.prompts())
    assert torch.allclose(exported, edited, rtol=1e-4, atol=1e-4), (
        "the exported model gives other logits."
    )


def _refuses(session: EditSession, folder: Path, what: str) -> None:
    try:
        session.load(folder)
    except PatchError:
        assert not session.is_edited, "a refused edit is in force."
    else:
        raise AssertionError(f"{what} was accepted.")


def _save_to_full_disk(session: EditSession, folder: Path) -> None:
    full = OSError(28, "No space left on device")
    with replaced("kedit_core.patch.save_file", side_effect=full):
        try:
            session.save(folder)
        except PatchError:
            return
    raise AssertionError("a save to a full disk reported no error.")


def _contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def _refuse_constant(name: str) -> NoReturn:
    raise AssertionError(f"the JSON holds {name}, which is no JSON.")


def _texts(data: object) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, dict):
        for key, value in data.items():
            yield from (key, *_texts(value))
    elif isinstance(data, list):
        for value in data:
            yield from _texts(value)
