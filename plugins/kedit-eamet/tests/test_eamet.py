"""EAMET on the toy models, against its formulas written out, and its presets."""

from __future__ import annotations

import math

import pytest
import torch
from kedit_eamet.alignment import Alignment
from kedit_eamet.hparams import EametHyperParams
from kedit_eamet.method import Eamet
from torch import Tensor
from transformers import AutoConfig

from kedit_core import EditRequest, SettingError, discover
from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.editing import EditSession, ModelHost
from kedit_core.hparams import presets_of, resolve
from kedit_core.models import config_facts
from kedit_core.numerics.facts import FactRows, essence_row
from kedit_core.numerics.states import states_at_marks
from kedit_core.numerics.values import Value, ValueSettings, ValueTask, optimise_values
from kedit_core.testing.toys import TOYS, load_toy, toy_corpus, toy_facts
from kedit_core.tokens import rewrite_row

SETTINGS = {
    "layers": [1],
    "steps": 8,
    "lr": 0.2,
    "key_ratio": 2.0,
    "contexts": [],
    "moment_tokens": 1000,
    "moment_weight": 1.0,
}


def toy_host(name: str) -> ModelHost:
    model, tokenizer = load_toy(name)
    return ModelHost(model, tokenizer, f"toy-{name}")


def requests(count: int) -> list[EditRequest]:
    return [
        EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=fact.target_new)
        for fact in toy_facts()[:count]
    ]


def fact_rows(host: ModelHost, count: int) -> FactRows:
    wanted = requests(count)
    return FactRows(
        tuple((rewrite_row(host, request),) for request in wanted),
        tuple(essence_row(host, request, "subject_last") for request in wanted),
    )


def values(host: ModelHost, facts: FactRows, **settings) -> list[Value]:
    hparams = EametHyperParams(**{**SETTINGS, **settings})
    return Eamet(hparams)._values(host, facts, host.blocks[1].path)


def keys_and_states(host: ModelHost, facts: FactRows) -> tuple[Tensor, Tensor]:
    points = {"k": (host.mlp_out(1).module, "input"), "h": (host.blocks[1].path, "output")}
    found = states_at_marks(host, facts.clean, points)
    return found["k"].float(), found["h"].float()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a.norm() * b.norm())


def terms(similar: list[Tensor], found: list[Tensor], tau: float = 0.07) -> tuple[Tensor, Tensor]:
    """L_cs and L_mse of one fact with those it is compared with, sum by sum."""
    p = [math.exp(float(s) / tau) for s in similar]
    q = [(r / tau).exp() for r in found]
    cs = sum(
        a / sum(p) * ((a / sum(p) + 1e-8) / (b / sum(q) + 1e-8)).log()
        for a, b in zip(p, q, strict=True)
    )
    strongest = sorted(range(len(p)), key=lambda j: -p[j])[:50]
    whole = sum(p[j] for j in strongest)
    mse = sum(p[j] / whole * (similar[j] - found[j]) ** 2 for j in strongest)
    return cs, mse


class Sequentially:
    """The penalty of fact i against the finished ones before it, as the paper defines it."""

    watch = ()

    def __init__(self, keys: Tensor, finished: list[Tensor]) -> None:
        self.finished = finished
        self.similar = [cosine(keys[len(finished)], keys[j]) for j in range(len(finished))]

    def __call__(self, owner, delta, states):
        if not self.finished:
            return delta.new_zeros(1)
        cs, mse = terms(self.similar, [cosine(delta[0], other) for other in self.finished])
        return (2 * cs + 8 * mse)[None]


@pytest.mark.parametrize("name", TOYS)
def test_blocks_of_one_are_the_sequential_definition(name):
    host = toy_host(name)
    facts = fact_rows(host, 4)
    keys, states = keys_and_states(host, facts)

    found = values(host, facts, block=1)

    settings = ValueSettings(
        8, 0.2, weight_decay=0.0, max_norm_ratio=1.0, kl_weight=0.0625, stop_loss=1e-2
    )
    finished: list[Tensor] = []
    for row, anchor, key, state in zip(facts.clean, facts.anchors, keys, states, strict=True):
        length = float(key.norm())
        start = state / state.norm() * length
        task = ValueTask((row,), anchor, start=start, bound=2 * length)
        penalty = Sequentially(keys, finished)
        (value,) = optimise_values(
            host, host.blocks[1].path, 1, [task], settings, penalty=penalty, plain=True
        )
        finished.append(value.delta)
    for value, expected in zip(found, finished, strict=True):
        assert float((value.delta - expected).norm()) < 1e-2 * float(expected.norm())


