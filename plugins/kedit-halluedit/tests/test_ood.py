"""WISE's OOD score: the share of a text's tokens that the model is sure of."""

import math

import pytest
import torch
from kedit_halluedit.ood import OtherText

from kedit_core import EditCase, EditRequest, Probe
from kedit_core.ask import Read, Score
from kedit_core.editing import ModelView
from kedit_core.testing.toys import toy_facts

REQUEST = EditRequest(prompt="Kelp farming,", subject="Kelp farming,", target_new="grown at sea.")


def case_of(*texts, name="ood"):
    probes = tuple(Probe(kind="rephrase", name=name, prompt=text) for text in texts)
    return EditCase(request=REQUEST, probes=probes)


def reading(question, *probabilities):
    ids = tuple(range(len(probabilities)))
    logprobs = tuple(map(math.log, probabilities))
    return {question: Score(question.prompt, question.target, ids, logprobs, ids)}


def test_tokens_above_four_fifths_count_of_all_tokens_after_the_first_word():
    asked, metric = case_of(" Kelp  grows at sea. "), OtherText()
    question = Read("Kelp", "  grows at sea.", exact=True)

    found = metric.score(asked, {}, reading(question, 0.81, 0.79, 0.2, 1.0))

    assert list(metric.questions(asked)) == [question]
    assert {part: (s.value, s.probes) for part, s in found.items()} == {"": (2 / 4, 1)}


def test_what_a_broken_model_reads_is_no_sure_token():
    asked = case_of("Kelp grows")
    (question,) = OtherText().questions(asked)
    broken = {question: Score("Kelp", " grows", (1,), (math.nan,), (1,))}

    assert OtherText().score(asked, {}, broken)[""].value == 0


@pytest.mark.parametrize("asked", [case_of(), case_of("Kelp "), case_of("Kelp grows", name="")])
def test_a_case_without_a_text_of_two_words_has_no_score(asked):
    assert list(OtherText().questions(asked)) == []
    assert OtherText().score(asked, {}, {}) == {}


@pytest.mark.parametrize("toy", ["gpt2", "llama"])
def test_it_is_the_share_of_probabilities_of_one_pass_over_the_text(toy, toy_host):
    host, metric = toy_host(toy), OtherText()
    seen = set()
    for fact in toy_facts()[:12]:
        text = f"{fact.prompt.format(fact.subject)} {fact.answer}"
        asked = case_of(text)
        found = metric.score(asked, {}, ModelView(host).ask(metric.questions(asked)))

        encoded = host.tokenizer(text, return_offsets_mapping=True)
        ids, ends = torch.tensor(encoded["input_ids"]), [e for _, e in encoded["offset_mapping"]]
        with torch.no_grad():
            each = host.model(ids[None]).logits[0, :-1].softmax(-1)
        sure = each[torch.arange(len(ids) - 1), ids[1:]] > 0.8
        rest = [n for n, end in enumerate(ends) if end > len(text.split()[0])]
        expected = [bool(sure[n - 1]) for n in rest]

        assert found[""].value == pytest.approx(sum(expected) / len(expected))
        seen.add(found[""].value)
    assert len(seen) > 1, "the texts tell nothing apart"
