"""Formulas of the benchmarks' own metrics, on numbers that can be checked by hand."""

import json
import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from kedit_bench.metrics.contrast import Contrast
from kedit_bench.metrics.generation import Consistency, Essence, Fluency, Naturalness
from kedit_bench.metrics.opinion import Opinion, divergence
from kedit_bench.metrics.tests_passed import TestsPassed
from kedit_bench.metrics.zsre import ZsreHarness
from kedit_core.ask import Divergence, Read, Text
from kedit_core.editing import ModelView
from kedit_core.errors import SettingError
from kedit_core.plugins import discover
from kedit_core.request import EditCase, EditRequest, Probe
from kedit_core.spec import MetricSpec
from kedit_core.testing.toys import toy_facts
from kedit_core.texts import ngram_entropy
from tests.bench.asked import case, says, score, text


def read(probability: float, tokens: int = 1):
    return score((1,) * tokens, logprobs=(math.log(probability),) * tokens)


def test_counterfact_compares_the_new_answer_with_the_true_one():
    asked = case(
        Probe(kind="rephrase", prompt="P1"),
        Probe(kind="rephrase", prompt="P2"),
        Probe(kind="locality", name="neighborhood", prompt="N"),
        Probe(kind="locality", name="distracting", prompt="D"),
    )
    metric = Contrast()
    after = says(
        metric,
        asked,
        {
            ("The Tower is in", "Rome"): read(0.6, 2),  # two tokens: their geometric mean is 0.6
            ("The Tower is in", "Paris"): read(0.1),
            ("P1", "Rome"): read(0.3),
            ("P1", "Paris"): read(0.2),
            ("P2", "Rome"): read(0.1),
            ("P2", "Paris"): read(0.4),
            ("N", "Rome"): read(0.2),
            ("N", "Paris"): read(0.5),
        },
    )

    found = {part: s.value for part, s in metric.score(asked, {}, after).items()}

    assert found == pytest.approx({"ES": 1, "EM": 0.5, "PS": 0.5, "PM": -0.1, "NS": 1, "NM": 0.3})


def test_the_score_is_the_harmonic_mean_of_means_and_zero_if_one_is_zero():
    assert Contrast().combine({"ES": 1.0, "PS": 0.5, "NS": 0.25})[""] == pytest.approx(3 / 7)
    assert Contrast().combine({"ES": 1.0, "PS": 0.0, "NS": 1.0}) == {"": 0.0}
    assert Contrast().combine({"ES": 1.0, "PS": 1.0}) == {}


def test_counterfact_says_nothing_where_the_truth_is_unknown():
    unknown = case(truth=())

    assert list(Contrast().questions(unknown)) == []
    assert Contrast().score(unknown, {}, {}) == {}


def harness(host, case, bos):
    """AlphaEdit's `compute_rewrite_quality_zsre` and its loader of ZsRE, with its cases for LLaMA
    where there is a beginning token: a prefix for each token of the answer."""
    tokenizer, keeps = host.tokenizer, bool(bos)

    def right(prefix, token):
        ids = torch.tensor([tokenizer(prefix)["input_ids"]])
        with torch.no_grad():
            predicted = int(host.model(ids).logits[0, -1].argmax())
        return predicted == tokenizer(token)["input_ids"][keeps]

    def share(pairs):
        return sum(right(*pair) for pair in pairs) / len(pairs)

    target = tokenizer(" " + case.request.target_new)["input_ids"][keeps:]
    written = {"efficacy": [case.request.text], "generalization": []}
    unrelated = []
    for probe in case.probes:
        if probe.kind == "rephrase":
            written["generalization"].append(probe.prompt)
        if probe.kind == "locality":
            answer = tokenizer(" " + probe.expected[0])["input_ids"]
            unrelated += [
                (probe.prompt + "?" + tokenizer.decode(answer[:i]), tokenizer.decode(answer[i]))
                for i in range(len(answer))
            ]
    prefixes = {
        part: [
            (
                prompt + (" " if keeps and i else "") + tokenizer.decode(target[:i]),
                tokenizer.decode(target[i]),
            )
            for prompt in prompts
            for i in range(len(target))
        ]
        for part, prompts in written.items()
    }
    return {part: share(pairs) for part, pairs in {**prefixes, "specificity": unrelated}.items()}


