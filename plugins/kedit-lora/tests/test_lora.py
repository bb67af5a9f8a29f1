"""LoRA and AdaLoRA on the toy models, against a second implementation, and the presets."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kedit_lora.effect import LowRank
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from kedit_core import (
    EditError,
    EditRequest,
    ModelError,
    PatchError,
    SettingError,
    SiteError,
    discover,
)
from kedit_core.artifacts import ArtifactStore
from kedit_core.editing import EditSession, ModelHost, ModuleSwap, Patch, WeightDelta
from kedit_core.export import export_hf, export_peft
from kedit_core.hparams import presets_of, resolve
from kedit_core.models import config_facts
from kedit_core.testing.toys import TOYS, ToyFact, load_toy, toy_facts, toy_folder

torch.set_num_threads(1)

METHODS = ("lora", "adalora")
SETTINGS = {"rank": 2, "alpha": 4, "steps": 20, "lr": 1e-2}


def session_on(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> EditSession:
    model, tokenizer = load_toy(name, dtype)
    return EditSession(ModelHost(model, tokenizer, f"toy-{name}"), artifacts=ArtifactStore(folder))


def text_of(fact: ToyFact) -> str:
    return fact.prompt.replace("{}", fact.subject)


def request_of(fact: ToyFact) -> EditRequest:
    """No subject: adapters need none."""
    return EditRequest(prompt=text_of(fact), target_new=fact.target_new)


def facts(count: int) -> list[ToyFact]:
    """Facts about different subjects, of different lengths."""
    return list(toy_facts())[1 : 1 + 3 * count : 3]


def answers(session: EditSession, fact: ToyFact) -> str:
    return session.view().greedy(text_of(fact), max_new_tokens=8).strip()


def swaps(patch: Patch) -> dict[str, ModuleSwap]:
    return {swap.path: swap for swap in patch.effects}


def product(swap: ModuleSwap) -> Tensor:
    """ΔW (d_out, d_in)."""
    state = swap.state
    return state["scale"] * state["B"] @ state["A"]


def targets_of(toy: str) -> list[str]:
    return {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}[toy]


# -- what an edit is ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("toy", TOYS)
def test_target_becomes_the_greedy_answer_until_it_is_rolled_back(toy, method, tmp_path):
    session = session_on(toy, tmp_path)
    modules = dict(session.model.named_modules())
    weights = {name: p.clone() for name, p in session.model.named_parameters()}
    for fact in facts(3):
        assert answers(session, fact).startswith(fact.answer)

        session.edit(method, request_of(fact), hparams=SETTINGS)

        assert answers(session, fact).startswith(fact.target_new)
        session.rollback()
        assert dict(session.model.named_modules()) == modules
        for name, parameter in session.model.named_parameters():
            assert torch.equal(parameter, weights[name])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("toy", TOYS)
def test_model_holds_nothing_of_peft_after_an_edit(toy, method, tmp_path):
    """Faults: a model that is no PeftModel yet full of its layers, wrappers in wrappers."""
    session = session_on(toy, tmp_path)
    kind = type(session.model)
    for fact in facts(3):
        session.edit(method, request_of(fact), hparams=SETTINGS)

    assert type(session.model) is kind
    assert not any(isinstance(m, BaseTunerLayer) for m in session.model.modules())
    assert not hasattr(session.model, "peft_config")
    wrappers = [m for m in session.model.modules() if isinstance(m, LowRank)]
    assert wrappers
    assert not any(isinstance(w.base, LowRank) for w in wrappers)  # one for all edits


@pytest.mark.parametrize("method", METHODS)
def test_failing_training_leaves_nothing_of_peft(method, tmp_path, monkeypatch):
    session = session_on("llama", tmp_path)
    modules = dict(session.model.named_modules())
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        session.edit(method, request_of(facts(1)[0]), hparams=SETTINGS)

    assert dict(session.model.named_modules()) == modules
    assert not session.is_edited


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_state_is_float32_and_small(method, dtype, tmp_path):
    session = session_on("llama", tmp_path, dtype)
    fact = facts(1)[0]

    (patch,) = session.edit(method, request_of(fact), hparams=SETTINGS).patches

    for swap in patch.effects:
        assert {t.dtype for t in swap.state.values()} == {torch.float32}
        rank = len(swap.state["A"])
        assert swap.state["B"].shape[1] == rank == patch.notes["ranks"][swap.path]
    assert answers(session, fact).startswith(fact.target_new)


# -- LoRA against a second implementation ---------------------------------------------------------


def lora_by_hand(toy: str, names: list[str], chosen: list[ToyFact], start, steps: int, scale):
    """Adam on factors beside the weights of a fresh toy, row by row; ΔW by path, and losses."""
    model, tokenizer = load_toy(toy)
    model.requires_grad_(False)
    factors = {path: (a.clone(), torch.zeros(b.shape)) for path, (a, b) in start.items()}
    for path, pair in factors.items():
        for factor in pair:
            factor.requires_grad_(True)
        model.get_submodule(path).register_forward_hook(
            lambda m, args, out, pair=pair: out + scale * (args[0] @ pair[0].T @ pair[1].T)
        )
    adam = torch.optim.Adam([f for pair in factors.values() for f in pair], lr=1e-2)
    history = []
    for _ in range(steps):
        adam.zero_grad()
        losses = []
        for fact in chosen:
            prompt = tokenizer(text_of(fact))["input_ids"]
            whole = tokenizer(f"{text_of(fact)} {fact.target_new}")["input_ids"]
            logits = model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1]
            losses.append(cross_entropy(logits, torch.tensor(whole[len(prompt) :])))
        loss = sum(losses) / len(losses)
        history.append(float(loss.detach()))
        loss.backward()
        adam.step()
    return {path: scale * (b @ a).detach() for path, (a, b) in factors.items()}, history


@pytest.mark.parametrize("toy", TOYS)
def test_adapter_equals_training_the_factors_by_hand(toy, tmp_path):
    """Faults: labels on the prompt or on padding, a BOS as target, another scale than α/r."""
    chosen = facts(4)
    settings = {**SETTINGS, "target_modules": targets_of(toy), "steps": 4, "stop_loss": 0}
    session = session_on(toy, tmp_path)
    requests = [request_of(fact) for fact in chosen]
    (untrained,) = session.edit("lora", requests, hparams={**settings, "lr": 1e-30}).patches
    start = {p: (s.state["A"], s.state["B"]) for p, s in swaps(untrained).items()}
    session.rollback()

    (patch,) = session.edit("lora", requests, hparams=settings).patches

    expected, history = lora_by_hand(toy, targets_of(toy), chosen, start, steps=4, scale=2.0)
    assert patch.notes["losses"] == pytest.approx(history, rel=1e-3)
    assert swaps(patch).keys() == expected.keys()
    for path, swap in swaps(patch).items():
        # Adam turns a rounding error in a gradient near zero into a part of a step.
        assert float((product(swap) - expected[path]).norm()) < 2e-2 * float(expected[path].norm())


@pytest.mark.parametrize("toy", TOYS)
def test_batches_are_trained_one_after_another(toy, tmp_path):
    session = session_on(toy, tmp_path)
    chosen = facts(3)
    settings = {**SETTINGS, "batch_size": 2}

    (patch,) = session.edit("lora", [request_of(f) for f in chosen], hparams=settings).patches

    assert len(patch.requests) == 3
    for fact in chosen:
        assert answers(session, fact).startswith(fact.target_new)


def test_training_stops_when_the_loss_is_small(tmp_path):
    session = session_on("llama", tmp_path)
    request = request_of(facts(1)[0])

    (patch,) = session.edit("lora", request, hparams={**SETTINGS, "stop_loss": 0.05}).patches

    losses = patch.notes["losses"]
    assert len(losses) < 20
    assert losses[-1] < 0.05 <= losses[-2]


def test_only_adapters_are_trained(tmp_path, monkeypatch):
    """Fault: an optimiser over all parameters, frozen ones included."""
    session = session_on("llama", tmp_path)
    given, own = [], torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda ps, lr: given.extend(ps) or own(ps, lr=lr))

    (patch,) = session.edit("lora", request_of(facts(1)[0]), hparams=SETTINGS).patches

    trained = sum(p.numel() for p in given)
    assert trained == sum(s.state["A"].numel() + s.state["B"].numel() for s in patch.effects)
    assert all(p.grad is None for p in session.model.parameters())


@pytest.mark.parametrize("toy", TOYS)
def test_adapters_are_where_the_settings_say(toy, tmp_path):
    session = session_on(toy, tmp_path)
    names = targets_of(toy)
    settings = {**SETTINGS, "target_modules": names, "layers": [3, 2]}

    (patch,) = session.edit("lora", request_of(facts(1)[0]), hparams=settings).patches

    paths = list(swaps(patch))
    assert len(paths) == 2 * len(names)
    for path in paths:
        assert path.split(".")[2] in ("2", "3")
        assert path.rpartition(".")[2] in names


@pytest.mark.parametrize("toy", TOYS)
def test_blocks_below_the_adapters_run_once(toy, tmp_path):
    session = session_on(toy, tmp_path)
    passes = []
    below = session.host.module(session.host.mlp_out(0).module)
    below.register_forward_hook(lambda *_: passes.append(1))
    settings = {**SETTINGS, "layers": [2, 3], "steps": 6, "stop_loss": 0}

    session.edit("lora", request_of(facts(1)[0]), hparams=settings)

    assert sum(passes) == 1


# -- AdaLoRA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", TOYS)
def test_ranks_are_pruned_to_the_budget_over_all_layers(toy, tmp_path):
    """Faults: no allocation at all, `rank` unread, and a PEFT that wants `total_step`."""
    session = session_on(toy, tmp_path)
    settings = {**SETTINGS, "initial_rank": 6}

    (patch,) = session.edit("adalora", request_of(facts(1)[0]), hparams=settings).patches

    n_layers = len(session.host.blocks) * {"gpt2": 4, "llama": 7}[toy]
    ranks = patch.notes["ranks"]
    assert sum(ranks.values()) == 2 * n_layers
    assert len(set(ranks.values())) > 1  # given by importance, not evenly
    assert max(ranks.values()) <= 6
    for swap in patch.effects:
        assert float(swap.state["scale"]) == pytest.approx(4 / 6, rel=1e-4)  # α/r, and not α/12


def test_module_without_any_rank_left_is_not_wrapped(tmp_path):
    session = session_on("llama", tmp_path)
    settings = {**SETTINGS, "rank": 1, "initial_rank": 12}

    (patch,) = session.edit("adalora", request_of(facts(1)[0]), hparams=settings).patches

    wrapped = {n for n, m in session.model.named_modules() if isinstance(m, LowRank)}
    assert len(wrapped) < 28
    assert wrapped == set(swaps(patch)) == set(patch.notes["ranks"])
    assert all(rank > 0 for rank in patch.notes["ranks"].values())


@pytest.mark.parametrize("steps", [2, 3, 7, 10])
def test_budget_is_reached_however_few_steps_there_are(steps, tmp_path):
    session = session_on("llama", tmp_path)
    settings = {**SETTINGS, "initial_rank": 4, "steps": steps, "stop_loss": 100}

    (patch,) = session.edit("adalora", request_of(facts(1)[0]), hparams=settings).patches

    assert sum(patch.notes["ranks"].values()) == 2 * 28
    assert len(patch.notes["losses"]) <= steps


def test_training_goes_on_until_ranks_are_pruned(tmp_path):
    """Small loss or not: 20 steps, of which the last six are for what is left."""
    session = session_on("llama", tmp_path)
    settings = {**SETTINGS, "initial_rank": 4, "stop_loss": 100}

    (patch,) = session.edit("adalora", request_of(facts(1)[0]), hparams=settings).patches

    assert len(patch.notes["losses"]) == 15


@pytest.mark.parametrize("earlier", [0, 1])
def test_factors_are_kept_orthogonal_in_every_edit(earlier, tmp_path):
    """Fault: a second edit without the penalty."""
    off = {}
    for weight in (0.0, 5.0):
        session = session_on("llama", tmp_path)
        settings = {**SETTINGS, "initial_rank": 4, "stop_loss": 0, "orthogonality": weight}
        for fact in facts(1 + earlier):
            session.edit("adalora", request_of(fact), hparams=settings)
        gaps = []
        for swap in session.stack[-1].effects:
            columns = swap.state["B"]
            gaps.append(float((columns.T @ columns - torch.eye(columns.shape[1])).norm()))
        off[weight] = sum(gaps) / len(gaps)

    assert off[5.0] < 0.75 * off[0.0]


def test_initial_rank_must_leave_something_to_prune():
    with pytest.raises(SettingError, match="larger than rank"):
        resolve(discover().method("adalora"), settings={"rank": 8, "initial_rank": 8})


# -- many edits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_edits_add_up_and_any_one_can_be_taken_back(method, tmp_path):
    """Fault: a second edit that forgets the first one, or goes on training it."""
    session = session_on("llama", tmp_path)
    chosen = facts(3)
    alone = None
    for number, fact in enumerate(chosen):
        session.edit(method, request_of(fact), hparams={**SETTINGS, "layers": [1, 2]})
        if number == 0:
            alone = {p: product(s) for p, s in swaps(session.stack[0]).items()}
    for path, expected in alone.items():
        assert torch.equal(product(swaps(session.stack[0])[path]), expected)
    with_all = session.view().logits([text_of(chosen[0])])

    removed = session.remove(1)

    expected = session_on("llama", tmp_path)
    for patch in session.stack:
        expected.apply(patch)
    prompts = [text_of(fact) for fact in chosen]
    assert torch.equal(session.view().logits(prompts), expected.view().logits(prompts))
    assert answers(session, chosen[1]) != chosen[1].target_new
    assert not torch.equal(session.view().logits([text_of(chosen[0])]), with_all)
    assert removed.requests[0].target_new == chosen[1].target_new


@pytest.mark.parametrize("toy", TOYS)
def test_wrapper_computes_what_the_folded_weights_compute(toy, tmp_path):
    session = session_on(toy, tmp_path)
    for fact in facts(2):
        session.edit("lora", request_of(fact), hparams=SETTINGS)
    logits = session.view().logits([text_of(f) for f in facts(2)])
    deltas = [d for patch in session.stack for d in folded(session, patch)]
    session.rollback()

    session.apply(Patch("by-hand", tuple(deltas)))

    found = session.view().logits([text_of(f) for f in facts(2)])
    torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-3)  # other order of sums


def folded(session: EditSession, patch: Patch) -> list[WeightDelta]:
    sites = {}
    for block in session.host.blocks:
        for site in (block.mlp_out, *block.mlp_in, block.attention_out):
            sites[site.module] = site
    found = []
    for swap in patch.effects:
        base = session.host.base_module(swap.path)
        site = sites.get(swap.path)
        if site is None:
            kind = type(next(iter(sites.values())))
            transposed = type(base).__name__ == "Conv1D"
            site = kind(f"{swap.path}.weight", transposed)
        found.append(WeightDelta(site, *LowRank.fold(base, swap)))
    return found


# -- randomness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_the_jobs_and_nobody_elses(method, tmp_path):
    """Fault: runs that differ for the same seed."""
    request = request_of(facts(1)[0])
    settings = {**SETTINGS, "dropout": 0.3, "steps": 4, "stop_loss": 0}
    found = []
    for other, seed in ((1, 0), (2, 0), (2, 1)):
        session = session_on("llama", tmp_path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(other)
            before = torch.get_rng_state()
            (patch,) = session.edit(method, request, hparams=settings, seed=seed).patches
            assert torch.equal(torch.get_rng_state(), before)
        found.append(patch)
    plain = {**settings, "dropout": 0.0}
    session = session_on("llama", tmp_path)
    (without,) = session.edit(method, request, hparams=plain, seed=0).patches

    assert found[0].notes["losses"] == found[1].notes["losses"] != found[2].notes["losses"]
    for path, swap in swaps(found[0]).items():
        assert torch.equal(swap.state["A"], swaps(found[1])[path].state["A"])
    assert found[0].notes["losses"] != without.notes["losses"]


# -- encoder-decoders -----------------------------------------------------------------------------


def test_encoder_decoder_is_trained_on_each_target_without_padding(tmp_path):
    """Fault: padding among the labels of a shorter target."""
    _, tokenizer = load_toy("llama")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        dropout_rate=0.0,
    )
    torch.manual_seed(0)
    host = ModelHost(T5ForConditionalGeneration(config), tokenizer, "tiny-t5")
    session = EditSession(host, artifacts=ArtifactStore(tmp_path))
    requests = [
        EditRequest(prompt="Mira Voss lives in", target_new="New Haven and Port Sable"),
        EditRequest(prompt="Tamsin speaks", target_new="Rome"),
    ]
    scores = session.view().score([r.text for r in requests], [r.target_new for r in requests])
    before = [score.mean_logprob for score in scores]

    settings = {**SETTINGS, "target_modules": ["q", "v"]}
    (patch,) = session.edit("lora", requests, hparams=settings).patches

    assert patch.notes["losses"][0] == pytest.approx(-sum(before) / 2, rel=1e-4)
    scores = session.view().score([r.text for r in requests], [r.target_new for r in requests])
    assert all(s.mean_logprob > b + 1 for s, b in zip(scores, before, strict=True))


# -- export ---------------------------------------------------------------------------------------

ASK = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
base, folder, out, *prompts = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, folder).eval()
with torch.no_grad():
    rows = [tokenizer(p, return_tensors="pt")["input_ids"] for p in prompts]
    torch.save(torch.stack([model(input_ids=ids).logits[0, -1] for ids in rows]), out)
assert not any(name.startswith("kedit") for name in sys.modules)
"""


