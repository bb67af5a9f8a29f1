"""What is exported answers, without kedit, as the session does."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kedit_core import EffectSpec, hookimpl
from kedit_core.editing import EditSession, ModelHost, ModuleSwap, Patch, Site, WeightDelta
from kedit_core.errors import EditError, PatchError
from kedit_core.export import export_hf, export_peft
from kedit_core.plugins import discover
from kedit_core.testing.effects import Shift
from kedit_core.testing.toys import TOYS, toy_folder
from tests.core.edits import (
    based,
    bias_patch,
    bits,
    fact,
    hooks,
    logits,
    preface_patch,
    random_delta,
    same,
    shift_patch,
    weight_patch,
)
from tests.core.families import FAMILIES

EXPORTS = {"hf": export_hf, "peft": export_peft}

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed"
)

ASK = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
kind, *rest = sys.argv[1:]
prompts = ["Mira Voss lives in", "The country of Port Sable", "They say that Tamsin speaks"]
for base, folder, out in zip(*[iter(rest)] * 3):
    if kind == "hf":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        from peft import PeftModel
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, folder)
    model.eval()
    with torch.no_grad():
        rows = [tokenizer(p, return_tensors="pt")["input_ids"] for p in prompts]
        torch.save(torch.stack([model(input_ids=ids).logits[0, -1] for ids in rows]), out)
assert not any(name.startswith("kedit") for name in sys.modules)
"""


