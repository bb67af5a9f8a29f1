"""WISE on the toy models, against training the weights themselves, and the presets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kedit_wise import method
from kedit_wise.memory import Shard, SideMemory, mask_of, unpack_mask
from torch.nn.functional import cross_entropy
from transformers import AutoConfig
from transformers.activations import ACT2FN

from kedit_core import EditError, EditRequest, SettingError, SiteError, discover
from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.editing import EditSession, ModelHost, ModuleSwap, Patch
from kedit_core.hparams import presets_of, resolve
from kedit_core.models import config_facts
from kedit_core.numerics.sample import context_texts
from kedit_core.testing.toys import TOYS, ToyFact, load_toy, toy_corpus, toy_facts

torch.set_num_threads(1)

SPEC = discover().method("wise")
SETTINGS = resolve(SPEC, preset="toy").hparams.model_dump()


def session_on(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> EditSession:
    model, tokenizer = load_toy(name, dtype)
    host = ModelHost(model, tokenizer, f"toy-{name}")
    return EditSession(host, artifacts=ArtifactStore(folder), corpus=Corpus(str(toy_corpus())))


def text_of(fact: ToyFact) -> str:
    return fact.prompt.replace("{}", fact.subject)


def request_of(fact: ToyFact) -> EditRequest:
    return EditRequest(prompt=text_of(fact), target_new=fact.target_new)


def facts(count: int) -> list[ToyFact]:
    """Facts about different subjects, in different forms."""
    return list(toy_facts())[1 : 1 + 3 * count : 3]


def edit(session: EditSession, fact: ToyFact, name: str = "wise", **changes: object):
    settings = SETTINGS | {"retrieve": name == "wise"} | changes
    return session.edit(name, request_of(fact), hparams=settings).patches[-1]


def wrapper_of(session: EditSession) -> SideMemory:
    found = session.host.module(session.host.mlp_out(2).module)
    assert isinstance(found, SideMemory)
    return found


def answers(session: EditSession, fact: ToyFact) -> str:
    return session.view().greedy(text_of(fact), max_new_tokens=8).strip()


# -- a second implementation: the weight itself, text by text, nothing padded ----------------------


def train_directly(session, fact, settings):
    """Plain gradient descent on W' inside the model; the change (d_out, d_in) and the losses."""
    job = session._job(SPEC, (request_of(fact),), 0)
    host, tokenizer = session.host, session.host.tokenizer
    site = host.mlp_out(settings["layer"])
    texts = ["", *context_texts(job, settings["contexts"])]
    strange = [
        torch.tensor([row.prompt]) for row in method._irrelevant(job, hparams_of(settings), 0)
    ]
    mask = method.Wise(hparams_of(settings))._shard(job, site, [])[1]
    model = host.model.requires_grad_(False)
    parameter = host.parameter(site).requires_grad_(True)
    original = parameter.detach().clone()
    act = ACT2FN[getattr(model.config, "hidden_act", None) or model.config.activation_function]
    module = host.base_module(site.module)
    bias = getattr(module, "bias", None)
    stored_mask = mask.T if site.transposed else mask

    def stirred(ids):
        seen = {}
        handle = module.register_forward_pre_hook(lambda m, a: seen.update(k=a[0][0].detach()))
        model(ids)
        handle.remove()
        old, new = (seen["k"] @ site.view(w).mT for w in (original, parameter))
        if settings["indicator"] == "legacy":
            shift = 0 if bias is None else bias
            old, new = act(old + shift), act(new + shift)
        return (new - old).norm(dim=1).mean()

    def hinge(values):
        missed = [v for v in values if v > 0]
        return sum(missed) / len(missed) if missed else torch.zeros(())

    losses = []
    for _ in range(settings["steps"]):
        nll, inside = [], []
        for text in texts:
            prompt = tokenizer(text + text_of(fact))["input_ids"]
            whole = tokenizer(f"{text}{text_of(fact)} {fact.target_new}")["input_ids"]
            target = whole[len(prompt) :]
            logits = model(torch.tensor([whole])).logits[0]
            nll.append(cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(target)))
            inside.append(stirred(torch.tensor([prompt])))
        outside = [stirred(ids) for ids in strange]
        loss = sum(nll) / len(nll)
        loss = loss + hinge([o - settings["irrelevant_max"] for o in outside])
        loss = loss + hinge([settings["edited_min"] - i for i in inside])
        loss = loss + hinge([settings["margin"] - (i - o) for i in inside for o in outside])
        losses.append(float(loss.detach()))
        (gradient,) = torch.autograd.grad(loss, parameter)
        with torch.no_grad():
            decaying = {"none": 0, "masked": stored_mask, "legacy": 1}[settings["decay"]]
            gradient = gradient * stored_mask
            gradient += settings["weight_decay"] * decaying * parameter
            parameter -= settings["lr"] * gradient
            bound = settings["max_change"]
            parameter.copy_(original + (parameter - original).clamp(-bound, bound))
    change = site.view(parameter.detach() - original)
    with torch.no_grad():
        parameter.copy_(original)
    parameter.requires_grad_(False)
    return change, losses