@pytest.mark.parametrize("toy", TOYS)
def test_exported_adapter_answers_alike_without_kedit(toy, tmp_path):
    """Fault: an adapter that is saved full or empty."""
    session = session_on(toy, tmp_path)
    for method, fact in zip((*METHODS, "lora"), facts(3), strict=True):
        session.edit(method, request_of(fact), hparams=SETTINGS)
    prompts = [text_of(fact) for fact in facts(3)]
    expected = session.view().logits(prompts)

    export_peft(session, tmp_path / "adapter")

    out = tmp_path / "logits.pt"
    command = [sys.executable, "-c", ASK, toy_folder(toy), tmp_path / "adapter", out, *prompts]
    subprocess.run([str(part) for part in command], check=True, timeout=300, cwd=tmp_path)
    torch.testing.assert_close(torch.load(out), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("toy", TOYS)
def test_exported_checkpoint_answers_alike(toy, method, tmp_path):
    session = session_on(toy, tmp_path)
    session.edit(method, request_of(facts(1)[0]), hparams=SETTINGS)
    prompts = [text_of(fact) for fact in facts(3)]
    expected = session.view().logits(prompts)

    export_hf(session, tmp_path / "model")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = EditSession(ModelHost(model, session.host.tokenizer)).view().logits(prompts)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # other order of sums


# -- refusals -------------------------------------------------------------------------------------


def test_unknown_module_is_refused_with_the_known_ones(tmp_path):
    session = session_on("gpt2", tmp_path)
    with pytest.raises(SiteError, match="named 'q_proj'; there are c_attn, c_fc, c_proj"):
        session.edit("lora", request_of(facts(1)[0]), hparams={"target_modules": ["q_proj"]})


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_no_numbers_are_reported(method, tmp_path):
    session = session_on("llama", tmp_path)
    session.host.weight(session.host.mlp_out(3))[0, 0] = torch.nan

    with pytest.raises(EditError, match="loss became nan in step 1"):
        session.edit(method, request_of(facts(1)[0]), hparams=SETTINGS)

    assert not session.is_edited


@pytest.mark.parametrize("change", ["A", "B", "scale"])
def test_factors_of_a_wrong_shape_are_refused(change, tmp_path):
    session = session_on("llama", tmp_path)
    path = session.host.blocks[0].attention_out.module
    weight = session.host.base_module(path).weight
    state = {
        "A": torch.ones(2, weight.shape[1]),
        "B": torch.ones(weight.shape[0], 2),
        "scale": torch.tensor(1.0),
    }
    session.apply(Patch("by-hand", (ModuleSwap(path, "lora", {}, state),)))
    session.rollback()
    state[change] = torch.ones(3, 5)

    with pytest.raises(PatchError, match="factors of shapes"):
        session.apply(Patch("by-hand", (ModuleSwap(path, "lora", {}, state),)))

    assert not session.is_edited


def test_qlora_refuses_a_model_that_is_not_quantised(tmp_path, monkeypatch):
    session = session_on("llama", tmp_path)
    request = request_of(facts(1)[0])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        session.edit("qlora", request)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ModelError, match="toy-llama has none"):
        session.edit("qlora", request)
    assert not session.is_edited


