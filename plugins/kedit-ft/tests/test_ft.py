"""FT-M and FT-L on the toy models, against training the weights themselves, and the presets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoConfig

from kedit_core import EditError, EditRequest, SettingError, SiteError, discover
from kedit_core.artifacts import ArtifactStore
from kedit_core.editing import EditSession, ModelHost
from kedit_core.hparams import presets_of, resolve
from kedit_core.models import config_facts
from kedit_core.testing.toys import TOYS, ToyFact, load_toy, toy_facts

torch.set_num_threads(1)

SETTINGS = {"layers": [2], "steps": 20, "lr": 1e-2}


def session_on(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> EditSession:
    model, tokenizer = load_toy(name, dtype)
    return EditSession(ModelHost(model, tokenizer, f"toy-{name}"), artifacts=ArtifactStore(folder))


def text_of(fact: ToyFact) -> str:
    return fact.prompt.replace("{}", fact.subject)


def request_of(fact: ToyFact) -> EditRequest:
    """No subject: fine-tuning needs none."""
    return EditRequest(prompt=text_of(fact), target_new=fact.target_new)


def facts(count: int) -> list[ToyFact]:
    """Facts about different subjects, of different lengths."""
    return list(toy_facts())[1 : 1 + 3 * count : 3]


def facts_with_long_targets(count: int) -> list[ToyFact]:
    _, tokenizer = load_toy("gpt2")
    long = [f for f in toy_facts() if len(tokenizer(f" {f.target_new}")["input_ids"]) > 1]
    return long[:count]


def weights(session: EditSession) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in session.model.named_parameters()}


def same_bits(session: EditSession, before: dict[str, Tensor]) -> bool:
    now = dict(session.model.named_parameters())
    return all(torch.equal(now[name], tensor) for name, tensor in before.items())


def answers(session: EditSession, fact: ToyFact) -> str:
    return session.view().greedy(text_of(fact), max_new_tokens=8).strip()


# -- a second implementation: the weights themselves, row by row ---------------------------------


def tokens_of(tokenizer, fact: ToyFact) -> tuple[list[int], list[int]]:
    prompt = tokenizer(text_of(fact))["input_ids"]
    whole = tokenizer(f"{text_of(fact)} {fact.target_new}")["input_ids"]
    assert whole[: len(prompt)] == prompt
    return prompt, whole[len(prompt) :]


def target_loss(model, tokenizer, fact: ToyFact) -> Tensor:
    """FT-M: cross-entropy of the target's tokens, each after the ones before it."""
    prompt, target = tokens_of(tokenizer, fact)
    logits = model(torch.tensor([prompt + target])).logits[0]
    return cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(target))


def last_token_loss(model, tokenizer, fact: ToyFact) -> Tensor:
    """FT-L: −1/|y| Σ log p(y_t | x), all at the prompt's last token."""
    prompt, target = tokens_of(tokenizer, fact)
    after = log_softmax(model(torch.tensor([prompt])).logits[0, -1], dim=-1)
    return -sum(after[token] for token in target) / len(target)


LOSSES = {"target": target_loss, "prompt_last": last_token_loss}


def train_directly(toy, layers, batches, objective, steps, lr, bound=None):
    """Adam on the weights of a fresh toy; changes as (d_out, d_in), and the mean losses."""
    model, tokenizer = load_toy(toy)
    host = ModelHost(model, tokenizer)
    model.requires_grad_(False)
    sites = [host.mlp_out(layer) for layer in layers]
    parameters = [host.parameter(site).requires_grad_(True) for site in sites]
    originals = [p.detach().clone() for p in parameters]
    adam = torch.optim.Adam(parameters, lr=lr)
    history = []
    for _ in range(steps):
        measured = []
        for batch in batches:
            adam.zero_grad()
            loss = sum(LOSSES[objective](model, tokenizer, fact) for fact in batch) / len(batch)
            measured.append(float(loss.detach()))
            loss.backward()
            adam.step()
            if bound is not None:
                with torch.no_grad():
                    for parameter, original in zip(parameters, originals, strict=True):
                        parameter.copy_(original + (parameter - original).clamp(-bound, bound))
        history.append(sum(measured) / len(measured))
    changes = [
        site.view(p.detach() - original)
        for site, p, original in zip(sites, parameters, originals, strict=True)
    ]
    return changes, history


