"""The artifact store: what went in comes out, or nothing, or a sentence."""

import json

import pytest
import torch

from kedit_core.artifacts import ArtifactStore
from kedit_core.errors import ArtifactError

KEY = {"model": "abc", "module": "h.3.mlp", "settings": {"tokens": 100, "lengths": [1, 2]}}


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"moment": torch.randn(4, 4, generator=g), "count": torch.tensor(7)}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].dtype == expected[name].dtype
        assert torch.equal(got[name], expected[name])


def test_what_was_stored_comes_back(store):
    store.put("moment", KEY, tensors())

    assert_same(store.get("moment", KEY), tensors())


def test_tensors_that_share_memory_are_stored(store):
    both = torch.arange(6.0)
    given = {"one": both, "same": both, "part": both[:3]}
    store.put("moment", KEY, given)
    assert_same(store.get("moment", KEY), given)


def test_views_and_other_types_are_stored_as_they_look(store):
    base = torch.arange(12.0).reshape(3, 4)
    given = {"turned": base.mT, "row": base[1], "half": base.bfloat16(), "empty": base[:0]}

    store.put("odd", KEY, given)

    assert_same(store.get("odd", KEY), given)


def test_nothing_stored_is_none(store):
    assert store.get("moment", KEY) is None
    assert not store.root.exists()


def test_order_of_the_keys_does_not_matter(store):
    store.put("moment", KEY, tensors())
    settings = dict(reversed(KEY["settings"].items()))
    turned = {"settings": settings, "module": KEY["module"], "model": KEY["model"]}

    assert list(turned) != list(KEY)
    assert_same(store.get("moment", turned), tensors())


@pytest.mark.parametrize(
    "other",
    [
        {**KEY, "model": "abd"},
        {**KEY, "settings": {"tokens": 101, "lengths": [1, 2]}},
        {**KEY, "settings": {"tokens": 100, "lengths": [2, 1]}},
        {**KEY, "more": None},
        {k: v for k, v in KEY.items() if k != "module"},
        {**KEY, "settings": {"tokens": "100", "lengths": [1, 2]}},
    ],
)
def test_any_other_key_finds_nothing(store, other):
    store.put("moment", KEY, tensors())

    assert store.get("moment", other) is None


def test_kinds_are_apart(store):
    store.put("moment", KEY, tensors())

    assert store.get("projector", KEY) is None


def test_content_under_a_foreign_key_is_refused(store):
    store.put("moment", KEY, tensors())
    other = {**KEY, "model": "other"}
    store.folder("moment", KEY).rename(store.folder("moment", other))

    with pytest.raises(ArtifactError, match=r"belongs to another key\. Delete it"):
        store.get("moment", other)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tensors.safetensors", b"junk"),
        ("tensors.safetensors", b""),
        ("tensors.safetensors", None),
        ("key.json", b"{"),
        ("key.json", b"\xff"),
        ("key.json", None),
    ],
)
def test_damage_is_told_with_the_folder_to_delete(store, file, content):
    store.put("moment", KEY, tensors())
    folder = store.folder("moment", KEY)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)

    with pytest.raises(ArtifactError) as caught:
        store.get("moment", KEY)
    assert "is damaged" in str(caught.value)
    assert f"{folder}" in str(caught.value)
    assert "Delete that folder" in str(caught.value)


def test_truncated_tensors_are_damage(store):
    store.put("moment", KEY, tensors())
    file = store.folder("moment", KEY) / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])

    with pytest.raises(ArtifactError, match="is damaged"):
        store.get("moment", KEY)


def test_failed_store_leaves_nothing(store):
    with pytest.raises(TypeError):
        store.put("moment", {"bad": object()}, tensors())
    with pytest.raises(AttributeError):
        store.put("moment", KEY, {"moment": "no tensor"})

    assert [p for p in store.root.rglob("*") if p.is_file()] == []
    assert store.get("moment", KEY) is None


def test_who_comes_second_leaves_the_first_in_place(store):
    store.put("moment", KEY, tensors())
    store.put("moment", KEY, {"moment": torch.zeros(1)})

    assert_same(store.get("moment", KEY), tensors())


def test_disk_that_refuses_is_one_sentence(tmp_path):
    (tmp_path / "artifacts").write_text("in the way")

    with pytest.raises(ArtifactError, match="The moment cannot be stored in"):
        ArtifactStore(tmp_path / "artifacts").put("moment", KEY, tensors())


def test_root_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "mine"))
    assert ArtifactStore().root == tmp_path / "mine" / "artifacts"

    monkeypatch.delenv("KEDIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ArtifactStore().root == tmp_path / "xdg" / "kedit" / "artifacts"


def test_key_is_stored_readably_beside_the_content(store):
    store.put("moment", KEY, tensors())

    assert json.loads((store.folder("moment", KEY) / "key.json").read_text()) == KEY
