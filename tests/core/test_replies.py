"""Replies on disk come back, all of a call or none, and a file that cannot be used is told."""

from __future__ import annotations

import pytest

from kedit_core import ArtifactError
from kedit_core.replies import Replies


def test_replies_come_back_by_key(tmp_path):
    Replies(tmp_path / "a" / "kept.sqlite").put({"x": "1", "y": "…\n"})
    kept = Replies(tmp_path / "a" / "kept.sqlite")
    kept.put({"x": "2"})

    assert kept.get(["y", "x", "z"]) == {"y": "…\n", "x": "2"}
    assert Replies(tmp_path / "b.sqlite").get(["x"]) == {}


def test_of_replies_that_cannot_all_be_kept_none_is(tmp_path):
    kept = Replies(tmp_path / "kept.sqlite")

    with pytest.raises(ArtifactError):
        kept.put({"x": "1", "y": object()})

    assert kept.get(["x"]) == {}


@pytest.mark.parametrize("use", [lambda kept: kept.get(["x"]), lambda kept: kept.put({"x": "1"})])
def test_what_cannot_be_used_is_one_sentence(use, tmp_path):
    damaged, folder = tmp_path / "damaged.sqlite", tmp_path / "folder"
    damaged.write_text("no database at all")
    folder.mkdir()

    for path in (damaged, folder, damaged / "below.sqlite"):
        with pytest.raises(ArtifactError, match=rf"{path} cannot be used: .*\. Delete that file"):
            use(Replies(path))