@pytest.mark.parametrize("objective", LOSSES)
@pytest.mark.parametrize("toy", TOYS)
def test_change_equals_training_the_weight_itself(toy, objective, tmp_path):
    chosen = [*facts(3), *facts_with_long_targets(1)]
    settings = {"layers": [1], "steps": 5, "lr": 1e-3, "stop_loss": 0, "objective": objective}

    requests = [request_of(fact) for fact in chosen]
    (patch,) = session_on(toy, tmp_path).edit("ft-m", requests, hparams=settings).patches

    (expected,), history = train_directly(toy, [1], [chosen], objective, steps=5, lr=1e-3)
    (delta,) = patch.deltas
    assert delta.rank is None
    assert delta.left.dtype == torch.float32
    # Adam turns a rounding error in a gradient near zero into a part of a step.
    assert float((delta.dense() - expected).norm()) < 1e-2 * float(expected.norm())
    assert float((delta.dense() - expected).abs().median()) < 1e-6
    assert patch.notes["losses"] == pytest.approx(history, rel=1e-3)


@pytest.mark.parametrize("toy", TOYS)
def test_several_layers_and_small_batches_are_trained_together(toy, tmp_path):
    chosen = facts(5)
    settings = {"layers": [3, 1, 3], "steps": 3, "lr": 1e-3, "stop_loss": 0, "batch_size": 2}

    requests = [request_of(fact) for fact in chosen]
    (patch,) = session_on(toy, tmp_path).edit("ft-m", requests, hparams=settings).patches

    batches = [chosen[:2], chosen[2:4], chosen[4:]]
    changes, history = train_directly(toy, [1, 3], batches, "target", steps=3, lr=1e-3)
    assert len(patch.deltas) == 2
    for delta, expected in zip(patch.deltas, changes, strict=True):
        assert float((delta.dense() - expected).norm()) < 1e-2 * float(expected.norm())
    assert patch.notes["losses"] == pytest.approx(history, rel=1e-3)


@pytest.mark.parametrize("toy", TOYS)
def test_first_loss_of_ft_l_is_the_documented_one(toy, tmp_path):
    chosen = facts_with_long_targets(2) + facts(2)
    session = session_on(toy, tmp_path)
    settings = {"layers": [1], "steps": 1}

    requests = [request_of(fact) for fact in chosen]
    with session.trial("ft-l", requests, hparams=settings) as outcome:
        (loss,) = outcome.patches[0].notes["losses"]

    tokenizer = session.host.tokenizer
    with torch.no_grad():
        each = [float(last_token_loss(session.model, tokenizer, fact)) for fact in chosen]
    assert loss == pytest.approx(sum(each) / len(each), rel=1e-4)
    assert len(tokens_of(tokenizer, chosen[0])[1]) > 1


def test_objectives_agree_for_targets_of_one_token(tmp_path):
    session = session_on("llama", tmp_path)
    tokenizer = session.host.tokenizer
    (fact,) = [f for f in toy_facts() if len(tokens_of(tokenizer, f)[1]) == 1][:1]
    changes = []
    for objective in LOSSES:
        settings = {"layers": [1], "steps": 3, "lr": 1e-3, "objective": objective}
        with session.trial("ft-m", request_of(fact), hparams=settings) as outcome:
            changes.append(outcome.patches[0].deltas[0].dense())

    torch.testing.assert_close(*changes)


# -- what the methods do -------------------------------------------------------------------------


