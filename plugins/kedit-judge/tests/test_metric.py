"""Replies are judged, verdicts become scores, and nothing is asked twice."""

import contextlib
import hashlib
import json
import logging
import sqlite3
import threading

import pytest
from kedit_judge import metric as metrics
from kedit_judge.judge import Template

from kedit_core import ArtifactError, EditCase, EditRequest, Probe, discover
from kedit_core.ask import Continue, Text
from kedit_core.named import create
from kedit_core.testing.toys import toy_facts

REQUEST = EditRequest(prompt="Halden Bridge crosses the", subject="Halden Bridge", target_new="Oka")


def case_of(*probes):
    return EditCase(request=REQUEST, probes=probes)


def probe(kind, prompt, name="", expected=("Oka",)):
    return Probe(kind=kind, name=name, prompt=prompt, expected=expected)


def said(**replies):
    """Answers by prompt, as the model gives them."""
    return {Continue(p, 50, "task"): Text(p, text, ()) for p, text in replies.items()}


def by_words(**words):
    """A judge whose words depend on which reply it is shown."""

    def say(prompt):
        (found,) = [word for reply, word in words.items() if f"\n{reply}\n" in prompt]
        return found

    return say


def values(scores):
    return {part: (score.value, score.probes) for part, score in scores.items()}


# -- scores ----------------------------------------------------------------------------------


def test_unparseable_verdicts_are_counted_apart(stub):
    stub.say = by_words(one="A", two="A", three="B", four="Hard to say.")
    case = case_of(*(probe("rephrase", f"q{n}") for n in range(4)))
    metric = metrics.rephrase(url=stub.url, model="j")

    scores = metric.score(case, {}, said(q0="one", q1="two", q2="three", q3="four"))

    assert values(scores) == {"": (2 / 3, 3), "unparseable": (1 / 4, 4)}


def test_case_with_unparseable_verdicts_only_has_no_headline(stub):
    stub.say = lambda prompt: "¯\\_(ツ)_/¯"
    metric = metrics.rephrase(url=stub.url, model="j")

    scores = metric.score(case_of(probe("rephrase", "q")), {}, said(q="x"))

    assert values(scores) == {"unparseable": (1.0, 1)}


def test_headline_is_the_mean_over_families(stub):
    stub.say = by_words(yes="A", no="B", eh="?")
    case = case_of(
        *(probe("portability", f"a{n}", "alias") for n in range(3)),
        probe("portability", "h0", "hop"),
        probe("portability", "x0", "lost"),
    )
    metric = metrics.portability(url=stub.url, model="j")

    scores = metric.score(case, {}, said(a0="yes", a1="no", a2="no", h0="yes", x0="eh"))

    assert values(scores) == {
        "alias": (pytest.approx(1 / 3), 3),
        "hop": (1.0, 1),
        "": (pytest.approx(2 / 3), 4),
        "unparseable": (1 / 5, 5),
    }


@pytest.mark.parametrize("kind", ["rewrite", "rephrase", "portability", "locality"])
def test_each_metric_takes_its_kind_of_probe(kind, stub):
    kinds = ("rephrase", "portability", "locality")
    case = case_of(*(probe(k, f"of {k}") for k in kinds), probe(kind, "no answer", expected=()))
    wanted = REQUEST.text if kind == "rewrite" else f"of {kind}"
    metric = getattr(metrics, kind)(url=stub.url, model="j")

    assert list(metric.questions(case)) == [Continue(wanted, 50, form="task")]
    assert values(metric.score(case, {}, said(**{wanted: "x"})))[""] == (1.0, 1)


def test_case_without_such_probes_has_no_score(stub):
    metric = metrics.locality(url=stub.url, model="j")

    assert metric.score(case_of(), {}, {}) == {}
    assert stub.calls == 0