def test_terms_of_a_block_count_finished_facts_and_those_before_it_in_the_block():
    g = torch.Generator().manual_seed(0)
    keys, deltas = torch.randn(60, 12, generator=g), torch.randn(60, 8, generator=g)
    unit = keys / keys.norm(dim=1, keepdim=True)
    block = slice(57, 60)
    alignment = Alignment(
        similar=unit[block] @ unit.T,
        finished=deltas[:57],
        bounds=torch.tensor([1.0, 2.0, 3.0]),
        cosine_weight=2.0,
        square_weight=8.0,
        norm_weight=0.5,
        temperature=0.07,
    )

    found = alignment(torch.tensor([0, 1, 2]), deltas[block], {})

    for n, i in enumerate(range(57, 60)):
        others = range(i)  # more than 50, so that not all count in the second term
        similar = [cosine(keys[i], keys[j]) for j in others]
        cs, mse = terms(similar, [cosine(deltas[i], deltas[j]) for j in others])
        expected = 2 * cs + 8 * mse + 0.5 * (deltas[i].norm() - (n + 1)) ** 2
        assert float(found[n]) == pytest.approx(float(expected), rel=1e-4)


def test_first_fact_is_compared_with_none():
    g = torch.Generator().manual_seed(0)
    delta = torch.randn(2, 8, generator=g, requires_grad=True)
    similar = torch.tensor([[1.0, 0.3], [0.3, 1.0]])
    alignment = Alignment(similar, torch.zeros(0, 8), torch.ones(2), 2.0, 8.0, 0.0, 0.07)

    first, second = alignment(torch.tensor([0, 1]), delta, {})
    (first + second).backward()

    assert first.item() == 0.0
    difference = float(cosine(*delta.detach())) - 0.3
    assert second.item() == pytest.approx(8 * difference**2, rel=1e-5)
    assert torch.equal(delta.grad[0], torch.zeros(8))
    assert delta.grad[1].norm() > 0


def test_change_at_zero_has_no_direction_and_no_gradient():
    alignment = Alignment(
        similar=torch.tensor([[0.5, 1.0]]),
        finished=torch.ones(1, 8),
        bounds=torch.ones(1),
        cosine_weight=2.0,
        square_weight=8.0,
        norm_weight=0.0,
        temperature=0.07,
    )
    delta = torch.zeros(1, 8, requires_grad=True)

    alignment(torch.tensor([0]), delta, {}).sum().backward()

    assert torch.equal(delta.grad, torch.zeros(1, 8))


def test_larger_blocks_align_as_well():
    """How far cosines of δ lie from those of keys, and the facts' NLL."""
    host = toy_host("gpt2")
    facts = fact_rows(host, 10)
    keys, _ = keys_and_states(host, facts)

    def gap_and_nll(**settings) -> tuple[float, float]:
        found = values(host, facts, steps=25, lr=0.3, stop_loss=0.0, **settings)
        pairs = [(i, j) for i in range(10) for j in range(i)]
        gaps = [
            (cosine(keys[i], keys[j]) - cosine(found[i].delta, found[j].delta)).abs()
            for i, j in pairs
        ]
        return float(sum(gaps) / len(pairs)), sum(value.nll for value in found) / 10

    (gap, nll), (wide_gap, wide_nll) = gap_and_nll(block=1), gap_and_nll(block=64)
    loose_gap, _ = gap_and_nll(cosine_weight=0.0, square_weight=0.0)

    assert gap < 0.5 * loose_gap
    assert wide_gap < 0.5 * loose_gap
    assert wide_nll < nll + 0.1


def test_anchor_is_held_to_the_unchanged_model_though_the_change_does_not_start_at_zero():
    host = toy_host("gpt2")
    facts = fact_rows(host, 1)

    free, held = (values(host, facts, kl_weight=weight)[0].losses[0] for weight in (0.0, 1.0))

    assert held > free + 1e-3  # the start has changed the anchor's distribution already


