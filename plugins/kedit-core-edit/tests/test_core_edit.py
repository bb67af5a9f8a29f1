"""CoRE on the toy models, against its formulas written out, and its presets."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from kedit_core_edit.method import Core, Variance
from transformers import AutoConfig

from kedit_core import EditRequest, RequestError, discover
from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.editing import EditSession, ModelHost
from kedit_core.hparams import presets_of, resolve
from kedit_core.models import config_facts
from kedit_core.numerics.facts import essence_row
from kedit_core.numerics.sample import continued_texts
from kedit_core.numerics.values import Value, ValueSettings, ValueTask, optimise_values
from kedit_core.testing.toys import TOYS, load_toy, toy_corpus, toy_facts
from kedit_core.tokens import rewrite_row

SETTINGS = {
    "layers": [1],
    "steps": 12,
    "lr": 0.3,
    "max_norm_ratio": 4.0,
    "weight_decay": 0.0,
    "stop_loss": 0.0,
    "contexts": [[4, 2]],
    "context_count": 7,
    "context_tokens": 5,
    "moment_tokens": 1000,
    "moment_weight": 1e-3,
}


def session_on(name: str, folder: Path) -> EditSession:
    model, tokenizer = load_toy(name)
    corpus = Corpus(str(toy_corpus()))
    host = ModelHost(model, tokenizer, f"toy-{name}")
    return EditSession(host, artifacts=ArtifactStore(folder), corpus=corpus)


def requests(count: int) -> list[EditRequest]:
    return [
        EditRequest(
            prompt=fact.prompt,
            subject=fact.subject,
            target_new=fact.target_new,
            ground_truth=fact.answer,
        )
        for fact in toy_facts()[:count]
    ]


def test_variance_is_the_mean_over_blocks_of_the_sum_over_pairs():
    g = torch.Generator().manual_seed(0)
    owner = torch.tensor([0, 0, 0, 2, 2, 1, 0])
    # Far from the origin, where the difference of two large sums would be noise.
    states = {path: 1e3 + torch.randn(7, 5, generator=g) for path in ("a", "b")}

    found = Variance(("a", "b"), 0.5)(owner, torch.zeros(3, 5), states)

    for task in range(3):
        rows = [n for n in range(7) if owner[n] == task]
        pairs = sum(
            float((h[i].double() - h[j].double()).square().sum()) / 5
            for h in states.values()
            for i, j in combinations(rows, 2)
        )
        assert float(found[task]) == pytest.approx(0.5 * pairs / 2, rel=1e-3)


@pytest.mark.parametrize("name", TOYS)
def test_penalty_brings_states_after_different_texts_closer_together(name, tmp_path):
    host, (_, request) = session_on(name, tmp_path).host, requests(2)
    texts = ("", "The people know it. ", "You have seen the old town. ", "In the morning. ")
    rows = tuple(rewrite_row(host, request, "subject_last", text) for text in texts)
    task = ValueTask(rows, essence_row(host, request, "subject_last"))
    settings = ValueSettings(20, 0.1, 0.0, max_norm_ratio=4.0, kl_weight=0.0, stop_loss=0.0)

    def optimise(task: ValueTask, steps: int, weight: float) -> Value:
        penalty = Variance((host.blocks[2].path,), weight)
        own = replace(settings, steps=steps)
        path = host.blocks[1].path
        return optimise_values(host, path, 1, [task], own, penalty=penalty)[0]

    variances = []
    for weight in (0.0, 20.0):
        found = optimise(task, 20, weight)
        measured = optimise(replace(task, start=found.delta), 1, 1.0)
        variances.append(measured.losses[0] - measured.nll)
        assert found.nll < 0.5

    assert variances[1] < 0.8 * variances[0]


def test_contexts_are_begun_by_the_facts_own_words(tmp_path, monkeypatch):
    session, wanted = session_on("llama", tmp_path), requests(2)
    begun = []

    def remember(job, starts, tokens) -> tuple[str, ...]:
        begun.append((starts, tokens))
        return continued_texts(job, starts, tokens)

    monkeypatch.setattr("kedit_core_edit.method.continued_texts", remember)

    session.edit("core", wanted, hparams={**SETTINGS, "steps": 1})

    for request, (starts, tokens) in zip(wanted, begun, strict=True):
        words = (request.ground_truth[0], request.subject, request.target_new)
        each = (3, 2, 2)  # of seven
        assert starts == [word for word, n in zip(words, each, strict=True) for _ in range(n)]
        assert tokens == 5


def test_keys_have_the_sampled_contexts_unless_told_otherwise(tmp_path):
    session, wanted = session_on("llama", tmp_path), requests(2)
    own = {**SETTINGS, "steps": 2}
    spaces = {}
    for keys in ("sampled", "own"):
        with session.trial("core", wanted, hparams={**own, "keys": keys}) as outcome:
            spaces[keys] = outcome.patches[0].deltas[0].right
    plain = {k: v for k, v in own.items() if not k.startswith(("context_", "keys"))}
    with session.trial("memit", wanted, hparams=plain) as outcome:
        expected = outcome.patches[0].deltas[0].right

    assert torch.equal(spaces["sampled"], expected)
    assert not torch.allclose(spaces["own"], expected)


def test_layer_with_no_block_to_watch_is_edited_all_the_same(tmp_path):
    session, (request,) = session_on("gpt2", tmp_path), requests(1)

    (patch,) = session.edit("core", request, hparams={**SETTINGS, "layers": [2]}).patches

    assert patch.notes["nll"][0] < 1


def test_request_without_a_former_answer_is_refused(tmp_path):
    session = session_on("llama", tmp_path)
    (request,) = requests(1)

    with pytest.raises(RequestError, match="core needs the former answer"):
        session.edit("core", request.model_copy(update={"ground_truth": ()}), hparams=SETTINGS)


# -- presets -------------------------------------------------------------------------------------

# Config; layers, clamp, weight and range of the variance.
PUBLISHED = {
    "llama-3-8b": ("llama", {"num_hidden_layers": 32, "intermediate_size": 14336}),
    "mistral-7b": ("mistral", {"hidden_size": 4096, "num_hidden_layers": 32}),
}
NUMBERS = {
    "llama-3-8b": ((4, 5, 6, 7, 8), 3, 0.01, 28),
    "mistral-7b": ((4, 5), 4, 0.1, 26),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_is_chosen_by_config_and_gives_the_published_settings(name):
    kind, shape = PUBLISHED[name]
    config = config_facts(AutoConfig.for_model(kind, **shape).to_dict())

    settings = resolve(discover().method("core"), config=config)

    assert settings.origin["layers"] == f"preset {name}"
    h = settings.hparams
    assert (h.layers, h.max_norm_ratio, h.variance_weight, h.variance_range) == NUMBERS[name]
    assert (h.steps, h.lr, h.weight_decay, h.context_count, h.context_tokens) == (
        *(25, 0.5, 1e-3),
        *(15, 10),
    )


@pytest.mark.parametrize("preset", presets_of(discover().method("core")), ids=lambda p: p.name)
def test_every_preset_is_valid(preset):
    resolved = resolve(discover().method("core"), preset=preset.name)

    assert Core(resolved.hparams)
    assert preset.source