@pytest.mark.parametrize("toy", TOYS)
def test_target_becomes_the_greedy_answer_until_it_is_rolled_back(toy, tmp_path):
    session = session_on(toy, tmp_path)
    before = weights(session)
    for fact in [*facts(2), *facts_with_long_targets(1)]:
        assert answers(session, fact).startswith(fact.answer)

        with session.trial("ft-m", request_of(fact), hparams=SETTINGS):
            assert answers(session, fact).startswith(fact.target_new)
            changed = [
                n for n, p in session.model.named_parameters() if not torch.equal(p, before[n])
            ]
            assert changed == [session.host.mlp_out(2).parameter]

        assert same_bits(session, before)
        assert answers(session, fact).startswith(fact.answer)


@pytest.mark.parametrize("toy", TOYS)
def test_many_requests_are_written_by_one_patch(toy, tmp_path):
    session = session_on(toy, tmp_path)
    chosen = facts(6)
    settings = {**SETTINGS, "layers": [1, 2], "steps": 60, "batch_size": 4}

    outcome = session.edit("ft-m", [request_of(fact) for fact in chosen], hparams=settings)

    assert len(outcome.patches) == 1
    assert all(answers(session, fact).startswith(fact.target_new) for fact in chosen)


@pytest.mark.parametrize("toy", TOYS)
def test_16_bit_weights_lose_nothing_on_the_way(toy, tmp_path):
    """Steps far below a bfloat16 weight's last place still add up."""
    session = session_on(toy, tmp_path, torch.bfloat16)
    (fact,) = facts(1)
    before = weights(session)
    settings = {"layers": [2], "steps": 4, "lr": 1e-5, "stop_loss": 0}

    with session.trial("ft-m", request_of(fact), hparams=settings) as outcome:
        (delta,) = outcome.patches[0].deltas
        assert delta.left.dtype == torch.float32
        assert 3e-5 < float(delta.dense().abs().max()) < 5e-5
    assert same_bits(session, before)

    session.edit("ft-m", request_of(fact), hparams=SETTINGS)
    assert answers(session, fact).startswith(fact.target_new)


@pytest.mark.parametrize("bound", [None, 5e-4, 2e-3])
@pytest.mark.parametrize("toy", TOYS)
def test_ft_l_changes_no_weight_by_more_than_its_bound(toy, bound, tmp_path):
    session = session_on(toy, tmp_path)
    settings = {**SETTINGS, "layers": [1, 2]}
    if bound is not None:
        settings["max_change"] = bound

    (patch,) = session.edit("ft-l", request_of(facts(1)[0]), hparams=settings).patches

    assert patch.hparams["max_change"] == (bound or 5e-4)
    for delta in patch.deltas:
        largest = float(delta.dense().abs().max())
        assert largest == pytest.approx(bound or 5e-4, rel=1e-5)  # reached, not passed
        assert largest <= (bound or 5e-4) * (1 + 1e-6)


def test_bound_holds_during_the_training_and_not_only_after_it(tmp_path):
    (fact,) = facts(1)
    settings = {"layers": [1], "steps": 6, "lr": 1e-3, "stop_loss": 0, "max_change": 2e-3}

    (patch,) = (
        session_on("llama", tmp_path).edit("ft-m", request_of(fact), hparams=settings).patches
    )

    (expected,), history = train_directly("llama", [1], [[fact]], "target", 6, 1e-3, bound=2e-3)
    assert patch.notes["losses"] == pytest.approx(history, rel=1e-3)
    change = patch.deltas[0].dense()
    assert float((change - expected).norm()) < 1e-2 * float(expected.norm())


def test_training_stops_when_the_loss_is_small(tmp_path):
    session = session_on("llama", tmp_path)
    request = request_of(facts(1)[0])
    settings = {**SETTINGS, "steps": 200, "stop_loss": 0.5}

    (patch,) = session.edit("ft-m", request, hparams=settings).patches

    losses = patch.notes["losses"]
    assert losses[-1] < 0.5 <= min(losses[:-1])
    assert len(losses) < 200
    # The step that only measured changed nothing: one fewer gives the same change.
    session.rollback()
    shorter = {**settings, "steps": len(losses) - 1}
    (again,) = session.edit("ft-m", request, hparams=shorter).patches
    assert torch.equal(again.deltas[0].dense(), patch.deltas[0].dense())