def hparams_of(settings):
    return resolve(SPEC, settings=settings).hparams


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decay": "legacy", "weight_decay": 0.05},
        {"decay": "none", "weight_decay": 0.05},
        {"decay": "masked", "weight_decay": 0.05},
        {"indicator": "legacy"},
        {"max_change": 0.02},
    ],
)
@pytest.mark.parametrize("toy", TOYS)
def test_change_equals_training_the_weight_itself(toy, changes, tmp_path):
    """Loss over exactly the target's tokens, margins without padding, decay where it belongs."""
    session = session_on(toy, tmp_path)
    (fact,) = facts(1)
    settings = SETTINGS | {
        "steps": 4,
        "lr": 0.2,
        "stop_loss": 0.0,
        "irrelevant": 3,
        "contexts": ((3, 1), (7, 1)),
        **changes,
    }
    expected, losses = train_directly(session, fact, settings)

    patch = session.edit("wise", request_of(fact), hparams=settings).patches[0]

    weight = session.host.weight(session.host.mlp_out(2))
    shard, mask = Shard.of(weight, patch.effects), mask_of(patch.effects[0], weight)
    assert patch.notes["losses"] == pytest.approx(losses, rel=1e-3)
    assert float((shard.change - expected).norm()) < 1e-2 * float(expected.norm())
    if settings["decay"] == "legacy":
        assert shard.kept == pytest.approx((1 - 0.2 * 0.05) ** 4)
    else:
        assert shard.kept == 1
        assert (shard.change[~mask] == 0).all()  # what no edit may change stays as it is
    assert float(shard.change[mask].abs().max()) <= settings["max_change"] * (1 + 1e-6)


@pytest.mark.parametrize("toy", TOYS)
def test_fast_way_equals_the_plain_one(toy, tmp_path, monkeypatch):
    (fact,) = facts(1)
    fast = edit(session_on(toy, tmp_path), fact, steps=6)
    tail = method.Tail
    monkeypatch.setattr(method, "Tail", lambda *args: tail(*args, plain=True))
    plain = edit(session_on(toy, tmp_path), fact, steps=6)

    a, b = (patch.effects[0].state["values"] for patch in (fast, plain))
    assert float((a - b).norm()) < 1e-2 * float(b.norm())
    assert fast.notes["losses"] == pytest.approx(plain.notes["losses"], rel=1e-3)