def test_state_as_the_bound_decays_by_the_first_power():
    host = toy_host("llama")
    facts = fact_rows(host, 1)
    keys, states = keys_and_states(host, facts)

    free, held = (
        values(host, facts, bound="state", weight_decay=weight, max_norm_ratio=0.6)[0]
        for weight in (0.0, 2.0)
    )

    ratio = float(keys[0].norm() / states[0].norm())  # of the start
    assert held.losses[0] - free.losses[0] == pytest.approx(2.0 * ratio, rel=1e-3)
    assert float(free.delta.norm()) <= 0.6 * float(states[0].norm()) * 1.001


def test_change_is_cut_to_the_length_of_the_key():
    host = toy_host("llama")
    facts = fact_rows(host, 3)
    keys, _ = keys_and_states(host, facts)

    found = values(host, facts, lr=2.0, key_ratio=1.5)

    lengths = [
        float(value.delta.norm() / key.norm()) for value, key in zip(found, keys, strict=True)
    ]
    assert max(lengths) == pytest.approx(1.5, rel=1e-3)


def test_many_facts_are_written(tmp_path):
    wanted = requests(6)
    corpus, store = Corpus(str(toy_corpus())), ArtifactStore(tmp_path)
    session = EditSession(toy_host("llama"), artifacts=store, corpus=corpus)
    own = {**SETTINGS, "layers": [0, 1], "steps": 15, "lr": 0.3, "moment_weight": [1.0, 0.5]}
    own |= {"cosine_weight": 0.1, "square_weight": 0.1, "block": 4}

    view = session.view()
    before = view.score([r.text for r in wanted], [r.target_new for r in wanted])
    session.edit("eamet", wanted, hparams=own)
    after = view.score([r.text for r in wanted], [r.target_new for r in wanted])

    pairs = zip(before, after, strict=True)
    assert sum(sum(b.logprobs) > sum(a.logprobs) for a, b in pairs) >= 5


# -- presets -------------------------------------------------------------------------------------

# Config, λ and clamp of the published files.
PUBLISHED = {
    "llama-2-7b": ("llama", {"num_hidden_layers": 32, "intermediate_size": 11008}, 4000, 2),
    "llama-3-8b": ("llama", {"num_hidden_layers": 32, "intermediate_size": 14336}, 15000, 2),
    "qwen2.5-7b": ("qwen2", {"hidden_size": 3584, "num_hidden_layers": 28}, 6000, 1.5),
    "deepseek-7b": ("llama", {"num_hidden_layers": 30, "intermediate_size": 11008}, 6000, 4.5),
    "gemma-7b": ("gemma", {"hidden_size": 3072, "num_hidden_layers": 28}, 12000, 1.5),
    "falcon-7b": ("falcon", {"hidden_size": 4544, "num_hidden_layers": 32}, 6000, 1.5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_is_chosen_by_config_and_gives_the_published_settings(name):
    kind, shape, weight, ratio = PUBLISHED[name]
    config = config_facts(AutoConfig.for_model(kind, **shape).to_dict())

    settings = resolve(discover().method("eamet"), config=config)

    assert settings.origin["layers"] == f"preset {name}"
    hparams = settings.hparams
    assert (hparams.layers, hparams.moment_weights) == ((3, 4), (weight, weight))
    assert (hparams.lr, hparams.key_ratio, hparams.norm_weight) == (0.04, ratio, 0)
    assert (hparams.cosine_weight, hparams.square_weight, hparams.temperature) == (2, 8, 0.07)


@pytest.mark.parametrize("preset", presets_of(discover().method("eamet")), ids=lambda p: p.name)
def test_every_preset_is_valid(preset):
    resolved = resolve(discover().method("eamet"), preset=preset.name)

    assert Eamet(resolved.hparams)
    assert preset.source


def test_weights_for_another_number_of_layers_are_refused():
    with pytest.raises(SettingError, match="2 weights for 1 layers"):
        resolve(discover().method("eamet"), settings={**SETTINGS, "moment_weight": [1, 2]})