@pytest.mark.parametrize(("toy", "bos"), [("gpt2", ""), ("llama", "<s>")])
def test_zsre_is_scored_as_by_the_code_of_alphaedits_authors(toy, bos, toy_host):
    metric, view = ZsreHarness(bos), ModelView(toy_host(toy))
    values: dict[str, set[float]] = defaultdict(set)
    for number, fact in enumerate(f for f in toy_facts() if " " in f.target_new + f.answer):
        target = fact.answer if number % 2 else fact.target_new
        prompts = (*fact.rephrases, f"{fact.rephrases[0]} ")  # the last ends in a space
        rephrased = [Probe(kind="rephrase", prompt=prompt) for prompt in prompts]
        near = [
            Probe(kind="locality", prompt=n.prompt, expected=n.answer) for n in fact.neighborhood
        ]
        asked = EditCase(
            request=EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=target),
            probes=(*rephrased, *near),
        )
        found = metric.score(asked, {}, view.ask(metric.questions(asked)))

        assert {k: s.value for k, s in found.items()} == harness(view.host, asked, bos)
        for part, share in found.items():
            values[part].add(share.value)
    assert all(len(seen) > 2 for seen in values.values()), "the cases tell nothing apart"


def test_the_faults_of_alphaedits_code_lower_the_scores():
    asked = case(Probe(kind="locality", prompt="Q", expected=("Lima",)))
    said = {
        ("The Tower is in",): score((1, 2)),
        ("The Tower is in ",): score((1, 9), (1, 2)),  # a second space, and another prediction
        ("Q?",): score((5, 6)),
        ("Q?<s>",): score((5, 6)),
    }
    values = []
    for metric in (ZsreHarness(), ZsreHarness("<s>")):
        found = metric.score(asked, {}, says(metric, asked, said))
        values.append({part: score.value for part, score in found.items()})

    assert values[0] == {"efficacy": 1, "specificity": 1}
    assert values[1] == pytest.approx({"efficacy": 1 / 2, "specificity": 2 / 3})


@pytest.mark.parametrize(
    ("written", "entropy"),
    [
        ("a b c d", math.log2(3) / 3 + 2 / 3),
        ("", 0),
        ("a", 0),
        ("a b", 0),
        ("a a a a a", 0),
    ],
)
def test_ngram_entropy_by_hand(written, entropy):
    assert ngram_entropy(written) == pytest.approx(entropy)


def test_fluency_reads_prompt_and_text_and_uses_generation_prompts_where_there_are():
    asked = case(Probe(kind="generation", prompt="a b"))
    metric = Fluency()
    found = metric.score(asked, {}, says(metric, asked, {("a b",): Text("", " c d", (), room=20)}))

    assert found[""].value == pytest.approx(math.log2(3) / 3 + 2 / 3)
    assert found["distinct_2"].value == 1
    assert [q.prompt for q in metric.questions(case())] == ["The Tower is in"]


@pytest.mark.parametrize("ended", [True, False])
def test_fluency_does_not_count_texts_for_which_the_prompt_left_no_room(ended):
    asked = case(*(Probe(kind="generation", prompt=prompt) for prompt in ("a b", "a a a a")))
    metric = Fluency()
    said = {
        ("a b",): Text("", " c d", (1, 2), ended, room=20),
        ("a a a a",): Text("", " a", (1,), ended, room=19),
    }
    found = metric.score(asked, {}, says(metric, asked, said))

    assert (found[""].probes, found["repetition"].value) == (1, 0)
    assert metric.score(case(), {}, says(metric, case(), {("The Tower is in",): " Rome"})) == {}


@pytest.mark.parametrize("room", [98, None])
def test_fluency_counts_a_text_that_the_model_ended_at_once(room):
    metric, asked = Fluency(), case(Probe(kind="generation", prompt="a b"))
    after = says(metric, asked, {("a b",): Text("", "", (), ended=True, room=room)})

    assert (
        metric.score(asked, {}, after)[""].value,
        metric.score(asked, {}, after)[""].probes,
    ) == (0, 1)