# -- what a patch holds ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patch_holds_the_masked_entries_only(dtype, tmp_path):
    session = session_on("llama", tmp_path, dtype)
    patch = edit(session, facts(1)[0], steps=3)
    (effect,) = patch.effects
    size = session.host.weight(session.host.mlp_out(2)).numel()
    mask = unpack_mask(effect.state["mask"], session.host.weight(session.host.mlp_out(2)).shape)
    assert effect.state["values"].dtype == torch.float32
    assert len(effect.state["values"]) == int(mask.sum())
    assert len(effect.state["mask"]) == -(-size // 8)
    assert abs(float(mask.float().mean()) - 0.2) < 0.03


def test_masks_come_from_the_seed_and_are_new_for_each_shard(tmp_path):
    def masks(seed: int) -> list[bytes]:
        session = session_on("llama", tmp_path)
        session.seed = seed
        for fact in facts(3):
            edit(session, fact, steps=1, edits_per_shard=2)
        return [p.effects[0].state["mask"].numpy().tobytes() for p in session.stack]

    first, second, third = masks(0)
    assert first == second != third
    assert masks(0) == [first, second, third]
    assert first not in masks(1)


def test_later_edits_go_into_the_shard_that_has_room(tmp_path):
    session = session_on("llama", tmp_path)
    for fact in facts(4):
        edit(session, fact, steps=1, edits_per_shard=2)
    assert [p.effects[0].config["shard"] for p in session.stack] == [0, 0, 1, 1]
    session.remove(2)
    edit(session, facts(5)[4], steps=1, edits_per_shard=2)
    assert [p.effects[0].config["shard"] for p in session.stack] == [0, 0, 1, 1]


# -- what the edits do -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wise", "wise-merge"])
@pytest.mark.parametrize("toy", TOYS)
def test_edits_add_up_and_one_can_be_taken_from_among_them(toy, name, tmp_path):
    session, chosen = session_on(toy, tmp_path), facts(3)
    patches = [edit(session, fact, name, edits_per_shard=500) for fact in chosen]
    (change,), (threshold,) = wrapper_of(session).changes, wrapper_of(session).thresholds

    session.remove(1)

    weight = session.host.weight(session.host.mlp_out(2))
    rest = Shard.of(weight, [patches[0].effects[0], patches[2].effects[0]])
    torch.testing.assert_close(wrapper_of(session).changes[0], rest.change)
    least = min(p.effects[0].config["stirred"] for p in (patches[0], patches[2]))
    assert float(wrapper_of(session).thresholds[0]) == pytest.approx(0.88 * least)
    assert float(wrapper_of(session).thresholds[0]) >= float(threshold)

    session.apply(patches[1])
    torch.testing.assert_close(wrapper_of(session).changes[0], change)


@pytest.mark.parametrize("toy", TOYS)
def test_fact_that_is_taken_back_has_its_former_answer(toy, tmp_path):
    session, chosen = session_on(toy, tmp_path), facts(3)
    for fact in chosen:
        edit(session, fact, replay=2)  # all facts of the toys are much alike
    assert [answers(session, f).startswith(f.target_new) for f in chosen] == [True] * 3

    session.remove(1)

    assert answers(session, chosen[0]).startswith(chosen[0].target_new)
    assert answers(session, chosen[1]).startswith(chosen[1].answer)
    assert answers(session, chosen[2]).startswith(chosen[2].target_new)


@pytest.mark.parametrize("name", ["wise", "wise-merge"])
@pytest.mark.parametrize("toy", TOYS)
def test_edits_survive_merging(toy, name, tmp_path):
    session, chosen = session_on(toy, tmp_path), facts(4)
    for fact in chosen:
        edit(session, fact, name, edits_per_shard=1, shards_per_memory=2)
    expected = 2 if name == "wise" else 1
    assert len(wrapper_of(session).changes) == expected
    gains = []
    for fact in chosen:
        args = [text_of(fact)], [fact.target_new]
        after = session.view().score(*args)[0].mean_logprob
        with session.suspended():
            gains.append(after - session.view().score(*args)[0].mean_logprob)
    assert sum(gains) > 0
    if name == "wise":
        assert all(gain > 0 for gain in gains)


@pytest.mark.parametrize("toy", TOYS)
def test_rows_that_do_not_stir_a_memory_are_answered_by_the_unedited_model(toy, tmp_path):
    session, (fact, *others) = session_on(toy, tmp_path), facts(8)
    edit(session, fact)
    found = []
    for prompt in map(text_of, (fact, *others)):
        after = session.view().logits([prompt])
        (chosen,) = wrapper_of(session).chosen.tolist()
        with session.suspended():
            before = session.view().logits([prompt])
        assert torch.equal(after, before) is (chosen < 0)
        found.append(chosen)
    assert found[0] == 0
    assert -1 in found


def test_asking_changes_nothing(tmp_path):
    session = session_on("llama", tmp_path)
    for fact in facts(3):
        edit(session, fact, "wise-merge", edits_per_shard=1, steps=5)
    before = wrapper_of(session).changes[0].clone()
    logits = session.view().logits([text_of(facts(1)[0])])
    session.view().greedy([text_of(f) for f in facts(3)], max_new_tokens=4)
    assert torch.equal(wrapper_of(session).changes[0], before)
    assert torch.equal(session.view().logits([text_of(facts(1)[0])]), logits)


def test_training_is_not_helped_by_earlier_memories(tmp_path):
    """In a shard of its own the same edit is the same change, whatever was edited before."""
    first, second = facts(2)
    alone, after = session_on("llama", tmp_path), session_on("llama", tmp_path)
    edit(after, first, edits_per_shard=1)
    losses = edit(after, second, edits_per_shard=1, steps=1).notes["losses"]
    expected = edit(alone, second, edits_per_shard=1, steps=1).notes["losses"]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert not any(m.passes_through for m in after.model.modules() if isinstance(m, SideMemory))


def test_several_requests_are_written_one_by_one(tmp_path):
    session = session_on("gpt2", tmp_path)
    chosen = facts(3)
    outcome = session.edit("wise", map(request_of, chosen), hparams=SETTINGS)
    assert [p.requests for p in outcome.patches] == [(request_of(f),) for f in chosen]
    assert all(answers(session, f).startswith(f.target_new) for f in chosen)


def test_replayed_edits_keep_out_of_other_memories(tmp_path):
    def stirred(replay: int) -> float:
        session, (old, new) = session_on("llama", tmp_path), facts(2)
        edit(session, old, edits_per_shard=1)
        edit(session, new, edits_per_shard=1, replay=replay, irrelevant_max=0.1)
        wrapper = wrapper_of(session)
        session.view().logits([text_of(old)])
        return float(wrapper._stirred.mean(dim=1)[0, 1])

    assert stirred(1) < stirred(0)


@pytest.mark.parametrize(
    ("settings", "inside", "outside"),
    [
        ({"shards_per_memory": 1}, [], [0, 1, 2]),
        ({"shards_per_memory": 2}, [2], [0, 1]),  # shards 2 and 3 will be merged
        ({"shards_per_memory": 2, "name": "wise-merge"}, [0, 1, 2], []),  # there is one memory
    ],
)
def test_replay_tells_memories_apart_not_shards(settings, inside, outside, tmp_path, monkeypatch):
    session, chosen, drawn = session_on("llama", tmp_path), facts(4), list[list[str]]()
    for fact in chosen[:3]:
        edit(session, fact, **{"steps": 1, "edits_per_shard": 1, **settings})
    monkeypatch.setattr(method, "_draw", lambda job, texts, count: drawn.append(texts) or [])
    edit(session, chosen[3], **{"steps": 1, "edits_per_shard": 1, **settings})
    assert drawn == [[text_of(chosen[n]) for n in numbers] for numbers in (inside, outside)]


def test_edits_of_another_kind_of_memory_are_not_continued(tmp_path):
    """What is trained from their change would not be what is put in force."""
    first, second = facts(2)
    session = session_on("llama", tmp_path)
    edit(session, first, edits_per_shard=500)
    patch = edit(session, second, edits_per_shard=500, retrieve=False, steps=1)
    expected = edit(session_on("llama", tmp_path), second, steps=1).notes["losses"]
    assert patch.notes["losses"] == pytest.approx(expected, rel=1e-4)
    assert patch.effects[0].config["shard"] == 0


def test_edits_under_another_wrapper_are_not_continued(tmp_path):
    first, second = facts(2)
    session = session_on("llama", tmp_path)
    shift = {"vector": torch.zeros(session.host.weight(session.host.mlp_out(2)).shape[0])}
    path = edit(session, first, edits_per_shard=500).effects[0].path
    session.apply(Patch("shift", (ModuleSwap(path, "shift", {}, shift),)))
    patch = edit(session, second, edits_per_shard=500, steps=1)
    expected = edit(session_on("llama", tmp_path), second, steps=1).notes["losses"]
    assert patch.notes["losses"] == pytest.approx(expected, rel=1e-4)


def test_irrelevant_texts_come_from_the_corpus_or_from_the_model(tmp_path):
    session = session_on("llama", tmp_path)
    hparams = hparams_of(SETTINGS)
    job = session._job(SPEC, (request_of(facts(1)[0]),), 0)
    rows = method._irrelevant(job, hparams, 0)
    assert len(rows) == hparams.irrelevant
    assert all(0 < len(row.prompt) <= hparams.irrelevant_tokens for row in rows)
    decoded = session.host.tokenizer.decode(rows[0].prompt, skip_special_tokens=True).strip()
    assert toy_corpus().read_text("utf-8").startswith(decoded[:10])
    assert method._irrelevant(job, hparams, 1) != rows  # the next edit has others

    own = EditSession(session.host, artifacts=ArtifactStore(tmp_path))
    generated = method._irrelevant(own._job(SPEC, job.requests, 0), hparams, 0)
    assert generated != rows
    assert generated == method._irrelevant(own._job(SPEC, job.requests, 0), hparams, 0)


def test_corpus_without_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    session = session_on("llama", tmp_path)
    session.corpus = Corpus(str(tmp_path / "empty.txt"))
    with pytest.raises(EditError, match="holds no text"):
        edit(session, facts(1)[0])
    assert not session.is_edited


def test_input_matrices_where_there_is_one(tmp_path):
    (fact,) = facts(1)
    session = session_on("gpt2", tmp_path)
    patch = edit(session, fact, matrix="mlp_in", layer=1)
    assert patch.effects[0].path.endswith("c_fc")
    assert answers(session, fact).startswith(fact.target_new)
    with pytest.raises(SiteError, match="2 input matrices"):
        edit(session_on("llama", tmp_path), fact, matrix="mlp_in")


def test_training_that_diverges_is_an_error_and_leaves_no_edit(tmp_path):
    session = session_on("llama", tmp_path)
    edit(session, facts(1)[0], steps=2)
    with pytest.raises(EditError, match="Lower the learning rate"):
        edit(session, facts(2)[1], lr=1e38, max_change=1e38)
    assert len(session.stack) == 1
    assert not wrapper_of(session).passes_through


def test_training_stops_when_the_loss_is_small_and_still(tmp_path):
    (fact,) = facts(1)
    losses = edit(
        session_on("llama", tmp_path), fact, steps=60, stop_loss=1.0, stop_change=10.0
    ).notes["losses"]
    assert losses[-1] <= 1.0 < min(losses[:-1])
    still = edit(
        session_on("llama", tmp_path), fact, steps=60, stop_loss=1.0, stop_change=0.0
    ).notes["losses"]
    assert len(still) > len(losses)


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_ratio": 0},
        {"mask_ratio": 1.1},
        {"edits_per_shard": 0},
        {"density": 0},
        {"steps": 0},
        {"decay": "legacy", "momentum": 0.5},
    ],
)
def test_settings_out_of_bounds_are_refused(settings):
    with pytest.raises(SettingError):
        resolve(SPEC, settings={"layer": 1} | settings)


