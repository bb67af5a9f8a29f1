"""Scores of single probes are what docs/metrics.md says."""

import math

import pytest
import torch

from kedit_bench.metrics import answers as protocols
from kedit_bench.metrics.answers import exact_match, word_f1
from kedit_core.ask import Score, Text
from kedit_core.editing import ModelView
from kedit_core.measure import by_family, probes_of
from kedit_core.request import EditCase, EditRequest, Probe
from kedit_core.texts import begins_with, contains, natural_end
from tests.bench.asked import case, perfect, says, score, text

REWRITE = "The Tower is in"
NATURAL = (
    *("greedy_exact", "greedy_contains", "greedy_f1", "greedy_cut"),
    *("task_exact", "task_contains", "task_f1"),
)
ALL = ("teacher_forced", "all_tokens", "with_stop", "probability", "greedy", *NATURAL)


def value(protocol: str, answer, *, expected=("Rome",), kind="rephrase") -> float:
    metric = getattr(protocols, protocol)(kind)
    asked = case(Probe(kind=kind, prompt="Q", expected=expected))
    after = says(metric, asked, answer if isinstance(answer, dict) else {("Q",): answer})
    return metric.score(asked, dict(after), after)[""].value


@pytest.mark.parametrize(
    ("written", "found"),
    [
        (" Rome, Italy", True),
        ("rome.", True),
        ("\nRome", True),
        (" Romeo and Juliet", False),
        (" the city of Rome", False),
        ("", False),
    ],
)
def test_a_text_begins_with_the_answer_as_whole_words(written, found):
    assert begins_with(written, "Rome") is found


@pytest.mark.parametrize(
    ("written", "answer", "found"),
    [
        (" I don't know the answer", "I don't know.", True),
        (" I don’t know.", "I don't know.", True),
        (" I don't know", "I don’t know!", True),
        (" I don't knowingly", "I don't know.", False),
        (" the U.S. and", "the U.S.", True),
        (" the U.S", "the U.S.", True),
        (" the U.S.A", "the U.S.", False),
        (" 3.5 miles", "3.", False),
        ("...", "…", False),
    ],
)
def test_an_answers_own_full_stop_and_the_kind_of_apostrophe_do_not_count(written, answer, found):
    assert begins_with(written, answer) is found
    assert contains(f"Well,{written}", answer) is found
    assert exact_match("don’t", "don't")


def test_words_of_scripts_without_spaces_end_anywhere():
    assert begins_with("罗马是意大利的首都", "罗马")
    assert contains("答案是罗马吗", "罗马")


@pytest.mark.parametrize(
    ("written", "found"),
    [("It is Rome", True), ("Romeo, then Rome.", True), ("Jerome", False), ("ROME!", True)],
)
def test_containment_is_of_whole_words(written, found):
    assert contains(written, "Rome") is found


@pytest.mark.parametrize(
    ("written", "end"),
    [
        (" Rome. It is old.", "Rome."),
        (" Rome\nQ: next", "Rome"),
        (" about 1.5 miles off", "about 1.5 miles off"),
        (" the U.S.A", "the U.S.A"),
        ("\n\n Rome", "Rome"),
        ("北京。上海是另一座城市。", "北京。"),
    ],
)
def test_a_text_ends_at_a_line_break_or_at_a_full_stop_before_a_space(written, end):
    assert natural_end(written) == end


def test_exact_match_ignores_case_articles_and_punctuation():
    assert exact_match(" The Rome.", "rome")
    assert not exact_match("Rome is old", "Rome")
    assert exact_match("北京。", "北京")
    assert not exact_match("北京市。", "北京")


@pytest.mark.parametrize(
    ("written", "answer", "same"),
    [
        (" A", "A", True),
        ("a.", "A", True),
        ("(A)", "a)", True),
        ("", "A", False),
        (" B", "A", False),
        (" the", "A", False),
        (" A B", "A", False),
        (" The The!", "The The", True),
        (" Rome", "The The", False),
        (" The Who", "Who", True),
        ("", "+", False),
        (" + ", "+", True),
        (" -", "+", False),
    ],
)
def test_an_answer_of_articles_or_marks_alone_keeps_them(written, answer, same):
    assert exact_match(written, answer) is same
    assert (word_f1(written, answer) == 1) is same


def test_f1_of_an_answer_that_is_an_article_by_hand():
    assert word_f1("A or B", "A") == pytest.approx(0.5)  # precision 1/3, recall 1/1


def test_f1_of_words_by_hand():
    # common: rome; precision 1/3, recall 1/1
    assert word_f1("Rome is old", "Rome") == pytest.approx(0.5)
    assert word_f1("Lima", "Rome") == 0


def test_token_accuracy_is_the_share_of_right_tokens_and_all_tokens_wants_them_all():
    half = score(predicted=(1, 9), tokens=(1, 2))

    assert value("teacher_forced", half) == 0.5
    assert value("all_tokens", half) == 0
    assert value("all_tokens", score((1, 2))) == 1


