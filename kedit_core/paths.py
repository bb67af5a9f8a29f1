"""Paths as users write them, and the folder that kedit writes to."""

from __future__ import annotations

import os
from pathlib import Path


def is_path(text: str) -> bool:
    """Whether what may be a name is meant as a path: absolute, or begun with `.` or `~`."""
    return Path(text).is_absolute() or text.startswith((".", "~"))


def expanded(text: str) -> Path:
    """The path; `~` at its beginning, which shells leave there after `--option=`, is the home."""
    return Path(os.path.expanduser(text))


def cache_root() -> Path:
    """Folder for what can be made again: artifacts and converted weights.

    `KEDIT_CACHE` if it is set, else `kedit` in the user's cache folder (`XDG_CACHE_HOME`).
    """
    chosen = os.environ.get("KEDIT_CACHE")
    if chosen:
        return expanded(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kedit"
