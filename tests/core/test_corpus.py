"""Texts of datasets, and the sentence where there are none."""

from __future__ import annotations

import hashlib
import sys
import types

import pytest

from kedit_core.corpus import Corpus
from kedit_core.errors import ArtifactError


def datasets_with(monkeypatch, load) -> None:
    """Let the library `datasets` load with this function."""
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_cells_without_text_are_left_out(monkeypatch):
    rows = [{"text": text} for text in ("one", None, "  ", 3, "two")]
    datasets_with(monkeypatch, lambda *args, **kwargs: rows)
    assert list(Corpus("some/set").documents()) == ["one", "two"]


def test_a_file_may_begin_with_a_tilde_and_is_known_by_its_content(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("one\n\ntwo\n")

    corpus = Corpus("~/text.txt")
    assert list(corpus.documents()) == ["one\n", "two\n"]
    assert corpus.key() == {"file": hashlib.sha256(b"one\n\ntwo\n").hexdigest()}


def test_a_column_that_is_not_there_is_named(monkeypatch):
    datasets_with(monkeypatch, lambda *args, **kwargs: [{"body": "x"}])
    with pytest.raises(ArtifactError, match="no column 'text'"):
        list(Corpus("some/set").documents())


@pytest.mark.parametrize(("error", "said"), [(OSError(), r"OSError\(\)"), (OSError("a\nb"), "a$")])
def test_a_dataset_that_cannot_be_loaded_is_named_with_the_reason(monkeypatch, error, said):
    def load(*args, **kwargs):
        raise error

    datasets_with(monkeypatch, load)
    with pytest.raises(ArtifactError, match=f"'some/set' .*: {said}"):
        list(Corpus("some/set").documents())