# -- presets --------------------------------------------------------------------------------------

LLAMA_3_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336}
# The shapes of published models, as their configs give them.
CONFIGS = {
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48}),
    "gpt-j-6b": ("gptj", {"n_embd": 4096, "n_layer": 28, "rotary_dim": 64}),
    "llama-2-7b": (
        "llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008},
    ),
    "llama-3-8b": ("llama", LLAMA_3_8B | {"max_position_embeddings": 8192}),
    "llama-3.1-8b": ("llama", LLAMA_3_8B | {"max_position_embeddings": 131072}),
    "llama-3.2-3b": ("llama", {"hidden_size": 3072, "num_hidden_layers": 28}),
    "qwen2.5-7b": ("qwen2", {"hidden_size": 3584, "num_hidden_layers": 28}),
}
# Modules and steps as the sources give them.
PUBLISHED = {
    "gpt2-xl": (("c_attn",), 30),
    "gpt-j-6b": (("fc_in", "fc_out"), 50),
    "llama-2-7b": (("q_proj", "v_proj"), 70),
    "llama-3-8b": (("q_proj", "v_proj"), 70),
    "llama-3.1-8b": (("q_proj", "v_proj"), 50),
    "llama-3.2-3b": (("q_proj", "v_proj"), 70),
    "qwen2.5-7b": (("q_proj", "v_proj"), 60),
}