def test_judge_sees_question_answers_and_the_reply_to_its_natural_end(stub):
    asked = probe("rephrase", "Which river?", expected=("Oka", "the {Oka}"))
    metric = metrics.rephrase(url=stub.url, model="judge-1", temperature=0.5)

    metric.score(case_of(asked), {}, said(**{"Which river?": "\n The U.S. Oka {}. It is.\nQ:"}))

    (prompt,) = stub.prompts
    assert "\nWhich river?\n" in prompt
    assert "\n- Oka\n- the {Oka}\n" in prompt
    assert "\nThe U.S.\n" in prompt
    assert stub.bodies[0]["model"] == "judge-1"
    assert stub.bodies[0]["temperature"] == 0.5


def test_judge_is_cold_by_default(stub):
    metrics.rephrase(url=stub.url, model="j").score(
        case_of(probe("rephrase", "q")), {}, said(q="x")
    )

    assert stub.bodies[0]["temperature"] == 0


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (" Oka. It is long.", "Oka."),
        ("Oka\nQ: and", "Oka"),
        ("\n\nOka", "Oka"),
        ("1.5 km at the U.S.A border", "1.5 km at the U.S.A border"),
        ("", ""),
    ],
)
def test_reply_ends_where_a_sentence_does(text, end):
    assert metrics.natural_end(text) == end


def test_metric_version_belongs_to_this_prompt():
    """A changed prompt is another protocol: raise the version in the names, then the hash."""
    assert metrics.Correct.template.digest == "b2fbf252e7b9"


# -- verdicts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", 1),
        (" b.", 0),
        ("**B**", 0),
        ("(A) The reply gives the answer.", 1),
        ("A: correct", 1),
        ("B: incorrect, since it is not correct", 0),
        ("A\nthe reply names it, and B would be wrong", 1),
        ("B The reply names another river.", 0),
        ("Answer: B", 0),
        ("The final answer is **A**.", 1),
        ("Correct.", 1),
        ("INCORRECT", 0),
        ("The reply is not correct.", 0),
        ("It isn't correct", 0),
        ("A reply like this is incorrect.", 0),
        ("<think>B? No: it is correct.</think>\n\nB", 0),
        ("<think>It is correct, so", None),
        ("It may be correct or incorrect.", None),
        ("Absolutely", None),
        ("Both", None),
        ("A's the one", None),
        ("C", None),
        ("42", None),
        ("", None),
    ],
)
def test_what_the_judge_means(text, verdict):
    assert metrics.Correct.template.verdict(text) == verdict


# -- kept verdicts ---------------------------------------------------------------------------


def ask_once(stub, *, reply="x", prompt="q", expected=("Oka",), **settings):
    metric = metrics.rephrase(**{"url": stub.url, "model": "j", **settings})
    case = case_of(probe("rephrase", prompt, expected=expected))
    return metric.score(case, {}, said(**{prompt: reply}))


def test_same_judgement_is_made_once_even_by_another_metric(stub):
    first = ask_once(stub)
    again = ask_once(stub, temperature=0)

    assert stub.calls == 1
    assert values(first) == values(again) == {"": (1.0, 1), "unparseable": (0.0, 1)}


@pytest.mark.parametrize(
    "other",
    [
        {"reply": "y"},
        {"prompt": "q2"},
        {"expected": ("Oka", "Volga")},
        {"model": "k"},
        {"temperature": 1},
    ],
)
def test_another_judgement_is_made_anew(other, stub):
    ask_once(stub)
    ask_once(stub, **other)

    assert stub.calls == 2


def test_another_prompt_of_the_judge_is_asked_anew(stub, monkeypatch):
    ask_once(stub)
    template = metrics.Correct.template
    monkeypatch.setattr(metrics.Correct, "template", Template(template.text + "\n", template.read))
    ask_once(stub)

    assert stub.calls == 2


