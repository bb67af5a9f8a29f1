"""Files and folders appear whole or not at all."""

import json
import multiprocessing
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kedit_core import files
from kedit_core.files import new_file, new_folder, write_json

WRITERS, ROUNDS = 4, 20


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Stop(Exception):
    """What goes wrong half way."""


# -- files ---------------------------------------------------------------------------------------


def test_file_takes_its_place_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "a.txt"

    with new_file(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.parent == target.parent

    assert target.read_text() == "new"
    assert names(target.parent) == ["a.txt"]


@pytest.mark.parametrize("problem", [Stop, KeyboardInterrupt])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, problem):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def half():
        with new_file(target) as temporary:
            temporary.write_text("half")
            raise problem

    with pytest.raises(problem):
        half()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request):
    old = os.umask(request.param)
    yield
    os.umask(old)


@pytest.mark.usefixtures("umask")
def test_permissions_are_those_of_any_new_file(tmp_path):
    plain, folder = tmp_path / "plain", tmp_path / "plain-folder"
    plain.touch()
    folder.mkdir()

    with new_file(tmp_path / "a.txt") as a, new_folder(tmp_path / "b") as b:
        save_file({"x": torch.ones(1)}, a)  # alone, it lets nobody else read
        (b / "sub").mkdir()
        save_file({"x": torch.ones(1)}, b / "sub/x")

    def mode(path):
        return stat.S_IMODE(path.stat().st_mode)

    assert mode(tmp_path / "a.txt") == mode(tmp_path / "b/sub/x") == mode(plain)
    assert mode(tmp_path / "b") == mode(tmp_path / "b/sub") == mode(folder)


def test_json_is_readable_by_people(tmp_path):
    write_json(tmp_path / "a.json", {"name": "Zoë", "list": [1]})

    text = (tmp_path / "a.json").read_text("utf-8")
    assert json.loads(text) == {"name": "Zoë", "list": [1]}
    assert "Zoë" in text
    assert text.endswith("}\n")


def test_what_is_no_json_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"bad": object()})
    assert names(tmp_path) == []


# -- folders -------------------------------------------------------------------------------------


def test_folder_takes_its_place_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "a"

    with new_folder(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "x").write_text("new")
        assert not target.exists()

    assert (target / "sub" / "x").read_text() == "new"
    assert names(target.parent) == ["a"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("problem", [Stop, KeyboardInterrupt])
def test_failure_leaves_the_old_folder_and_nothing_else(tmp_path, problem, replace):
    target = tmp_path / "a"
    target.mkdir()
    (target / "x").write_text("old")

    def half():
        with new_folder(target, replace=replace) as temporary:
            (temporary / "x").write_text("half")
            raise problem

    with pytest.raises(problem):
        half()
    assert (target / "x").read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(("replace", "left"), [(False, {"x": "old"}), (True, {"y": "new"})])
def test_existing_folder_stays_unless_replaced(tmp_path, replace, left):
    target = tmp_path / "a"
    target.mkdir()
    (target / "x").write_text("old")

    with new_folder(target, replace=replace) as temporary:
        (temporary / "y").write_text("new")

    assert {p.name: p.read_text() for p in target.iterdir()} == left
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("replace", [False, True])
def test_file_in_the_folders_place_is_never_removed(tmp_path, replace):
    (tmp_path / "a").write_text("mine")

    def write():
        with new_folder(tmp_path / "a", replace=replace) as temporary:
            (temporary / "x").touch()

    with pytest.raises(OSError, match="a"):
        write()
    assert (tmp_path / "a").read_text() == "mine"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("problem", [OSError, KeyboardInterrupt])
def test_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path, monkeypatch, problem
):
    target, moves = tmp_path / "a", []
    target.mkdir()
    (target / "x").write_text("old")
    moved = files._moved

    def once(temporary, path):
        moves.append(path)
        if len(moves) > 1:
            raise problem
        return moved(temporary, path)

    monkeypatch.setattr(files, "_moved", once)
    with pytest.raises(problem), new_folder(target, replace=True) as temporary:
        (temporary / "x").write_text("new")
    assert (target / "x").read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", [".", "../a"])
def test_folder_one_is_in_can_be_replaced(tmp_path, monkeypatch, name):
    target = tmp_path / "a"
    target.mkdir()
    (target / "x").write_text("old")
    monkeypatch.chdir(target)

    with new_folder(Path(name), replace=True) as temporary:
        (temporary / "x").write_text("new")

    assert (target / "x").read_text() == "new"
    assert names(tmp_path) == ["a"]


# -- several writers -----------------------------------------------------------------------------


def write_often(target, kind, start):
    """Write the same path again and again; everything written by one process is equal."""
    me = str(os.getpid())
    start.wait()
    for _ in range(ROUNDS):
        if kind == "file":
            with new_file(target) as temporary:
                temporary.write_text(me * 1000)
        else:
            with new_folder(target, replace=kind == "replace") as temporary:
                for name in "xyz":
                    (temporary / name).write_text(me)


@pytest.mark.parametrize("kind", ["file", "keep", "replace"])
def test_concurrent_writers_leave_the_work_of_one(tmp_path, kind):
    context = multiprocessing.get_context("fork")
    target, start = tmp_path / "a", context.Event()
    writers = [
        context.Process(target=write_often, args=(target, kind, start)) for _ in range(WRITERS)
    ]
    for writer in writers:
        writer.start()
    start.set()
    for writer in writers:
        writer.join(60)

    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    assert names(tmp_path) == ["a"]
    if kind == "file":
        assert target.read_text() in {str(writer.pid) * 1000 for writer in writers}
    else:
        (author,) = {path.read_text() for path in target.iterdir()}
        assert names(target) == ["x", "y", "z"]
        assert author in {str(writer.pid) for writer in writers}
