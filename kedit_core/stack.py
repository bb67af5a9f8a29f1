"""Files of a session: numbered patches and `stack.json`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError

from kedit_core.errors import EditError, PatchError
from kedit_core.files import new_folder, write_json
from kedit_core.patch import FORMAT, Patch, check_format, malformed, read_manifest
from kedit_core.plugins import Catalog

STACK = "stack.json"


@dataclass(frozen=True)
class SavedStack:
    """A session's edits without its model.

    Attributes:
        model: how the model was called.
        fingerprint: of the unedited model.
        entries: each patch, oldest first, and whether it lay over the weights.
        version: of the `stack.json` that was read, see `write_stack`; None for a single patch.
    """

    model: str
    fingerprint: str
    entries: tuple[tuple[Patch, bool], ...]
    version: tuple[int, int] | None = field(default=None, compare=False)

    def latest_by(self, method: str) -> list[Patch]:
        """The patches at the end that one method made, oldest first."""
        found = takewhile(lambda entry: entry[0].method == method, reversed(self.entries))
        return [patch for patch, _ in found][::-1]


def write_stack(folder: Path, saved: SavedStack, instead_of: SavedStack | None = None) -> None:
    """Write the edits, whole or not at all; an earlier save in the folder is replaced.

    Args:
        folder: new, or of an earlier save.
        saved: what to write.
        instead_of: what was read in the folder, if only that may be replaced.

    Raises:
        PatchError: the folder holds something else, or the disk refuses.
        EditError: the folder no longer holds `instead_of`.
    """
    folder = Path(folder)
    check_replaceable(folder)
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
            if instead_of is not None and _version(folder) != instead_of.version:
                raise EditError(
                    f"{folder} has changed since it was read, so this edit is not saved. Run the "
                    f"same command again to add it to what is there now."
                )
    except (OSError, SafetensorError, TypeError) as error:  # TypeError: config that is no JSON
        raise PatchError(f"The edits cannot be saved in {folder}: {error}.") from None


def _version(folder: Path) -> tuple[int, int] | None:
    """Changes whenever `stack.json` is written; None where there is none."""
    try:
        found = (folder / STACK).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_mtime_ns


def check_replaceable(folder: Path) -> None:
    """Refuse a folder in which nothing may be saved.

    Raises:
        PatchError: it holds something else.
    """
    is_ours = (folder / STACK).is_file() or (folder.is_dir() and not any(folder.iterdir()))
    if folder.exists() and not is_ours:
        raise PatchError(f"{folder} holds something else. Choose another folder.")


def read_stack(folder: Path) -> SavedStack:
    """Read what `write_stack` wrote, or a single patch; no model is needed.

    Raises:
        PatchError: malformed, or a patch's name leads out of the folder.
    """
    folder = Path(folder)
    version = _version(folder)
    if version is None:
        patch = Patch.load(folder)
        return SavedStack(patch.base.name, patch.base.fingerprint, ((patch, False),))
    data = read_manifest(folder / STACK)
    try:
        check_format(folder, data["format"])
        listed = [(str(entry["patch"]), bool(entry["overlay"])) for entry in data["patches"]]
        model, fingerprint = str(data["model"]), str(data["fingerprint"])
    except (KeyError, TypeError) as error:
        raise malformed(folder / STACK, error) from None
    entries = tuple((Patch.load(_inside(folder, name)), overlay) for name, overlay in listed)
    return SavedStack(model, fingerprint, entries, version)


def count_saved(folder: Path) -> int:
    """How many patches a saved session has.

    Raises:
        PatchError: malformed.
    """
    data = read_manifest(folder / STACK)
    if not isinstance(data.get("patches"), list):
        raise PatchError(f"{folder / STACK} is malformed: its patches are no list.")
    return len(data["patches"])


def append_saved(folder: Path, patch: Patch, overlay: bool) -> None:
    """Add a patch to a saved session without writing the others again.

    Whoever reads the folder at any moment finds the session with the patch or without it.

    Raises:
        PatchError: malformed, or the disk refuses.
    """
    data = read_manifest(folder / STACK)
    try:
        numbers = [int(entry["patch"]) for entry in data["patches"]]
    except (KeyError, TypeError, ValueError) as error:
        raise malformed(folder / STACK, error) from None
    name = f"{max(numbers, default=-1) + 1:04d}"
    try:
        shutil.rmtree(
            folder / name, ignore_errors=True
        )  # a writer was stopped before it was listed
        with new_folder(folder / name) as temporary:
            patch.write(temporary)
        listed = [*data["patches"], {"patch": name, "overlay": overlay}]
        write_json(folder / STACK, data | {"patches": listed})
    except (OSError, SafetensorError, TypeError) as error:
        raise PatchError(f"The edit cannot be saved in {folder}: {error}.") from None


def pop_saved(folder: Path) -> Patch:
    """Take the latest patch out of a saved session.

    Raises:
        PatchError: malformed.
        EditError: the session holds no patch.
    """
    saved = read_stack(folder)
    if not saved.entries:
        raise EditError(f"{folder} holds no edit, so there is none to take back.")
    return _without(folder, saved, len(saved.entries) - 1)


def remove_saved(folder: Path, index: int, catalog: Catalog) -> Patch:
    """Take one patch out of a saved session, from among later ones where its method allows it.

    Raises:
        PatchError: malformed.
        EditError: there is no such patch, or later ones may build on it.
    """
    saved = read_stack(folder)
    patches = [patch for patch, _ in saved.entries]
    refuse_removal(patches, index, catalog)
    return _without(folder, saved, index)


def _without(folder: Path, saved: SavedStack, index: int) -> Patch:
    """Take a patch off the list first: whoever reads the folder finds a whole session."""
    check_replaceable(folder)
    data = read_manifest(folder / STACK)
    entry = data["patches"].pop(index)
    try:
        write_json(folder / STACK, data)
    except OSError as error:
        raise PatchError(f"The edits in {folder} cannot be changed: {error}.") from None
    shutil.rmtree(folder / entry["patch"], ignore_errors=True)
    return saved.entries[index][0]


def refuse_removal(stack: Sequence[Patch], index: int, catalog: Catalog) -> None:
    """Refuse to take out a patch on which later ones may build.

    Raises:
        EditError: there is no such patch, or its method does not allow it.
    """
    if not 0 <= index < len(stack):
        raise EditError(f"There is no edit {index}: {len(stack)} are there, counted from 0.")
    patch = stack[index]
    is_latest = index == len(stack) - 1
    if not is_latest and (patch.deltas or not catalog.method(patch.method).removable):
        raise EditError(
            f"Later edits may build on edit {index} ({patch.method}), so it cannot be taken back "
            f"alone. Roll back to before it, and make the later ones again."
        )


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