def test_repetition_looks_at_three_words_before():
    asked, metric = case(Probe(kind="generation", prompt="a b c")), Fluency()
    after = says(metric, asked, {("a b c",): text(" a d e f d", range(20))})

    assert metric.score(asked, {}, after)["repetition"].value == 2 / 8


def test_a_text_is_degenerate_if_more_than_half_its_words_stand_among_the_three_before():
    asked, metric = case(*(Probe(kind="generation", prompt=p) for p in "PQ")), Fluency(prompt=False)
    half, more = "a b a b", "a b a b a"  # 2 of 4 words, and 3 of 5
    after = says(metric, asked, {("P",): text(half, range(20)), ("Q",): text(more, range(20))})

    assert metric.score(asked, {}, after)["degenerate"].value == 1 / 2


def test_fluency_of_the_text_without_its_prompt():
    asked, metric = case(Probe(kind="generation", prompt="x x x x")), Fluency(prompt=False)
    after = says(metric, asked, {("x x x x",): text(" a b c d", range(20))})

    assert metric.score(asked, {}, after)[""].value == pytest.approx(math.log2(3) / 3 + 2 / 3)


def test_essence_is_how_the_edited_model_reads_the_first_100_tokens_about_the_subject():
    metric, asked = Essence(), case(essence=["A tower", "of iron. "])
    read = Read("A", " tower of iron.", exact=True)
    after = {read: score((1,) * 120, logprobs=(-1.0,) * 50 + (-3.0,) * 50 + (-9.0,) * 20)}

    found = metric.score(asked, {}, after)

    assert list(metric.questions(asked)) == [read]
    assert found[""].value == 2
    assert found["perplexity_per_case"].value == pytest.approx(math.exp(2))
    assert metric.score(case(), {}, {}) == metric.score(case(essence=["One"]), {}, {}) == {}


def test_essence_reads_no_more_words_than_count():
    (read,) = Essence().questions(case(essence=["word " * 300]))

    assert len(read.target.split()) == 100


def test_naturalness_is_the_mean_over_what_the_unedited_model_reads():
    asked = case(*(Probe(kind="generation", prompt=prompt) for prompt in "PQR"))
    metric = Naturalness()
    after = says(metric, asked, {("P",): " c d", ("Q",): ", e\ufffd", ("R",): ""})
    whole, cut = Read("P", " c d", exact=True), Read("Q", ", e", exact=True)
    before = {whole: score((1, 2), logprobs=(-1, -3)), cut: score((1,), logprobs=(-4,))}

    found = metric.score(asked, before, after)

    assert metric.followups(asked, after) == [whole, cut]
    assert (found[""].value, found[""].probes) == (3, 2)
    assert found["perplexity_per_case"].value == pytest.approx(math.exp(3))
    assert metric.combine({"": 2.0}) == {"perplexity": pytest.approx(math.exp(2))}


def test_naturalness_of_no_text_is_no_score():
    metric = Naturalness()

    assert metric.score(case(), {}, says(metric, case(), {("The Tower is in",): "\ufffd"})) == {}


def test_consistency_is_the_cosine_of_tfidf_vectors(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"rome": 0, "forum": 1, "old": 2}))
    np.save(tmp_path / "idf.npy", np.array([1.0, 2.0, 1.0]))
    metric = Consistency(str(tmp_path / "vocab.json"), str(tmp_path / "idf.npy"))
    asked = case(references=["Rome has a forum."])

    after = says(metric, asked, {("The Tower is in",): " Rome. Old Rome!"})

    # ours: rome 2, old 1; theirs: rome 1, forum 2
    assert metric.score(asked, {}, after)[""].value == pytest.approx(2 / (5**0.5 * 5**0.5))
    assert metric.score(case(), {}, {}) == {}


def test_consistency_without_its_files_is_one_sentence(tmp_path):
    with pytest.raises(SettingError, match="TF-IDF files cannot be read"):
        Consistency(str(tmp_path / "vocab.json"), str(tmp_path / "idf.npy"))