def ask_without_kedit(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """Last-token logits of the exports `folder/<toy>`, computed in a process without kedit."""
    arguments = []
    for toy in TOYS:
        arguments += [toy_folder(toy), folder / toy, folder / f"{toy}.pt"]
    command = [sys.executable, "-c", ASK, kind, *map(str, arguments)]
    subprocess.run(command, check=True, timeout=300, cwd=folder)
    return {toy: torch.load(folder / f"{toy}.pt") for toy in TOYS}


def edited(host: ModelHost) -> EditSession:
    """Two edits stacked on one matrix, one more beside the weights, and a real one."""
    session = EditSession(host)
    session.apply(based(session, weight_patch(host, 1, 2, seed=1)))
    session.apply(based(session, weight_patch(host, 1, seed=2)))
    session.apply(based(session, weight_patch(host, 1, seed=3)), overlay=True)
    hparams = {"layer": 2, "contexts": [], "second_moment": False, "steps": 4}
    session.edit("rome", fact(), hparams=hparams)
    return session


def test_a_checkpoint_answers_alike_without_kedit(toy_host, tmp_path):
    expected = {}
    for toy in TOYS:
        session = edited(toy_host(toy))
        export_hf(session, tmp_path / toy)
        expected[toy] = logits(session.host)

    found = ask_without_kedit("hf", tmp_path)

    for toy in TOYS:
        # An overlay is added to the output, its fold to the weight: float32 rounding only.
        torch.testing.assert_close(found[toy], expected[toy], rtol=1e-4, atol=1e-4)


@needs_peft
def test_an_adapter_answers_alike_without_kedit(toy_host, tmp_path):
    expected = {}
    for toy in TOYS:
        session = edited(toy_host(toy))
        export_peft(session, tmp_path / toy)
        expected[toy] = logits(session.host)

    found = ask_without_kedit("peft", tmp_path)

    for toy in TOYS:
        torch.testing.assert_close(found[toy], expected[toy], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_changed_in_place_are_exported_bit_for_bit(toy_host, tmp_path, dtype):
    for toy in TOYS:
        session = EditSession(toy_host(toy, dtype))
        session.apply(weight_patch(session.host, 1, 2))
        export_hf(session, tmp_path / toy)

        again = AutoModelForCausalLM.from_pretrained(tmp_path / toy)

        assert again.dtype == dtype
        assert same(bits(again), bits(session.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("toy", TOYS)
def test_a_folded_overlay_equals_the_edit_in_place(toy_host, tmp_path, toy, dtype):
    host = toy_host(toy, dtype)
    session = EditSession(host)
    patch = weight_patch(host, 1, 2)
    session.apply(patch)
    in_place = bits(host.model)
    session.rollback()
    session.apply(patch, overlay=True)

    export_hf(session, tmp_path / "model")

    assert same(bits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), in_place)


@pytest.mark.parametrize("first", ["in place", "beside"])
def test_folded_changes_below_the_precision_of_the_weights_add_up(toy_host, tmp_path, first):
    host = toy_host("llama", torch.bfloat16)
    site, session = host.mlp_out(1), EditSession(host)
    original = host.weight(site).float()
    tiny = original.abs().mean() * torch.finfo(torch.bfloat16).eps / 8
    step = Patch("by-hand", (WeightDelta(site, torch.full(tuple(original.shape), float(tiny))),))
    for number in range(32):
        session.apply(step, overlay=first == "beside" or number >= 16)

    export_hf(session, tmp_path / "model")

    found = load_file(tmp_path / "model/model.safetensors")[site.parameter].float()
    assert float((found - original).mean()) == pytest.approx(float(32 * tiny), rel=0.05)


def test_an_edit_in_place_of_tied_weights_reaches_both_names(toy_host, tmp_path):
    session = EditSession(toy_host("gpt2"))
    session.apply(
        Patch("by-hand", (random_delta(session.host, Site("lm_head.weight"), scale=0.01),))
    )
    export_hf(session, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert same(bits(again), bits(session.model))
    assert again.lm_head.weight is again.transformer.wte.weight


@pytest.mark.parametrize("kind", EXPORTS)
def test_exporting_leaves_the_session_as_it_was(host, tmp_path, kind):
    session = edited(host)
    before, config = bits(host.model), host.model.config.to_dict()
    stack, answers, hooked = session.stack, logits(host), hooks(host.model)

    EXPORTS[kind](session, tmp_path / "out")

    assert same(bits(host.model), before)
    assert host.model.config.to_dict() == config
    assert session.stack == stack
    assert hooks(host.model) == hooked
    assert torch.equal(logits(host), answers)


class FoldableScale(Shift):
    """Adds a multiple of the base's own output.  Config: `by`."""

    @classmethod
    def build(cls, base, swaps):
        wrapper = cls(base)
        wrapper.by = sum(float(swap.config["by"]) for swap in swaps)
        wrapper.own = torch.nn.Parameter(torch.ones(3))
        return wrapper

    @classmethod
    def fold(cls, base, swap):
        weight = base.weight.detach()
        turned = weight.T if type(base).__name__ == "Conv1D" else weight
        return turned * float(swap.config["by"]), None

    def change(self, output, *args, **kwargs):
        bias = getattr(self.base, "bias", None)
        return output + self.by * (output - (0 if bias is None else bias))


class WrongShape(FoldableScale):
    @classmethod
    def fold(cls, base, swap):
        return torch.ones(2, 2), None


class RankTwo(Shift):
    """Adds a product of rank two to the output.  State: `left` (d_out, 2), `right` (2, d_in)."""

    @classmethod
    def build(cls, base, swaps):
        wrapper = cls(base)
        wrapper.swaps = list(swaps)
        return wrapper

    @classmethod
    def fold(cls, base, swap):
        return swap.state["left"], swap.state["right"]

    def change(self, output, x):
        return output + sum(x @ s.state["right"].mT @ s.state["left"].mT for s in self.swaps)


class MisfitOfRankTwo(RankTwo):
    @classmethod
    def fold(cls, base, swap):
        return torch.ones(2, 2), torch.ones(2, 2)


def catalog():
    @hookimpl
    def kedit_register_effects():
        return [
            EffectSpec("scale", f"{__name__}:FoldableScale", "Scales an output."),
            EffectSpec("misfit", f"{__name__}:WrongShape", "Folds to a wrong shape."),
            EffectSpec("rank-two", f"{__name__}:RankTwo", "Adds a product."),
            EffectSpec("misfit-2", f"{__name__}:MisfitOfRankTwo", "Folds to a wrong shape."),
        ]

    module = types.ModuleType("foldable")
    module.kedit_register_effects = kedit_register_effects
    return discover([("foldable", module)])


def test_a_wrapped_module_is_folded_by_its_effect_type(host, tmp_path):
    session = EditSession(host, catalog=catalog())
    path = host.mlp_out(1).module
    session.apply(weight_patch(host, 1))
    session.apply(Patch("by-hand", (ModuleSwap(path, "scale", {"by": 0.5}),)))
    session.apply(shift_patch(host, host.mlp_out(2).module))
    session.pop()
    expected = logits(host)

    export_hf(session, tmp_path / "model")

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(toy_folder(host.name.removeprefix("toy-")))
    assert again.state_dict().keys() == plain.state_dict().keys()
    found = logits(ModelHost(again, host.tokenizer))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def rank_two_patch(host: ModelHost, layer: int, seed: int) -> Patch:
    delta = random_delta(host, host.mlp_out(layer), seed=seed)
    swap = ModuleSwap(delta.site.module, "rank-two", {}, {"left": delta.left, "right": delta.right})
    return Patch("by-hand", (swap,))


@needs_peft
def test_low_rank_folds_of_wrapped_modules_join_the_other_edits_in_an_adapter(toy_host, tmp_path):
    expected = {}
    for toy in TOYS:
        session = EditSession(toy_host(toy), catalog=catalog())
        session.apply(rank_two_patch(session.host, 1, seed=1))
        session.apply(weight_patch(session.host, 1, seed=2))
        session.apply(rank_two_patch(session.host, 1, seed=3))
        session.apply(rank_two_patch(session.host, 2, seed=4))
        export_peft(session, tmp_path / toy)
        expected[toy] = logits(session.host)

    found = ask_without_kedit("peft", tmp_path)

    for toy in TOYS:
        torch.testing.assert_close(found[toy], expected[toy], rtol=1e-4, atol=1e-4)


@needs_peft
@pytest.mark.parametrize(
    ("kind", "message"), [("scale", "dense.*--to hf"), ("misfit-2", r"shape \(2, 2\)")]
)
def test_a_wrapped_module_without_fitting_factors_is_no_adapter(host, tmp_path, kind, message):
    session = EditSession(host, catalog=catalog())
    session.apply(Patch("by-hand", (ModuleSwap(_path(host), kind, {"by": 1.0}),)))
    with pytest.raises(PatchError, match=message):
        export_peft(session, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_says_what_it_is_for(host, tmp_path):
    pytest.importorskip("peft")
    session = edited(host)
    export_peft(session, tmp_path / "adapter")

    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text("utf-8"))
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")

    one, two = host.mlp_out(1).module, host.mlp_out(2).module
    assert config["base_model_name_or_path"] == host.name
    assert config["task_type"] == "CAUSAL_LM"
    # Three random edits of rank 2 on one matrix; one of those and ROME's rank 1 on the other.
    assert config["rank_pattern"] == config["alpha_pattern"] == {one: 6, two: 3}
    assert config["fan_in_fan_out"] is host.mlp_out(1).transposed
    assert {tuple(t.shape)[::-1][-1] for n, t in tensors.items() if "lora_A" in n} == {3, 6}
    assert len(tensors) == 4


@pytest.mark.parametrize("kind", EXPORTS)
def test_no_path_of_this_machine_is_exported(tmp_path, kind):
    if kind == "peft":
        pytest.importorskip("peft")
    folder = toy_folder("llama")
    host = ModelHost.load(str(folder.resolve()), device="cpu")
    session = EditSession(host)
    session.apply(weight_patch(host, 1))

    EXPORTS[kind](session, tmp_path / "out")

    for file in (tmp_path / "out").rglob("*.json"):
        text = file.read_text("utf-8")
        assert str(folder.resolve().parent) not in text, file
        assert str(tmp_path) not in text, file


# -- refusals ---------------------------------------------------------------------------------


def dense_patch(host: ModelHost) -> Patch:
    site = host.mlp_out(1)
    return Patch("ft", (WeightDelta(site, torch.ones(tuple(host.weight(site).shape))),))


def _path(host: ModelHost) -> str:
    return host.mlp_out(1).module


REFUSED = [
    ("hf", lambda h: shift_patch(h, _path(h)), "Edit 1 .* no change of its weight matrix"),
    ("hf", lambda h: preface_patch("Lo! "), "Edit 1 .*'preface'.* no checkpoint can hold"),
    ("hf", lambda h: bias_patch(h, 3), "Edit 1 .*'token-bias'.* no checkpoint can hold"),
    ("peft", lambda h: shift_patch(h, _path(h)), "Edit 1 .* no LoRA adapter .* no change of its"),
    ("peft", lambda h: preface_patch("Lo! "), "Edit 1 .*'preface'.* no adapter can hold"),
    ("peft", dense_patch, "Edit 1 .*dense.*--to hf"),
    (
        "peft",
        lambda h: Patch("by-hand", (random_delta(h, Site(f"{h.anatomy.embedding}.weight")),)),
        "Edit 1 .*no linear layer.*--to hf",
    ),
]


@pytest.mark.parametrize(("kind", "make", "message"), REFUSED)
def test_what_the_format_cannot_hold_is_refused_with_the_reason(
    session, tmp_path, kind, make, message
):
    if kind == "peft":
        pytest.importorskip("peft")
    session.apply(weight_patch(session.host, 1))
    session.apply(make(session.host))
    before, config = bits(session.model), session.model.config.to_dict()

    with pytest.raises(PatchError, match=message):
        EXPORTS[kind](session, tmp_path / "out")

    assert list(tmp_path.iterdir()) == []
    assert same(bits(session.model), before)
    assert session.model.config.to_dict() == config


def test_an_expert_is_exported_to_a_checkpoint_but_not_to_an_adapter(toy_host, tmp_path):
    host = ModelHost(FAMILIES["mixtral"](), toy_host("llama").tokenizer, "experts")
    stacked = host.blocks[0].experts[0]
    session = EditSession(host)
    site = Site(stacked.parameter, stacked.transposed, expert=2)
    session.apply(Patch("by-hand", (random_delta(host, site),)))

    pytest.importorskip("peft")
    with pytest.raises(PatchError, match="expert"):
        export_peft(session, tmp_path / "adapter")
    export_hf(session, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert same(bits(again), bits(host.model))


def test_a_fold_of_a_wrong_shape_is_refused(host, tmp_path):
    session = EditSession(host, catalog=catalog())
    session.apply(Patch("by-hand", (ModuleSwap(_path(host), "misfit", {"by": 1.0}),)))
    with pytest.raises(PatchError, match=r"shape \(2, 2\)"):
        export_hf(session, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_overlay_of_a_shared_matrix_is_refused(toy_host, tmp_path):
    pytest.importorskip("peft")
    session = EditSession(toy_host("gpt2"))
    head = Patch("by-hand", (random_delta(session.host, Site("lm_head.weight")),))
    session.apply(head, overlay=True)
    for export in EXPORTS.values():
        with pytest.raises(PatchError, match="shared"):
            export(session, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_fold_that_overflows_is_refused(toy_host, tmp_path):
    host = toy_host("llama", torch.float16)
    session = EditSession(host)
    site = host.mlp_out(1)
    d_out, d_in = host.weight(site).shape
    huge = WeightDelta(site, torch.full((d_out, 1), 300.0), torch.full((1, d_in), 300.0))
    session.apply(Patch("by-hand", (huge,)), overlay=True)
    with pytest.raises(PatchError, match="overflow"):
        export_hf(session, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_existing_folder_is_not_touched(session, tmp_path, kind):
    session.apply(weight_patch(session.host, 1))
    (tmp_path / "out").mkdir()
    with pytest.raises(PatchError, match="exists already"):
        EXPORTS[kind](session, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_full_disk_leaves_no_folder(session, tmp_path, monkeypatch, kind):
    if kind == "peft":
        pytest.importorskip("peft")

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    session.apply(weight_patch(session.host, 1))
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PatchError, match="No space left"):
        EXPORTS[kind](session, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_exported_while_suspended_or_unedited(session, tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(PatchError, match="No edit is in force"):
        export_peft(session, tmp_path / "out")
    session.apply(weight_patch(session.host, 1))
    for export in EXPORTS.values():
        with session.suspended(), pytest.raises(EditError, match="suspended"):
            export(session, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_peft_one_sentence_says_what_to_install(session, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    session.apply(weight_patch(session.host, 1))
    with pytest.raises(PatchError, match="pip install peft"):
        export_peft(session, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
