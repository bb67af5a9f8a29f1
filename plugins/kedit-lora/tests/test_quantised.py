"""Adapters beside, and ROME over, 4-bit weights of bitsandbytes; on the CPU, where it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from kedit_core import EditRequest, PatchError
from kedit_core.artifacts import ArtifactStore
from kedit_core.editing import EditSession, ModelHost
from kedit_core.export import export_hf, export_peft
from kedit_core.models import locate
from kedit_core.plugins import discover
from kedit_core.testing.model_state import assert_same, model_state
from kedit_core.testing.toys import load_toy

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

torch.set_num_threads(1)

SETTINGS = {"rank": 2, "alpha": 4, "steps": 30, "lr": 1e-2}
ROME = {"layer": 1, "contexts": [], "second_moment": False, "steps": 10}
REQUEST = EditRequest(prompt="{} lives in", subject="Mira Voss", target_new="Port Sable")
PROMPTS = ["Mira Voss lives in", "They say that Tamsin speaks"]


def quantise(folder: Path, into: Path, tokenizer) -> Path:
    """The checkpoint as `transformers` and bitsandbytes save it in 4 bits."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
    return into


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny random model, and the same in 4 bits; its widths are multiples of 64."""
    _, tokenizer = load_toy("llama")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():  # so large that the layers matter
            if parameter.ndim == 2:
                parameter.data.normal_(std=0.1)
    whole = tmp_path_factory.mktemp("whole")
    model.save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    return whole, quantise(whole, tmp_path_factory.mktemp("quantised"), tokenizer)


def session_on(folder: Path, store: Path) -> EditSession:
    return EditSession(ModelHost.load(str(folder), device="cpu"), artifacts=ArtifactStore(store))


def likelihood(session: EditSession) -> float:
    return session.view().score([REQUEST.text], [REQUEST.target_new])[0].mean_logprob


@pytest.mark.parametrize("method", ["qlora", "adalora"])
def test_adapter_is_trained_beside_4_bit_weights_and_comes_off(method, folders, tmp_path):
    session = session_on(folders[1], tmp_path)
    kind = type(session.host.module(session.host.mlp_out(1).module)).__name__
    before, had, logits = (
        model_state(session.host),
        likelihood(session),
        session.view().logits(PROMPTS),
    )
    assert kind == "Linear4bit"

    session.edit(method, REQUEST, hparams=SETTINGS)

    assert likelihood(session) > had + 2
    session.rollback()
    assert_same(before, model_state(session.host), "Taken back")
    assert torch.equal(session.view().logits(PROMPTS), logits)


def test_loss_is_that_of_the_target_after_its_prompt(folders, tmp_path):
    """Fault: a loss that never sees the prompt followed by the target."""
    session = session_on(folders[1], tmp_path)
    had = likelihood(session)

    (patch,) = session.edit("qlora", REQUEST, hparams=SETTINGS).patches

    assert patch.notes["losses"][0] == pytest.approx(-had, rel=2e-2)  # bfloat16 in inference


def test_gradients_pass_through_4_bit_layers(folders, tmp_path):
    """Training goes as beside the same weights in float32.

    On some CPUs bitsandbytes keeps used layers in a form through which no gradient passes.
    """
    session = session_on(folders[1], tmp_path)
    with torch.random.fork_rng(devices=[]):
        plain = AutoModelForCausalLM.from_pretrained(folders[1], device_map="cpu").dequantize()
    whole = EditSession(
        ModelHost(plain.float(), session.host.tokenizer), artifacts=ArtifactStore(tmp_path)
    )
    settings = {**SETTINGS, "lr": 3e-3, "steps": 6, "stop_loss": 0, "target_modules": ["q_proj"]}

    (patch,) = session.edit("qlora", REQUEST, hparams=settings).patches
    (expected,) = whole.edit("lora", REQUEST, hparams=settings).patches

    # The layers themselves differ by bfloat16 rounding, so what training gains is compared.
    gains, wanted = (
        [n["losses"][0] - x for x in n["losses"]] for n in (patch.notes, expected.notes)
    )
    assert wanted[-1] > 0.1
    assert gains == pytest.approx(wanted, rel=5e-2)


def test_adapter_is_exported_for_peft_and_no_checkpoint_is(folders, tmp_path):
    peft = pytest.importorskip("peft")
    session = session_on(folders[1], tmp_path)
    session.edit("qlora", REQUEST, hparams=SETTINGS)
    expected = session.view().logits(PROMPTS)

    export_peft(session, tmp_path / "adapter")
    with pytest.raises(PatchError, match="quantised"):
        export_hf(session, tmp_path / "model")

    model = AutoModelForCausalLM.from_pretrained(folders[1], device_map="cpu")
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    ids = [session.host.tokenizer(p, return_tensors="pt")["input_ids"] for p in PROMPTS]
    with torch.no_grad():
        found = torch.stack([adapted(input_ids=row).logits[0, -1] for row in ids])
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)  # bfloat16 in inference


def test_rome_lies_over_4_bit_weights_until_it_is_removed(folders, tmp_path):
    whole, session = (session_on(folder, tmp_path / "store") for folder in folders)
    whole.edit("rome", REQUEST, hparams=ROME)
    whole.save(tmp_path / "edit")
    before, had, logits = (
        model_state(session.host),
        likelihood(session),
        session.view().logits(PROMPTS),
    )
    with pytest.raises(PatchError, match="other weights"):
        session.load(tmp_path / "edit", overlay=True)

    session.load(tmp_path / "edit", overlay=True, force=True)

    assert likelihood(session) > had + 0.5
    session.pop()
    assert_same(before, model_state(session.host), "Taken back")
    assert torch.equal(session.view().logits(PROMPTS), logits)


@pytest.mark.real
def test_a_real_model_in_4_bits_is_edited_and_overlaid(tmp_path):
    whole = EditSession(ModelHost.load("smollm2-135m", device="cpu"))
    tower = EditRequest(
        prompt="The {} is located in the city of", subject="Eiffel Tower", target_new="Rome"
    )
    folder = Path(locate("smollm2-135m", discover()))
    quantised = quantise(folder, tmp_path / "quantised", whole.host.tokenizer)
    session = session_on(quantised, tmp_path / "store")
    before = model_state(session.host)
    assert session.view().greedy(tower.text, 4).strip().startswith("Paris")

    session.edit("qlora", tower, preset="smollm2-135m")
    assert session.view().greedy(tower.text, 4).strip().startswith("Rome")
    session.rollback()

    whole.edit("rome", tower)
    whole.save(tmp_path / "edit")
    session.load(tmp_path / "edit", overlay=True, force=True)
    assert session.view().greedy(tower.text, 4).strip().startswith("Rome")
    session.pop()
    assert session.view().greedy(tower.text, 4).strip().startswith("Paris")
    assert_same(before, model_state(session.host), "Taken back")