def test_replies_that_were_kept_by_earlier_versions_are_found(stub, cache):
    content = ["j", 0.0, "b2fbf252e7b9", "q", ["Oka"], "x"]
    row = (hashlib.sha256(json.dumps(content).encode()).hexdigest(), "B")
    (cache / "judge").mkdir()
    with contextlib.closing(sqlite3.connect(cache / "judge" / "replies.sqlite")) as file, file:
        file.execute("CREATE TABLE replies (key TEXT PRIMARY KEY, reply TEXT)")
        file.execute("INSERT INTO replies VALUES (?, ?)", row)

    assert values(ask_once(stub))[""] == (0.0, 1)
    assert stub.calls == 0


def test_what_makes_no_verdict_is_kept_too(stub):
    stub.say = lambda prompt: "?"
    ask_once(stub)
    again = ask_once(stub)

    assert stub.calls == 1
    assert values(again) == {"unparseable": (1.0, 1)}


def test_same_reply_twice_in_a_case_is_judged_once(stub):
    case = case_of(probe("rephrase", "q", "a"), probe("rephrase", "q", "b"))

    scores = metrics.rephrase(url=stub.url, model="j").score(case, {}, said(q="x"))

    assert stub.calls == 1
    assert values(scores)[""] == (1.0, 2)


def test_paid_verdicts_survive_when_a_later_call_is_refused(stub):
    case = case_of(probe("rephrase", "q0"), probe("rephrase", "q1"))
    replies = said(q0="zero", q1="one")
    stub.plan = [(200, stub.completion("A"), {}), (400, "{}", {})]
    with pytest.raises(Exception, match="status 400"):
        metrics.rephrase(url=stub.url, model="j", workers=1).score(case, {}, replies)

    scores = metrics.rephrase(url=stub.url, model="j", workers=1).score(case, {}, replies)

    assert stub.calls == 3
    assert values(scores)[""] == (1.0, 2)


def test_damaged_file_of_kept_verdicts_is_told(stub, cache):
    (cache / "judge").mkdir()
    (cache / "judge" / "replies.sqlite").write_text("no database at all")

    with pytest.raises(ArtifactError, match=r"replies\.sqlite cannot be used: .*Delete that file"):
        ask_once(stub)


# -- together --------------------------------------------------------------------------------


def test_judgements_of_a_case_run_together(stub):
    together = threading.Barrier(4)  # passes only while four calls are under way

    def say(prompt):
        together.wait(timeout=30)
        return "A"

    stub.say = say
    case = case_of(*(probe("rephrase", f"q{n}") for n in range(4)))
    replies = said(**{f"q{n}": "x" for n in range(4)})

    scores = metrics.rephrase(url=stub.url, model="j", retries=0).score(case, {}, replies)

    assert values(scores)[""] == (1.0, 4)


def test_no_more_calls_run_together_than_there_are_workers(stub):
    running, most, lock = 0, 0, threading.Lock()

    def say(prompt):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.02)
        with lock:
            running -= 1
        return "A"

    stub.say = say
    case = case_of(*(probe("rephrase", f"q{n}") for n in range(6)))

    metrics.rephrase(url=stub.url, model="j", workers=2).score(
        case, {}, said(**{f"q{n}": "x" for n in range(6)})
    )

    assert stub.calls == 6
    assert most == 2


# -- cost ------------------------------------------------------------------------------------


def costs(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "kedit_judge.judge"]


def test_cost_is_logged_with_each_summary_that_has_news(stub, caplog):
    caplog.set_level(logging.INFO)
    ask_once(stub, reply="kept before")
    case = case_of(*(probe("rephrase", f"q{n}") for n in range(2)), probe("rephrase", "q"))
    replies = said(q0="x", q1="y", q="kept before")
    metric = metrics.rephrase(url=stub.url, model="j", price_in=2.0, price_out=50)

    metric.score(case, {}, replies)
    metric.score(case, {}, replies)  # as when a finished run is scored once more
    assert metric.combine({"": 1.0}) == {}
    assert metric.combine({"": 1.0}) == {}

    assert costs(caplog) == [
        f"Judge j (prompt {metrics.Correct.template.digest}, rephrase probes) so far: 2 calls, "
        f"1 kept answers, 200 tokens read, 2 written, cost 0.0005."
    ]


