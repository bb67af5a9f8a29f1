"""Text that the model writes itself."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from kedit_core.editing import EditSession, ModelHost, Patch, WeightDelta
from kedit_core.numerics.sample import context_texts, continued_texts, sample
from tests.numerics.tiny import job_on, tiny_host

STARTS = ["The", "I", "Although", "We", "People", "In"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def forward_calls(host: ModelHost) -> list[int]:
    calls: list[int] = []
    host.module(host.blocks[0].path).register_forward_pre_hook(lambda m, a: calls.append(1))
    return calls


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_same_seed_gives_the_same_texts(family):
    host = tiny_host(family)

    first, again, other = (sample(host, STARTS, 20, seeded(s), top_k=50) for s in (3, 3, 4))

    assert first == again
    assert first != other


@pytest.mark.parametrize("new_tokens", [1, 17])
def test_every_text_has_exactly_the_wanted_length(new_tokens):
    host = tiny_host("llama")

    rows = sample(host, STARTS, new_tokens, seeded(0), top_k=100)

    for row, start in zip(rows, STARTS, strict=True):
        ids = tuple(host.tokenizer(start)["input_ids"])
        assert row[: len(ids)] == ids
        assert len(row) == len(ids) + new_tokens


def test_no_special_token_is_drawn():
    host = tiny_host("llama")
    special = set(host.tokenizer.all_special_ids)
    host.model.lm_head.weight[sorted(special)] *= 5  # they would be drawn often

    rows = sample(host, STARTS, 40, seeded(0), top_k=100)

    assert special == {0, 1, 2}
    assert not special & {token for row in rows for token in row}


def test_generation_settings_of_the_model_change_nothing():
    host = tiny_host("llama")
    expected = sample(host, STARTS, 20, seeded(0), top_k=50)
    settings = host.model.generation_config
    settings.eos_token_id = list(range(3, 60))
    settings.repetition_penalty, settings.no_repeat_ngram_size = 3.0, 1

    assert sample(host, STARTS, 20, seeded(0), top_k=50) == expected
    assert host.model.generation_config is settings


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_tokens_are_among_the_most_probable_ones(family, top_k):
    host = tiny_host(family)

    rows = sample(host, STARTS, 12, seeded(0), top_k=top_k)

    for row in rows:  # alone, so without padding
        logits = host.model(torch.tensor([row])).logits[0]
        logits[:, :3] = -torch.inf
        for position in range(len(row) - 12, len(row)):
            rank = int((logits[position - 1] > logits[position - 1, row[position]] + 1e-4).sum())
            assert rank < top_k


def test_random_states_of_the_process_are_left_alone():
    host = tiny_host("gpt2")
    before = torch.get_rng_state(), random.getstate()

    sample(host, STARTS, 10, seeded(0), top_k=5)

    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_contexts_are_short_sentences_on_one_line(tmp_path):
    texts = context_texts(job_on(tiny_host("llama"), tmp_path), ((5, 3), (12, 4)))

    assert len(texts) == 7
    for text in texts:
        assert text.endswith(". ")
        assert "\n" not in text
        assert text.startswith(("The", "I", "You", "Because"))
    assert max(map(len, texts[:3])) < max(map(len, texts[3:]))


def test_contexts_are_kept_and_not_sampled_again(tmp_path):
    host = tiny_host("llama")
    first = context_texts(job_on(host, tmp_path), ((5, 3), (8, 2)))
    calls = forward_calls(host)

    assert context_texts(job_on(host, tmp_path), ((5, 3), (8, 2))) == first
    assert not calls
    assert len(list((tmp_path / "contexts").iterdir())) == 1


def test_no_context_begins_as_another(tmp_path):
    texts = context_texts(job_on(tiny_host("llama"), tmp_path), ((5, 7), (5, 3), (12, 10)))

    bare = [text.removesuffix(". ") for text in texts]
    assert len(set(bare)) == 20
    assert not [(a, b) for a in bare for b in bare if a != b and b.startswith(a)]


def test_contexts_depend_on_seed_and_model(tmp_path):
    lengths = ((8, 5),)
    host = tiny_host("llama")

    texts = {
        context_texts(job, lengths)
        for job in (
            job_on(host, tmp_path),
            job_on(host, tmp_path, seed=1),
            job_on(tiny_host("gpt2"), tmp_path),
        )
    }

    assert len(texts) == 3
    assert context_texts(job_on(host, tmp_path / "elsewhere"), lengths) in texts


def test_contexts_are_of_the_unedited_model(tmp_path: Path):
    host = tiny_host("llama")
    clean = context_texts(job_on(host, tmp_path / "clean"), ((10, 5),))
    session = EditSession(host)
    change = 3 * torch.randn(32, 64, generator=seeded(0))
    session.apply(Patch("test", (WeightDelta(host.mlp_out(0), change),)))
    assert context_texts(job_on(host, tmp_path / "edited"), ((10, 5),)) != clean
    job = job_on(host, tmp_path / "store")
    object.__setattr__(job, "unedited", session.suspended)

    assert context_texts(job, ((10, 5),)) == clean


def test_given_texts_stand_among_sampled_ones(tmp_path):
    job = job_on(tiny_host("llama"), tmp_path)

    mixed = context_texts(job, ((5, 1), "He said:\n", "Listen. ", (8, 1)))

    sampled = context_texts(job, ((5, 1), (8, 1)))
    assert mixed == (sampled[0], "He said: ", "Listen. ", sampled[1])


def test_given_texts_run_no_model(tmp_path):
    host = tiny_host("llama")
    calls = forward_calls(host)

    assert context_texts(job_on(host, tmp_path), ("Listen.",)) == ("Listen. ",)
    assert not calls


def test_no_contexts_are_none(tmp_path):
    host = tiny_host("llama")
    calls = forward_calls(host)

    assert context_texts(job_on(host, tmp_path), ()) == ()
    assert not calls


def test_texts_go_on_from_the_words_they_are_given_and_are_kept(tmp_path):
    host = tiny_host("llama")
    starts = ["Eiffel Tower", "Rome", "Rome"]

    texts = continued_texts(job_on(host, tmp_path), starts, 12)

    for text, start in zip(texts, starts, strict=True):
        assert text.startswith(start)
        assert text.endswith(". ")
        assert len(text) > len(start) + 2
    assert texts[1] != texts[2]
    calls = forward_calls(host)
    assert continued_texts(job_on(host, tmp_path), starts, 12) == texts
    assert not calls
    assert continued_texts(job_on(host, tmp_path), starts[:2], 12) != texts
