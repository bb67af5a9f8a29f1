"""`ModelHost`: loading, what it refuses and in which words, and a model's identity."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as bars

from kedit_core.errors import ModelError, SiteError, UnknownNameError
from kedit_core.host import ModelHost
from kedit_core.plugins import discover
from kedit_core.sites import Site
from tests.core.families import HIDDEN, INNER, VOCABULARY, build


def tokenizer_of(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that fits the tiny models' vocabulary."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    words |= {f"w{index}": index for index in range(4, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)


def host_of(family: str) -> ModelHost:
    return ModelHost(build(family), tokenizer_of(), family)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of tiny models, as users have them; not to be written to."""
    root = tmp_path_factory.mktemp("saved")
    for family in ("gpt2", "llama", "t5"):
        build(family).save_pretrained(root / family)
        tokenizer_of(pad_token="<pad>").save_pretrained(root / family)
    return root


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the llama-like folder, to be broken."""
    return shutil.copytree(saved / "llama", tmp_path / "model")


def problem(name, **options) -> str:
    with pytest.raises(ModelError) as caught:
        ModelHost.load(str(name), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_folder_is_loaded_as_it_was_saved(saved, family):
    original = build(family)

    host = ModelHost.load(str(saved / family), device="cpu")

    assert type(host.model) is type(original)
    assert not host.model.training
    assert host.name == str(saved / family)
    loaded = host.model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in original.state_dict().items())
    assert (host.config["hidden_size"], len(host.blocks)) == (HIDDEN, 3)


@pytest.mark.parametrize("shown", [True, False])
def test_loading_shows_no_bar_without_a_terminal_and_leaves_the_setting(saved, capfd, shown):
    was_shown = bars.is_progress_bar_enabled()
    (bars.enable_progress_bar if shown else bars.disable_progress_bar)()
    try:
        ModelHost.load(str(saved / "llama"), device="cpu")

        assert "Loading weights" not in capfd.readouterr().err
        assert bars.is_progress_bar_enabled() is shown
    finally:
        (bars.enable_progress_bar if was_shown else bars.disable_progress_bar)()


def test_encoder_decoder_is_loaded_with_its_head(saved):
    host = ModelHost.load(str(saved / "t5"), device="cpu")

    assert host.is_encoder_decoder
    assert type(host.model).__name__ == "T5ForConditionalGeneration"
    assert len(host.blocks) == 3
    assert len(host.anatomy.encoder_blocks) == 2
    assert host.accepts("decoder_input_ids")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16])
def test_type_is_converted_when_asked(saved, dtype):
    host = ModelHost.load(str(saved / "llama"), device="cpu", dtype=dtype)

    assert host.dtype == (dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype))
    assert host.weight(host.mlp_out(0)).dtype == host.dtype


def test_type_of_the_checkpoint_is_kept(tmp_path):
    build("llama").bfloat16().save_pretrained(tmp_path)
    tokenizer_of().save_pretrained(tmp_path)

    assert ModelHost.load(str(tmp_path), device="cpu").dtype == torch.bfloat16


def test_tokenizer_without_a_pad_token_is_fine_and_left_alone(folder):
    tokenizer_of().save_pretrained(folder)

    host = ModelHost.load(str(folder), device="cpu")

    assert host.tokenizer.pad_token is None


def test_tokenizer_without_offsets_is_refused(monkeypatch):
    slow = tokenizer_of()
    monkeypatch.setattr(type(slow), "is_fast", False)

    with pytest.raises(ModelError, match="The tokenizer of tiny gives no character offsets"):
        ModelHost(build("llama"), slow, "tiny")


@pytest.mark.parametrize("dtype", ["float23", "bf16", "int8", "Tensor", ""])
def test_misspelt_type_is_refused(saved, dtype):
    assert problem(saved / "llama", dtype=dtype) == (
        f"'{dtype}' is no type for weights. Use float32, bfloat16 or float16."
    )


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "cuda:x"])
def test_misspelt_device_is_refused(saved, device):
    assert f"'{device}'" in problem(saved / "llama", device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_device_that_is_not_there_is_refused(saved):
    assert "on cuda" in problem(saved / "llama", device="cuda")


@pytest.fixture
def no_bfloat16(monkeypatch):
    """A machine whose matrix product knows no bfloat16, as some CPUs."""
    product = torch.nn.functional.linear

    def linear(x, *rest):
        if x.dtype == torch.bfloat16:
            raise RuntimeError("could not create a primitive\n(details)")
        return product(x, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)


def test_type_that_the_machine_cannot_compute_is_refused_before_reading(folder, no_bfloat16):
    (folder / "model.safetensors").unlink()

    assert problem(folder, device="cpu", dtype="bfloat16") == (
        "This machine cannot compute in torch.bfloat16 on cpu (could not create a primitive). "
        "Use --dtype float32."
    )


def test_a_machine_that_gives_no_reason_is_named_with_its_error(folder, monkeypatch):
    def linear(*args):
        raise RuntimeError

    monkeypatch.setattr(torch.nn.functional, "linear", linear)

    assert "on cpu (RuntimeError())." in problem(folder, device="cpu", dtype="bfloat16")


def test_so_is_a_checkpoint_of_that_type(tmp_path, no_bfloat16):
    build("llama").bfloat16().save_pretrained(tmp_path)
    tokenizer_of().save_pretrained(tmp_path)

    assert "Use --dtype float32" in problem(tmp_path, device="cpu")
    assert ModelHost.load(str(tmp_path), device="cpu", dtype="float32").dtype == torch.float32


# -- what cannot be loaded -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("tokenizer.json", "has no tokenizer. Save it there"),
        ("config.json", "has no config.json"),
        ("model.safetensors", "cannot be loaded: "),
    ],
)
def test_missing_file_is_named(folder, file, words):
    (folder / file).unlink()

    message = problem(folder)
    assert words in message
    assert str(folder) in message


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"junk", b"{}"])
def test_damaged_file_is_one_sentence(folder, file, content):
    (folder / file).write_bytes(content)

    assert f"The model '{folder}' cannot be loaded: " in problem(folder)


def test_weights_of_other_shapes_are_one_sentence(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))

    assert "cannot be loaded" in problem(folder)


def test_unknown_kind_of_model_is_one_sentence(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "odd"}))

    assert "cannot be loaded" in problem(folder)


def test_hub_id_that_cannot_be_reached_is_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    assert "The model 'nobody/nothing' cannot be loaded" in problem("nobody/nothing")


def test_unknown_name_is_refused_before_anything_is_read():
    with pytest.raises(UnknownNameError, match="There is no model 'xyzzy'"):
        ModelHost.load("xyzzy", catalog=discover())


# -- structure -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [3, -1, 99])
def test_layer_that_does_not_exist_says_how_many_there_are(layer):
    with pytest.raises(SiteError) as caught:
        host_of("llama").mlp_out(layer)
    assert str(caught.value).startswith(
        f"Layer {layer} does not exist: llama has 3 blocks (0 to 2). "
    )


def test_block_of_routed_experts_is_refused():
    with pytest.raises(SiteError, match=r"Block 1 of mixtral has routed experts .* no single"):
        host_of("mixtral").mlp_out(1)


def test_shared_expert_is_an_ordinary_mlp():
    site = host_of("deepseek_v3").mlp_out(1)

    assert (site.parameter.split(".")[-3], site.expert) == ("shared_experts", None)


@pytest.mark.parametrize(("family", "module"), [("gpt2", Conv1D), ("llama", torch.nn.Linear)])
def test_weight_is_out_by_in_whatever_the_module_stores(family, module):
    host = host_of(family)
    site = host.mlp_out(1)
    owner = host.module(site.module)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(INNER, generator=g)

    assert type(owner) is module
    assert site.transposed is (module is Conv1D)
    assert host.weight(site).shape == (HIDDEN, INNER)
    expected = owner(x) - (owner.bias if owner.bias is not None else 0)
    # One product of 64 terms in another order: a few float32 roundings.
    torch.testing.assert_close(host.weight(site) @ x, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weight_shares_memory_with_the_model(family):
    host = host_of(family)
    site = host.mlp_out(0)

    host.weight(site)[0, 1] = 42.0

    stored = host.model.get_parameter(site.parameter)
    assert (stored[1, 0] if site.transposed else stored[0, 1]) == 42.0


@pytest.mark.parametrize("path", ["model.layers.9", "model.nothing", "nothing"])
def test_module_that_does_not_exist_is_named(path):
    with pytest.raises(SiteError, match=f"llama has no module '{path}'"):
        host_of("llama").module(path)


def test_parameter_that_does_not_exist_is_named():
    host = host_of("llama")

    with pytest.raises(SiteError, match=r"llama has no parameter 'model.layers.0.mlp.nothing'"):
        host.weight(Site("model.layers.0.mlp.nothing"))


def test_vector_is_no_matrix_to_edit():
    with pytest.raises(SiteError, match=r"'model.norm.weight' is no matrix .*\(32,\)"):
        host_of("llama").parameter(Site("model.norm.weight"))


@pytest.mark.parametrize(("family", "length"), [("gpt2", 1024), ("bloom", None)])
def test_longest_input_is_what_the_config_says(family, length):
    assert host_of(family).max_length == length


# -- scratch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_puts_the_bits_back_after_an_exception(family, dtype):
    host = ModelHost(build(family).to(dtype), tokenizer_of(), family)
    sites = [host.mlp_out(0), host.mlp_out(2)]
    before = {k: v.clone() for k, v in host.model.state_dict().items()}
    owners = [host.model.get_parameter(site.parameter) for site in sites]

    def work():
        with host.scratch(*sites):
            for site in sites:
                host.weight(site).add_(0.1)
            assert not torch.equal(owners[0], before[sites[0].parameter])
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        work()

    after = host.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    now = [host.model.get_parameter(site.parameter) for site in sites]
    assert [id(parameter) for parameter in now] == [id(parameter) for parameter in owners]


def test_scratch_nests():
    host = host_of("llama")
    weight = host.weight(host.mlp_out(0))
    first = weight.clone()

    with host.scratch(host.mlp_out(0)):
        weight.fill_(1)
        with host.scratch(host.mlp_out(0)):
            weight.fill_(2)
        assert torch.equal(weight, torch.ones_like(weight))
    assert torch.equal(weight, first)


# -- identity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_fingerprint_changes_with_every_matrix(family):
    host = host_of(family)
    first = host.fingerprint()
    g = torch.Generator().manual_seed(0)

    for name, parameter in host.model.named_parameters():
        if parameter.ndim != 2:
            continue
        with torch.no_grad():
            kept = parameter.clone()
            rows, columns = parameter.shape
            left, right = torch.randn(rows, 1, generator=g), torch.randn(1, columns, generator=g)
            parameter.add_(left @ right * 1e-2)
            assert host.fingerprint() != first, name
            parameter.copy_(kept)
    assert host.fingerprint() == first


@pytest.mark.parametrize("axis", [0, 1])
def test_fingerprint_sees_a_single_row_or_column(axis):
    """An edit of a few neurons changes a few columns only."""
    host = host_of("llama")
    weight = host.weight(host.mlp_out(1))
    first = host.fingerprint()

    for n in range(weight.shape[axis]):
        with torch.no_grad():
            kept = weight.select(axis, n).clone()
            weight.select(axis, n).mul_(1.5)
            assert host.fingerprint() != first
            weight.select(axis, n).copy_(kept)


def test_fingerprint_changes_with_type_and_config():
    first = host_of("llama").fingerprint()
    narrow = ModelHost(build("llama").bfloat16(), tokenizer_of())
    turned = build("llama")
    turned.config.rms_norm_eps *= 2

    assert narrow.fingerprint() != first
    assert ModelHost(turned, tokenizer_of()).fingerprint() != first


def test_fingerprint_does_not_depend_on_name_path_or_use(saved, folder):
    first = ModelHost.load(str(saved / "llama"), device="cpu")
    other = ModelHost.load(str(folder), device="cpu")
    renamed = ModelHost(copy.deepcopy(first.model), tokenizer_of(), "another name")
    renamed.model.config.use_cache = False
    renamed.model.config.pad_token_id = 3
    renamed.model.config.output_hidden_states = True
    renamed.model.config.id2label = {0: "no"}

    assert first.model.config._name_or_path != other.model.config._name_or_path
    assert first.fingerprint() == other.fingerprint() == renamed.fingerprint()


def test_fingerprint_of_a_model_survives_saving(tmp_path):
    host = host_of("llama")
    first = host.fingerprint()
    host.model.save_pretrained(tmp_path)
    host.tokenizer.save_pretrained(tmp_path)

    assert ModelHost.load(str(tmp_path), device="cpu").fingerprint() == first


def test_checksum_is_of_all_bytes():
    host = host_of("gpt2")
    site = host.mlp_out(0)
    first = host.checksum(site)
    weight = host.weight(site)
    kept = weight[3, 5].clone()

    weight[3, 5] = torch.nextafter(kept, torch.tensor(9.0))
    assert host.checksum(site) != first
    weight[3, 5] = kept
    assert host.checksum(site) == first
    assert host.checksum(host.mlp_out(1)) != first