def test_same_request_gives_the_same_change(tmp_path):
    request = request_of(facts(1)[0])

    first, second = (
        session_on("gpt2", tmp_path).edit("ft-m", request, hparams=SETTINGS) for _ in range(2)
    )

    assert torch.equal(first.patches[0].deltas[0].dense(), second.patches[0].deltas[0].dense())


def test_layer_that_does_not_exist_is_refused(tmp_path):
    session = session_on("gpt2", tmp_path)
    before = weights(session)

    with pytest.raises(SiteError, match="Layer 9 does not exist"):
        session.edit("ft-m", request_of(facts(1)[0]), hparams={"layers": [1, 9]})

    assert same_bits(session, before)


def test_training_that_diverges_is_an_error_and_changes_nothing(tmp_path):
    session = session_on("llama", tmp_path)
    before = weights(session)

    with pytest.raises(EditError, match="loss became"):
        session.edit("ft-m", request_of(facts(1)[0]), hparams={"layers": [1], "lr": 1e37})

    assert same_bits(session, before)
    assert not session.is_edited


@pytest.mark.parametrize(
    "settings", [{"layers": []}, {"layers": [1], "max_change": 0}, {"layers": [1], "lr": -1}]
)
def test_settings_out_of_bounds_are_refused(settings):
    with pytest.raises(SettingError):
        resolve(discover().method("ft-m"), settings=settings)


# -- presets -------------------------------------------------------------------------------------

# The shapes of published models, as their configs give them.
CONFIGS = {
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48}),
    "gpt-j-6b": ("gptj", {"n_embd": 4096, "n_layer": 28, "rotary_dim": 64}),
    "llama-2-7b": (
        "llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008},
    ),
    "llama-3-8b": (
        "llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336},
    ),
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
# Layers and bound as the sources give them; all have 25 steps and a learning rate of 5e-4.
PUBLISHED = {
    "gpt2-xl": ((0,), 5e-4),
    "gpt-j-6b": ((21,), None),
    "llama-2-7b": ((21,), None),
    "llama-3-8b": ((21,), None),
    "llama-3.2-3b": ((21,), None),
    "mistral-7b": ((21,), 5e-5),
    "qwen2.5-7b": ((27,), None),
}


@pytest.mark.parametrize("method", ["ft-m", "ft-l"])
@pytest.mark.parametrize("name", CONFIGS)
def test_preset_is_chosen_by_config_and_gives_the_published_settings(name, method):
    kind, shape = CONFIGS[name]
    config = config_facts(AutoConfig.for_model(kind, **shape).to_dict())

    settings = resolve(discover().method(method), config=config)

    hparams = settings.hparams
    layers, bound = PUBLISHED[name]
    assert settings.origin["layers"] == f"preset {name}"
    assert (hparams.layers, hparams.steps, hparams.lr) == (layers, 25, 5e-4)
    assert hparams.objective == {"ft-m": "target", "ft-l": "prompt_last"}[method]
    # Where the source has no bound, ft-l keeps its own: it is what makes it FT-L.
    assert hparams.max_change == (bound or {"ft-m": None, "ft-l": 5e-4}[method])


@pytest.mark.parametrize("method", ["ft-m", "ft-l"])
def test_every_preset_is_valid_and_names_its_source(method):
    spec = discover().method(method)
    presets = presets_of(spec)

    assert {preset.name for preset in presets} >= set(CONFIGS)
    for preset in presets:
        assert preset.source
        resolved = resolve(spec, preset=preset.name)
        assert all(resolved.origin[key] == f"preset {preset.name}" for key in preset.settings)


def test_no_two_presets_suit_one_model():
    presets = presets_of(discover().method("ft-m"))
    for kind, shape in CONFIGS.values():
        config = config_facts(AutoConfig.for_model(kind, **shape).to_dict())
        assert sum(preset.suits(config) for preset in presets) == 1