def test_the_best_accepted_answer_counts():
    said = {("Q", "Rome"): score((9,), (1,)), ("Q", "Roma"): score((1,), (1,))}

    assert value("teacher_forced", said, expected=("Rome", "Roma")) == 1


def test_probability_is_of_the_whole_answer_and_rank_of_its_first_token():
    said = Score("p", "t", (1, 2), (math.log(0.5), math.log(0.1)), (1, 3), rank=4)

    assert value("probability", said) == pytest.approx(0.05)
    assert value("rank", said) == 4


def test_perplexity_is_exp_of_the_mean_over_cases_not_the_mean_of_exps():
    metric = protocols.nll("rewrite")
    parts = []
    for logprob in (-1.0, -3.0):
        after = says(metric, case(), {(REWRITE,): score((1,), logprobs=(logprob,))})
        parts.append(metric.score(case(), dict(after), after))

    assert [p[""].value for p in parts] == [1.0, 3.0]
    assert parts[1]["perplexity_per_case"].value == pytest.approx(math.e**3)
    assert metric.combine({"": 2.0}) == {"perplexity": pytest.approx(math.e**2)}


def test_likelihood_and_perplexity_are_told_by_family():
    hop, hops = (
        Probe(kind="portability", name=name, prompt=name, expected=("Rome",))
        for name in ("hop", "hops")
    )
    metric = protocols.nll("portability")
    asked = case(hop, hops)
    said = {("hop",): score(logprobs=(-1.0,)), ("hops",): score(logprobs=(-3.0,))}

    found = metric.score(asked, {}, says(metric, asked, said))
    values = {part: s.value for part, s in found.items()}

    assert values == {
        "hop": 1,
        "hops": 3,
        "": 2,
        "hop.perplexity_per_case": pytest.approx(math.e),
        "hops.perplexity_per_case": pytest.approx(math.e**3),
        "perplexity_per_case": pytest.approx(math.e**2),
    }
    assert [s.probes for s in found.values()] == [1, 1, 2] * 2
    assert metric.combine(values) == {
        "hop.perplexity": pytest.approx(math.e),
        "hops.perplexity": pytest.approx(math.e**3),
        "perplexity": pytest.approx(math.e**2),
    }


def test_greedy_tokens_are_cut_to_the_answers_length():
    said = {("Q", "Rome"): score((5, 6)), ("Q",): text(" Rome and so on", (5, 6, 7, 8))}
    other = {("Q", "Rome"): score((5, 6)), ("Q",): text(" Ro", (5, 7))}

    assert value("greedy_cut", said) == 1
    assert value("greedy_cut", other) == 0


def text_value(protocol, answer, *, expected) -> float | None:
    """As `value`, and None where there is no score."""
    metric = getattr(protocols, protocol)("rephrase")
    asked = case(Probe(kind="rephrase", prompt="Q", expected=expected))
    after = says(metric, asked, {("Q",): answer})
    found = metric.score(asked, dict(after), after)
    return found[""].value if found else None


def words(count: int) -> str:
    """An answer of so many tokens."""
    return " ".join(f"w{n}" for n in range(count))


ROOM = {"greedy": 12, **dict.fromkeys((*NATURAL, "wild_paper"), 50)}  # tokens
WRITTEN = ("", "\n" * 50, " A: A: A:", " Rome. It is", " w0 w1", words(60))


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("protocol", ROOM)
def test_an_answer_is_judged_by_its_own_length_whatever_is_written(protocol, written, ended):
    answer = Text("p", written, (98, 99), ended)
    fits, too_long = words(ROOM[protocol]), words(ROOM[protocol] + 1)

    assert text_value(protocol, answer, expected=(fits,)) is not None
    assert text_value(protocol, answer, expected=(too_long,)) is None
    assert text_value(protocol, answer, expected=(too_long, "Lima")) == 0


@pytest.mark.parametrize("protocol", ROOM)
def test_a_degenerate_text_scores_zero(protocol):
    assert text_value(protocol, text("\n\n\n", (7, 7, 7)), expected=("New Haven",)) == 0


def test_an_answer_of_more_tokens_than_the_edited_model_wrote_is_judged_wrong():
    short = text(" a b", (0, 1))

    assert text_value("greedy_cut", short, expected=("a b c",)) == 0
    assert text_value("greedy_cut", short, expected=("a b c", "a b")) == 1
    assert text_value("greedy_cut", text("", range(50)), expected=(words(50),)) == 1


def test_the_unedited_model_says_how_long_an_answer_is():
    asked = case(Probe(kind="rephrase", prompt="Q", expected=("Rome",)))
    metric = protocols.greedy("rephrase")
    long, short = (
        says(metric, asked, {("Q", "Rome"): score(range(n)), ("Q",): " Rome"}) for n in (13, 12)
    )

    assert metric.score(asked, long, short) == {}
    assert metric.score(asked, short, long)[""].value == 1