def test_an_opinion_of_a_broken_model_is_no_number_and_one_without_any_doubt_is_zero():
    probe = Probe(kind="opinion", prompt="Q", options={"same": ["good"], "other": ["bad"]})
    asked, metric = case(probe), Opinion()
    before = says(metric, asked, {("Q",): score(logprobs=(-1.0,))})

    broken = says(metric, asked, {("Q",): score(logprobs=(math.nan,))})
    assert all(math.isnan(s.value) for s in metric.score(asked, before, broken).values())

    sure = {("Q", "good"): score(logprobs=(-1000.0,)), ("Q", "bad"): score(logprobs=(0.0,))}
    found = metric.score(asked, before, says(metric, asked, sure))
    assert found[""].value == pytest.approx(0, abs=1e-300)


def test_an_opinion_is_scored_against_others_and_against_before():
    probe = Probe(kind="opinion", prompt="Q", options={"same": ["good"], "other": ["bad"]})
    metric, asked = Opinion(), case(probe)
    before = says(metric, asked, {("Q", "good"): read(0.5), ("Q", "bad"): read(0.5)})
    after = says(metric, asked, {("Q", "good"): read(0.25), ("Q", "bad"): read(0.125)})

    found = {part: s.value for part, s in metric.score(asked, before, after).items()}

    assert found["z_sent"] == pytest.approx(2 / 3)  # σ(log 2)
    assert found["z_topic"] == pytest.approx(0.5)
    assert found[""] == pytest.approx(1 / 3)


def test_a_better_topic_than_before_counts_no_more_than_one():
    probe = Probe(kind="opinion", prompt="Q", options={"same": ["good"], "other": ["bad"]})
    metric, asked = Opinion(), case(probe)
    before = says(metric, asked, {("Q",): read(0.1)})
    after = says(metric, asked, {("Q",): read(0.9)})

    assert metric.score(asked, before, after)["z_topic"].value == 1


def test_divergence_is_the_mean_over_the_tokens_of_what_is_said_about_another_topic():
    asked = case(Probe(kind="locality", prompt="Q", expected=("a", "b")))
    metric = divergence()
    said = {("Q", "a"): Divergence(0.2, tokens=1), ("Q", "b"): Divergence(0.4, tokens=3)}
    after = says(metric, asked, said)

    assert metric.score(asked, {}, after)[""].value == pytest.approx((0.2 + 3 * 0.4) / 4)


def test_fewer_instances_are_better():
    better = {s.name: s.better for s in discover().all(MetricSpec) if s.probe == "instance"}

    assert better["instance/greedy@1"] == better["instance/teacher-forced@1"] == "lower"
    assert better["instance/nll@1"] == better["instance/rank@1"] == "higher"


def query(test, prompt, *, combine="any", name="hops", conditions=()):
    options = {"test": test, "combine": combine, "conditions": list(conditions)}
    return Probe(kind="portability", name=name, prompt=prompt, expected=("Rome",), options=options)


def passed(*probes, said, before=None):
    metric, asked = TestsPassed(), case(*probes)
    after = says(metric, asked, said)
    found = metric.score(asked, says(metric, asked, before or said), after)
    return {part: (s.value, s.probes) for part, s in found.items()}


def test_any_or_all_of_a_tests_questions_must_be_answered():
    said = {("Q1",): " It is Rome. No.", ("Q2",): " Lima"}

    assert passed(query("t", "Q1"), query("t", "Q2"), said=said)[""] == (1, 1)
    every = (query("t", "Q1", combine="all"), query("t", "Q2", combine="all"))
    assert passed(*every, said=said)[""] == (0, 1)


def test_an_answer_after_the_natural_end_does_not_count():
    assert passed(query("t", "Q"), said={("Q",): " Lima. Rome"})[""] == (0, 1)


def test_a_test_whose_conditions_the_unedited_model_fails_is_not_counted():
    condition = {"prompt": "C", "expected": ["Oslo"]}
    probes = (query("t", "Q", conditions=[condition]), query("u", "Q", name="other"))
    said = {("Q",): " Rome", ("C",): " Lima"}

    assert passed(*probes, said=said) == {"other": (1, 1), "": (1, 1)}
    assert passed(probes[0], said=said) == {}
    known = {("Q",): " Lima", ("C",): " Oslo"}
    assert passed(probes[0], said=said, before=known)[""] == (1, 1)