# -- presets ---------------------------------------------------------------------------------------

LLAMA_3_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336}
CONFIGS = {
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48}),
    "gpt-j-6b": ("gptj", {"n_embd": 4096, "n_layer": 28, "rotary_dim": 64}),
    "llama-2-7b": (
        "llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008},
    ),
    "llama-3-8b": ("llama", LLAMA_3_8B | {"max_position_embeddings": 8192}),
    "llama-3.1-8b": ("llama", LLAMA_3_8B | {"max_position_embeddings": 131072}),
    "llama-3.2-3b": (
        "llama",
        {"hidden_size": 3072, "num_hidden_layers": 28, "intermediate_size": 8192},
    ),
    "mistral-7b": (
        "mistral",
        {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336},
    ),
    "qwen2.5-7b": (
        "qwen2",
        {"hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944},
    ),
}
# layer, matrix, steps, lr, [α, β, γ], threshold ratio
PUBLISHED = {
    "gpt2-xl": (8, "mlp_in", 40, 1.0, (5, 20, 10), 0.8),
    "gpt-j-6b": (21, "mlp_out", 70, 1.0, (15, 40, 20), 0.88),
    "llama-2-7b": (27, "mlp_out", 70, 1.0, (5, 20, 10), 0.88),
    "llama-3-8b": (29, "mlp_out", 30, 0.9, (2, 20, 10), 0.5),
    "llama-3.1-8b": (29, "mlp_out", 30, 0.9, (5, 10, 10), 0.88),
    "llama-3.2-3b": (27, "mlp_out", 70, 1.0, (5, 20, 10), 0.88),
    "mistral-7b": (27, "mlp_out", 70, 1.0, (5, 20, 10), 0.88),
    "qwen2.5-7b": (23, "mlp_out", 70, 1.0, (5, 20, 10), 0.88),
}


