"""Files of a session: numbered patches and `stack.json`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError

from kedit_core.errors import EditError, PatchError
from kedit_core.files import new_folder, write_json
from kedit_core.patch import FORMAT, Patch, read_manifest

STACK = "stack.json"


@dataclass(frozen=True)
class SavedStack:
    """A session's edits without its model.

    Attributes:
        model: how the model was called.
        fingerprint: of the unedited model.
        entries: each patch, oldest first, and whether it lay over the weights.
    """

    model: str
    fingerprint: str
    entries: tuple[tuple[Patch, bool], ...]


def write_stack(folder: Path, saved: SavedStack) -> None:
    """Write the edits, whole or not at all; an earlier save in the folder is replaced.

    Raises:
        PatchError: the folder holds something else, or the disk refuses.
    """
    folder = Path(folder)
    is_ours = (folder / STACK).is_file() or (folder.is_dir() and not any(folder.iterdir()))
    if folder.exists() and not is_ours:
        raise PatchError(f"{folder} holds something else. Choose another folder.")
    try:
        with new_folder(folder, replace=True) as temporary:
            entries = []
            for number, (patch, overlay) in enumerate(saved.entries):
                name = f"{number:04d}"
                (temporary / name).mkdir()
                patch.write(temporary / name)
                entries.append({"patch": name, "overlay": overlay})
            head = {"format": FORMAT, "model": saved.model, "fingerprint": saved.fingerprint}
            write_json(temporary / STACK, head | {"patches": entries})
    except (OSError, SafetensorError, TypeError) as error:  # TypeError: notes that are no JSON
        raise PatchError(f"The edits cannot be saved in {folder}: {error}.") from None


def read_stack(folder: Path) -> SavedStack:
    """Read what `write_stack` wrote, or a single patch; no model is needed.

    Raises:
        PatchError: malformed, or a patch's name leads out of the folder.
    """
    folder = Path(folder)
    if not (folder / STACK).is_file():
        patch = Patch.load(folder)
        return SavedStack(patch.base.name, patch.base.fingerprint, ((patch, False),))
    data = read_manifest(folder / STACK)
    try:
        if data["format"] != FORMAT:
            raise PatchError(f"{folder}: format {data['format']}, this kedit reads {FORMAT}.")
        listed = [(str(entry["patch"]), bool(entry["overlay"])) for entry in data["patches"]]
        model, fingerprint = str(data["model"]), str(data["fingerprint"])
    except (KeyError, TypeError) as error:
        raise PatchError(f"{folder / STACK} is malformed: {error!r}.") from None
    entries = tuple((Patch.load(_inside(folder, name)), overlay) for name, overlay in listed)
    return SavedStack(model, fingerprint, entries)


def pop_saved(folder: Path) -> Patch:
    """Take the latest patch out of a saved session.

    Raises:
        PatchError: malformed.
        EditError: the session holds no patch.
    """
    saved = read_stack(folder)
    if not saved.entries:
        raise EditError(f"{folder} holds no edit, so there is none to take back.")
    write_stack(folder, replace(saved, entries=saved.entries[:-1]))
    return saved.entries[-1][0]


def _inside(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`.

    Raises:
        PatchError: the name leads out of the folder.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or len(pure.parts) != 1 or "\\" in name:
        raise PatchError(f"{folder}: '{name}' is a path outside the folder.")
    path = folder / name
    if path.is_symlink():
        raise PatchError(f"{folder}: '{name}' is a link; patches are plain folders.")
    return path
