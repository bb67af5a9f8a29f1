"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Force a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well."""
    path = _named(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors replaces the file by one that only its owner may read
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well.

    Where the folder exists already, it stays (somebody else was faster), unless `replace`.
    """
    path = _named(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    readers = temporary.stat().st_mode & 0o666
    replaced: list[Path] = []
    try:
        yield temporary
        for file in temporary.rglob("*"):
            file.chmod(file.stat().st_mode | readers)
            sync(file)
        sync(temporary)
        while not _moved(temporary, path) and replace:
            replaced.append(_beside(path))
            with contextlib.suppress(FileNotFoundError):  # another process set it aside
                path.rename(replaced[-1])
        sync(path.parent)
    except BaseException:
        if replaced:
            with contextlib.suppress(OSError):  # another process has put its own there
                replaced[-1].rename(path)
            if not path.exists():
                replaced.clear()  # rather one folder too many than none
        raise
    finally:
        for folder in (temporary, *replaced):
            shutil.rmtree(folder, ignore_errors=True)


def _named(path: Path) -> Path:
    """The path under a name of its own, which `.` and `..` are not."""
    return path.resolve() if path.name in ("", "..") else path


def _beside(path: Path) -> Path:
    """A new name in the same folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")


def _moved(temporary: Path, path: Path) -> bool:
    """Rename a folder to `path`; False where a folder with something in it is there."""
    try:
        temporary.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")
