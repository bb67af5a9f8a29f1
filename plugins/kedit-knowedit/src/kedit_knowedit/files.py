"""Where a subset's file is in the folder of KnowEdit."""

from __future__ import annotations

from pathlib import Path

from kedit_core import Source, files_in


def file_of(source: Source | None, name: str) -> Source:
    """The source itself; of a folder, the file of this name: test, else validation, else training.

    Args:
        source: what the user names.
        name: the file's name, with `{}` where the split stands.

    Raises:
        DataError: the folder has no such file.
    """
    assert source is not None, "the spec says that a path is needed"
    if not Path(source).is_dir():
        return source
    names = [name.format(split) for split in ("test", "val", "train")]
    return min(files_in(source, *names), key=lambda file: [not file.match(n) for n in names])