@pytest.mark.parametrize("name", ["wise", "wise-merge"])
@pytest.mark.parametrize("model", CONFIGS)
def test_preset_is_chosen_by_config_and_gives_the_published_settings(model, name):
    kind, shape = CONFIGS[model]
    config = config_facts(AutoConfig.for_model(kind, **shape).to_dict())
    settings = resolve(discover().method(name), config=config)
    h = settings.hparams
    assert settings.origin["layer"] == f"preset {model}"
    margins = (h.irrelevant_max, h.edited_min, h.margin)
    found = (h.layer, h.matrix, h.steps, h.lr, margins, h.threshold_ratio)
    assert found == PUBLISHED[model]
    assert (h.mask_ratio, h.edits_per_shard, h.shards_per_memory) == (0.2, 500, 2)
    assert (h.merge, h.density, h.max_change, h.indicator) == ("ties", 0.53, 1.0, "legacy")
    assert h.retrieve is (name == "wise")


def test_no_two_presets_suit_one_model():
    presets = presets_of(SPEC)
    assert {p.name for p in presets} >= {*CONFIGS, "smollm2-135m", "toy"}
    for kind, shape in CONFIGS.values():
        config = config_facts(AutoConfig.for_model(kind, **shape).to_dict())
        assert sum(preset.suits(config) for preset in presets) == 1
