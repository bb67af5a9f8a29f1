"""Names of models: registered, folders, hub ids, and everything else refused in a sentence."""

import json
from types import ModuleType

import pytest

from kedit_core import KEditError, ModelError, ModelSpec, UnknownNameError, discover, hookimpl
from kedit_core.models import check, config_facts, known_config, locate
from kedit_core.plugins import Catalog


def folder_of_it() -> str:
    return "/somewhere/tiny"


@pytest.fixture
def catalog(monkeypatch) -> Catalog:
    """A catalog with one model, `tiny-1m`."""
    monkeypatch.setattr("kedit_core.plugins._entry_points", list)
    plugin = ModuleType("plugin")
    spec = ModelSpec("tiny-1m", f"{__name__}:folder_of_it", "Tiny.", config={"model_type": "tiny"})

    @hookimpl
    def kedit_register_models():
        return [spec]

    plugin.kedit_register_models = kedit_register_models
    return discover(extra=[("tiny", plugin)])


@pytest.fixture
def folder(tmp_path):
    """A complete model folder, as far as can be told before weights are read."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "tiny", "hidden_size": 8}')
    (path / "tokenizer.json").write_text("{}")
    return path


def test_registered_name_is_located_by_its_plugin(catalog):
    check("tiny-1m", catalog)

    assert locate("tiny-1m", catalog) == "/somewhere/tiny"
    assert known_config("tiny-1m", catalog) == {"model_type": "tiny"}


def test_folder_is_taken_as_it_is(catalog, folder):
    check(str(folder), catalog)

    assert locate(str(folder), catalog) == str(folder)
    assert known_config(str(folder), catalog) == {"model_type": "tiny", "hidden_size": 8}


def test_folder_may_be_relative_or_begin_with_a_tilde(catalog, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))

    assert locate("model", catalog) == "model"
    assert locate("./model", catalog) == "model"
    assert locate("~/model", catalog) == str(folder)


def test_home_of_a_user_that_does_not_exist_is_no_folder(catalog):
    with pytest.raises(ModelError, match="folder ~nobody-of-that-name/model does not exist"):
        check("~nobody-of-that-name/model", catalog)


@pytest.mark.parametrize("tokenizer", ["tokenizer.model", "vocab.json", "spiece.model"])
def test_any_kind_of_tokenizer_file_counts(catalog, folder, tokenizer):
    (folder / "tokenizer.json").rename(folder / tokenizer)

    check(str(folder), catalog)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "has no config.json, so it is no model."),
        ("tokenizer.json", "has no tokenizer. Save it there with `tokenizer.save_pretrained("),
    ],
)
def test_incomplete_folder_says_what_is_missing(catalog, folder, missing, words):
    (folder / missing).unlink()

    with pytest.raises(ModelError) as caught:
        check(str(folder), catalog)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "~/none", "../none/there"])
def test_folder_that_does_not_exist_is_no_hub_id(catalog, name):
    with pytest.raises(ModelError, match="does not exist"):
        check(name, catalog)


@pytest.mark.parametrize("name", ["owner/model", "Own-er/Mo.del_1-2b"])
def test_hub_id_goes_through_untouched(catalog, name):
    assert locate(name, catalog) == name
    assert known_config(name, catalog) is None


@pytest.mark.parametrize("name", ["a/b/c", "owner/", "owner/two words", "a//b", "owner/model:x"])
def test_what_is_not_shaped_like_a_hub_id_is_refused(catalog, name):
    with pytest.raises(ModelError, match="a hub id has the form owner/name"):
        check(name, catalog)


def test_unknown_name_is_answered_with_the_nearest(catalog):
    with pytest.raises(
        UnknownNameError, match=r"There is no model 'tiny1m'\. Did you mean 'tiny-1m'"
    ):
        check("tiny1m", catalog)


def test_the_short_name_of_a_hub_model_is_answered_with_the_form_of_an_id(catalog):
    with pytest.raises(UnknownNameError) as caught:
        check("gpt2-xl", catalog)
    assert str(caught.value).endswith(
        "'gpt2-xl' is no folder either, and a hub id has the form owner/name."
    )


def test_first_party_model_that_is_missing_is_answered_with_its_package(catalog):
    with pytest.raises(UnknownNameError, match="pip install kedit-smollm2"):
        check("smollm2-135m", catalog)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"[1]", b'"x"'])
def test_broken_config_is_one_sentence(catalog, folder, content):
    (folder / "config.json").write_bytes(content)

    with pytest.raises(KEditError) as caught:
        known_config(str(folder), catalog)
    assert str(folder / "config.json") in str(caught.value)


def test_older_words_for_sizes_are_translated():
    assert config_facts({"n_embd": 8, "n_layer": 2, "n_inner": None, "vocab_size": 9}) == {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "intermediate_size": None,
        "vocab_size": 9,
    }


def test_sizes_of_the_text_part_count():
    config = {"model_type": "both", "text_config": {"model_type": "text", "n_embd": 8}}

    facts = config_facts(config)
    assert (facts["hidden_size"], facts["model_type"]) == (8, "text")


def test_looking_reads_no_weights(catalog, folder):
    """Neither the check nor the config needs a weight file to be there."""
    check(str(folder), catalog)

    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "tokenizer.json"]
    assert known_config(str(folder), catalog) == json.loads((folder / "config.json").read_text())
