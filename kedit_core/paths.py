"""Folders that kedit writes to."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Folder for what can be made again: artifacts and converted weights.

    `KEDIT_CACHE` if it is set, else `kedit` in the user's cache folder (`XDG_CACHE_HOME`).
    """
    chosen = os.environ.get("KEDIT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kedit"