@pytest.mark.parametrize("protocol", ALL)
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("The Tower is in", "Rome"), ("The Tower is in ", "Rome"), ("这座塔在", "罗马")],
)
def test_a_perfect_model_scores_one_by_every_protocol(protocol, prompt, answer):
    metric = getattr(protocols, protocol)("rephrase")
    asked = case(Probe(kind="rephrase", prompt=prompt, expected=(answer,)))
    after = perfect(metric.questions(asked), {prompt: answer})

    assert metric.score(asked, dict(after), after)[""].value == pytest.approx(1)


def test_easyedits_accuracy_has_one_space_always_and_the_first_answer_only(toy_host):
    metric = protocols.easyedit("rephrase")
    asked = case(Probe(kind="rephrase", prompt="Mira Voss lives in ", expected=("Lima", "Rome")))
    view = ModelView(toy_host("llama"))
    after = view.ask(metric.questions(asked))

    # By hand: prompt, one more space, answer; the logits before each token of the answer.
    ids = view.host.tokenizer("Mira Voss lives in  Lima", return_tensors="pt")["input_ids"]
    start = len(view.host.tokenizer("Mira Voss lives in ")["input_ids"])
    with torch.no_grad():
        predicted = view.host.model(ids).logits[0].argmax(-1)
    by_hand = (predicted[start - 1 : -1] == ids[0, start:]).float().mean()

    assert metric.score(asked, {}, after)[""].value == pytest.approx(float(by_hand))


@pytest.mark.parametrize(
    ("written", "wanted"), [(" U.S. of A", 0), (" Rome. It", 1), (" Rome\n", 1)]
)
def test_the_papers_stops_are_literal(written, wanted):
    answer = "U.S." if "U.S" in written else "Rome"

    assert value("wild_paper", text(written), expected=(answer,)) == wanted


# -- locality ----------------------------------------------------------------------------------


def agreement(protocol, before, after, expected=("Paris", "Lyon")):
    metric = getattr(protocols, f"agreement_{protocol}")("locality")
    asked = case(Probe(kind="locality", prompt="Q", expected=expected))
    sides = (says(metric, asked, {("Q",): side}) for side in (before, after))
    return metric.score(asked, *sides)[""].value


def test_agreement_compares_predictions_not_truth():
    # EasyEdit's example: [29, 234, 334] before and [29, 234, 333] after agree in two of three.
    before, after = (score(predicted, (7, 8, 9)) for predicted in ((29, 234, 334), (29, 234, 333)))

    assert agreement("teacher_forced", before, after) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [(" Paris, France", " Paris is old", 1), (" Paris", " Lyon", 0), (" paris.", " Paris", 1)],
)
def test_greedy_agreement_reads_as_many_words_as_the_answer_has(before, after, same):
    assert agreement("greedy", before, after) == same


@pytest.mark.parametrize(
    ("after", "same"), [(" paris, France", 1), (" Paris, Texas", 0), (" Paris", 0)]
)
def test_greedy_agreement_reads_all_words_where_no_answer_is_known(after, same):
    assert agreement("greedy", " Paris, France", after, expected=()) == same


def test_the_same_text_is_the_same_character_by_character():
    assert agreement("same_text", " Paris", " Paris.") == 0
    assert agreement("same_text", " Paris", " Paris") == 1


def test_a_probe_without_an_answer_counts_for_texts_only():
    assert agreement("greedy", " Paris", " Paris", expected=()) == 1
    metric = protocols.agreement_teacher_forced("locality")
    asked = case(Probe(kind="locality", prompt="Q"))

    assert list(metric.questions(asked)) == []
    assert metric.score(asked, {}, {}) == {}


def test_each_protocol_has_a_name_for_each_kind():
    asked = case(Probe(kind="locality", prompt="Q", expected=("Rome",)))

    named, made = protocols.locality_rank(), protocols.rank("locality")
    assert list(named.questions(asked)) == list(made.questions(asked))
    for wrong in ("locality_rnak", "local_rank", "rank_locality"):
        with pytest.raises(AttributeError, match=f"answers' has no attribute '{wrong}'"):
            getattr(protocols, wrong)


# -- cases -------------------------------------------------------------------------------------


def test_every_request_of_a_case_is_asked_as_it_was_rewritten():
    both = EditCase(
        requests=(
            EditRequest(prompt="a {}", subject="x", target_new="b"),
            EditRequest(prompt="c", target_new="d"),
        )
    )

    assert [(p.prompt, p.expected) for p in probes_of(both)] == [("a x", ("b",)), ("c", ("d",))]


def test_cases_of_a_group_are_scored_by_group_too():
    metric, asked = protocols.greedy("rewrite"), case(group="towns")
    after = says(metric, asked, {(REWRITE,): " Rome"})

    found = metric.score(asked, dict(after), after)
    assert {part: s.value for part, s in found.items()} == {"towns": 1, "": 1}
    assert metric.score(case(), dict(after), after).keys() == {""}


def test_the_headline_is_the_mean_over_families():
    found = by_family([("a", 1.0), ("a", 0.0), ("b", 1.0)])

    assert {name: s.value for name, s in found.items()} == {"a": 0.5, "b": 1.0, "": 0.75}
    assert {name: s.probes for name, s in found.items()} == {"a": 2, "b": 1, "": 3}
    assert by_family([]) == {}