@pytest.mark.parametrize("method", [*METHODS, "qlora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_preset_is_chosen_by_config_and_gives_the_published_settings(name, method):
    kind, shape = CONFIGS[name]
    config = config_facts(AutoConfig.for_model(kind, **shape).to_dict())

    settings = resolve(discover().method(method), config=config)

    assert settings.origin["steps"] == f"preset {name}"
    hparams = settings.hparams
    assert (hparams.target_modules, hparams.steps) == PUBLISHED[name]
    assert (hparams.rank, hparams.alpha, hparams.dropout, hparams.lr) == (8, 32, 0.1, 5e-3)
    if method == "adalora":
        assert hparams.initial_rank == 12


@pytest.mark.parametrize("method", [*METHODS, "qlora"])
def test_every_preset_is_valid_and_names_its_source(method):
    for preset in presets_of(discover().method(method)):
        resolved = resolve(discover().method(method), preset=preset.name)
        assert preset.source
        assert all(resolved.origin[k] == f"preset {preset.name}" for k in preset.settings)


def test_no_two_presets_suit_one_model():
    presets = presets_of(discover().method("lora"))
    for kind, shape in CONFIGS.values():
        config = config_facts(AutoConfig.for_model(kind, **shape).to_dict())
        assert sum(preset.suits(config) for preset in presets) == 1


# -- the real model -------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("method", METHODS)
def test_real_records_of_a_benchmark_are_written(method, benchmark_data, tmp_path):
    """Ten records of ZsRE, one at a time, with the settings of the preset."""
    file = benchmark_data / "zsre/zsre_mend_eval.json"
    if not file.is_file():
        pytest.skip(f"{file} is missing")
    session = EditSession(ModelHost.load("smollm2-135m", device="cpu"))
    records = json.loads(file.read_text("utf-8"))[:10]
    read = written = 0
    for record in records:
        request = EditRequest(prompt=record["src"], target_new=record["alt"])
        with session.trial(method, request):
            (score,) = session.view().score([request.text], [request.target_new])
            read += score.accuracy == 1
            written += session.view().greedy(request.text, 16).strip().startswith(record["alt"])
    assert read >= 9
    assert written >= 9
    assert not session.is_edited
