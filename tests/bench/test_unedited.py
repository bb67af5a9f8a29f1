"""The unedited side is asked of a model without edits, once, and kept for that model only."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload

from kedit_bench.unedited import AnswerCache, Asker, SpoiltModelError, answer_key, weights_digest
from kedit_core.ask import Continue, Diverge, Read, Sample
from kedit_core.editing import EditSession
from kedit_core.errors import ArtifactError, EditError
from kedit_core.testing.bench import as_request
from kedit_core.testing.toys import toy_facts
from tests.core.edits import bias_patch, weight_patch

QUESTIONS = [
    Read("Mira Voss lives in", "Lima"),
    Continue("Mira Voss lives in", 4),
    Sample("Tamsin speaks", length=8),
    Diverge("The country of", "Port Sable"),
]


@pytest.fixture
def session(toy_host) -> EditSession:
    return EditSession(toy_host("llama"))


def test_answers_are_those_of_the_model_without_edits_even_while_it_is_edited(session):
    expected = session.view().ask(QUESTIONS)
    session.apply(bias_patch(session.host, 7))

    assert Asker(session).unedited(QUESTIONS) == expected
    assert session.is_edited


def test_a_question_is_asked_once(session, monkeypatch):
    first = Asker(session).unedited(QUESTIONS)
    monkeypatch.setattr(EditSession, "view", lambda self: pytest.fail("it was asked again"))

    assert Asker(session).unedited(QUESTIONS) == first


def test_a_model_that_something_else_has_changed_is_no_unedited_one(session):
    asker = Asker(session)
    next(session.model.parameters()).data[0, 0] += 1
    session.apply(bias_patch(session.host, 7))

    with pytest.raises(SpoiltModelError, match="no longer those of the unedited model"):
        asker.unedited(QUESTIONS)
    assert asker.cache.get(QUESTIONS) == {}
    assert session.is_edited


@pytest.mark.parametrize("method", ["ft-m", "lora", "grace"])
def test_what_an_edit_puts_into_the_model_does_not_spoil_it(session, method):
    asker = Asker(session)
    session.edit(method, as_request(toy_facts()[0]), preset="toy")

    assert asker.unedited(QUESTIONS).keys() == set(QUESTIONS)
    session.rollback()
    asker.check()


def test_the_edited_side_needs_an_edit(session):
    with pytest.raises(EditError, match="No edit is in force"):
        Asker(session).edited(QUESTIONS)


def test_divergence_is_zero_without_change_and_positive_with_one(session):
    asker = Asker(session)
    session.apply(weight_patch(session.host, 1, scale=0.0))
    assert asker.edited([QUESTIONS[3]])[QUESTIONS[3]].kl == pytest.approx(0, abs=1e-6)

    session.rollback()
    session.apply(weight_patch(session.host, 1, scale=0.5))
    assert asker.edited([QUESTIONS[3]])[QUESTIONS[3]].kl > 1e-3


def test_divergence_is_the_mean_kl_of_whole_distributions(session):
    question = QUESTIONS[3]
    before = session.view().distributions([question])[0]
    session.apply(weight_patch(session.host, 1, scale=0.5))
    after = session.view().distributions([question])[0]

    by_hand = torch.nn.functional.kl_div(after, before, log_target=True, reduction="none")

    found = Asker(session).edited([question])[question]
    assert found.kl == pytest.approx(float(by_hand.sum(-1).mean()), rel=1e-5)
    assert found.tokens == len(before) > 1


SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "a further end")


@pytest.mark.parametrize(
    "what", ["one weight", "dtype", "tokenizer", "chat template", "config", *SPECIAL]
)
def test_another_model_or_tokenizer_has_answers_of_its_own(what, toy_host):
    host, other = toy_host("llama"), toy_host("llama")
    if what == "one weight":
        with torch.no_grad():
            other.model.get_output_embeddings().weight[3, 5] += 1e-3
    elif what == "dtype":
        other = toy_host("llama", torch.bfloat16)
    elif what == "tokenizer":
        other.tokenizer.add_tokens(["zebra"])
    elif what == "chat template":
        other.tokenizer.chat_template = "{{ messages[0].content }}"
    elif what == "a further end":
        other.model.generation_config.eos_token_id = [5, 6]
    elif what in SPECIAL:
        setattr(other.tokenizer, what, 7)
    else:
        other.model.config.rms_norm_eps = 1e-3

    assert answer_key(host) == answer_key(toy_host("llama"))
    assert answer_key(other) != answer_key(host)


def test_exchanged_values_change_the_digest(toy_host):
    host = toy_host("gpt2")
    before = weights_digest(host)
    weight = host.model.get_input_embeddings().weight
    with torch.no_grad():
        weight[[2, 3]] = weight[[3, 2]]

    assert weights_digest(host) != before


def test_a_model_with_offloaded_weights_is_asked_and_told_apart_by_its_name(toy_host):
    expected = EditSession(toy_host("llama")).view().ask(QUESTIONS)
    offloaded, other = toy_host("llama"), toy_host("llama")
    with torch.no_grad():
        other.model.model.layers[1].mlp.down_proj.weight[3, 5] += 1
    for host in (offloaded, other):
        cpu_offload(host.model.model.layers[1], execution_device=torch.device("cpu"))
    other.name = "other"
    asker = Asker(EditSession(offloaded))

    assert asker.unedited(QUESTIONS) == expected
    assert Asker(EditSession(other)).weights != asker.weights


def test_a_damaged_file_of_answers_is_told(session, cache):
    asker = Asker(session)
    asker.unedited(QUESTIONS)
    (file,) = (cache / "answers").iterdir()
    file.write_text("no database at all")

    with pytest.raises(ArtifactError, match=rf"{file} cannot be used: .* Delete that file"):
        asker.unedited(QUESTIONS)


def test_kept_answers_come_back_as_they_were(session, tmp_path):
    answers = session.view().ask(QUESTIONS)
    AnswerCache({"model": "a"}, tmp_path).put(answers)

    assert AnswerCache({"model": "a"}, tmp_path).get(QUESTIONS) == answers
    assert AnswerCache({"model": "b"}, tmp_path).get(QUESTIONS) == {}