def test_without_prices_no_money_is_named_and_uncounted_tokens_are_admitted(stub, caplog):
    caplog.set_level(logging.INFO)
    stub.usage = None
    metric = metrics.rephrase(url=stub.url, model="j")

    metric.score(case_of(probe("rephrase", "q")), {}, said(q="x"))
    metric.combine({})

    (line,) = costs(caplog)
    assert line.endswith("0 written; the endpoint did not count the tokens of 1 calls.")
    assert "cost" not in line


# -- as users meet them ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "reference"),
    [
        ("efficacy/judge@1", "rewrite", "target"),
        ("generalization/judge@1", "rephrase", "target"),
        ("portability/judge@1", "portability", "target"),
        ("locality-accuracy/judge@1", "locality", "truth"),
    ],
)
def test_registered_metrics_say_how_they_measure(name, kind, reference, stub):
    spec = discover().metric(name)

    assert create(spec, {"url": stub.url, "model": "j"}).kind == kind
    assert (spec.probe, spec.reference) == (kind, reference)
    assert (spec.decoding, spec.scorer, spec.form) == ("greedy", "judge", "task")
    assert (spec.better, spec.unit, spec.default) == ("higher", "share", False)


def test_toy_is_judged_from_question_to_summary(stub, toy_host, caplog):
    from kedit_bench.scoring import Scorer, choose_metrics
    from kedit_core.editing import EditSession

    caplog.set_level(logging.INFO)
    stub.say = lambda prompt: (
        "A" if prompt.split("- ")[1].split("\n")[0] in prompt.split("Reply:\n")[1] else "B"
    )
    view = EditSession(toy_host("llama")).view()
    fact = toy_facts()[0]
    forms = [fact.prompt.replace("{}", fact.subject), *fact.rephrases]
    asked = [Continue(form, 50, "task") for form in forms]
    replies = view.ask(asked)
    known = metrics.natural_end(replies[asked[1]].text)
    assert known  # what the toy says is taken for right in one place and for wrong in the other
    case = EditCase(
        request=EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=fact.target_new),
        probes=(
            probe("rephrase", forms[1], expected=(known,)),
            probe("rephrase", forms[2], expected=("Atlantis",)),
        ),
    )
    names = ("efficacy/judge@1", "generalization/judge@1", "locality-accuracy/judge@1")
    chosen = choose_metrics(discover(), [f"{name}:url={stub.url},model=j" for name in names])
    scorer = Scorer(chosen, dict.fromkeys(("schedule", "model", "dtype", "dataset"), "toy"))
    before = view.ask(scorer.questions(case))
    edited = {**before, asked[0]: Text(forms[0], f" {fact.target_new}. And so on.", ())}

    means = scorer.summary(
        [*scorer.unchanged(case, before), *scorer.score(case, before, edited, "immediate")]
    )

    assert {
        (m.protocol.metric.split("/")[0], m.protocol.part, m.protocol.moment): (m.mean, m.probes)
        for m in means
    } == {
        ("efficacy", "", "unedited"): (0, 1),
        ("efficacy", "", "immediate"): (1, 1),
        ("efficacy", "unparseable", "unedited"): (0, 1),
        ("efficacy", "unparseable", "immediate"): (0, 1),
        ("generalization", "", "unedited"): (0.5, 2),
        ("generalization", "", "immediate"): (0.5, 2),
        ("generalization", "unparseable", "unedited"): (0, 2),
        ("generalization", "unparseable", "immediate"): (0, 2),
    }
    assert stub.calls == 4  # the rephrased prompts say the same at both moments
    assert [line.split("far: ")[1].split(",")[0] for line in costs(caplog)] == ["2 calls"] * 2
