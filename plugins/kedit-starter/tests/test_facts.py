"""The starter facts: well formed, varied, and known to the real model."""

import json
from collections import Counter
from importlib.resources import files

import pytest
import typer
from kedit_starter.check import Question, Reply, ask, main, questions
from kedit_starter.dataset import Starter
from typer.testing import CliRunner

from kedit_core import DataError, EditCase
from kedit_core.records import checked
from kedit_core.testing.datasets import FAULTS, refuse_spoilt

FIELDS = {
    "id",
    "relation",
    "subject",
    "prompt",
    "answer",
    "target_new",
    "rephrases",
    "neighborhood",
    "portability",
}
TEXT = (files("kedit_starter") / "facts.jsonl").read_text(encoding="utf-8")
FACTS = [json.loads(line) for line in TEXT.splitlines()]


def offenders(rule):
    """Ids of the facts that break the rule."""
    return [fact["id"] for fact in FACTS if not rule(fact)]


def filled(fact):
    """The fact's three prompts with the subject in its place."""
    return [p.replace("{}", fact["subject"]) for p in (fact["prompt"], *fact["rephrases"])]


def test_facts_are_many_and_of_many_kinds():
    relations = Counter(fact["relation"] for fact in FACTS)

    assert len(FACTS) >= 150
    assert len(relations) >= 20
    assert max(relations.values()) <= 35
    assert sum(fact["portability"] is not None for fact in FACTS) >= 60


def test_subjects_stand_in_different_places():
    starts = Counter(fact["prompt"].startswith("{}") for fact in FACTS)

    assert starts[True] >= 15
    assert starts[False] >= 20


def test_ids_are_unique():
    assert [name for name, n in Counter(f["id"] for f in FACTS).items() if n > 1] == []


def test_no_question_is_a_fact_twice():
    texts = Counter(fact["prompt"].replace("{}", fact["subject"]) for fact in FACTS)

    assert [text for text, n in texts.items() if n > 1] == []


def test_records_have_the_fields_of_the_format():
    assert offenders(lambda fact: fact.keys() == FIELDS) == []
    assert offenders(lambda fact: len({fact["prompt"], *fact["rephrases"]}) == 3) == []
    assert offenders(lambda fact: len({n["prompt"] for n in fact["neighborhood"]}) == 3) == []


def test_subject_stands_once_and_before_the_end_of_each_prompt():
    def is_placed_well(fact):
        prompts = (fact["prompt"], *fact["rephrases"])
        return all(p.count("{}") == 1 and not p.endswith("{}") for p in prompts) and all(
            text.count(fact["subject"]) == 1 and text == text.strip() for text in filled(fact)
        )

    assert offenders(is_placed_well) == []


def test_target_is_another_answer():
    def differs(fact):
        target, answer = fact["target_new"].casefold(), fact["answer"].casefold()
        return not (target in answer or answer in target or target in fact["subject"].casefold())

    assert offenders(differs) == []


def test_answer_and_target_are_in_no_prompt():
    def is_silent(fact):
        words = {word for text in filled(fact) for word in text.split()}
        return words.isdisjoint({fact["answer"], fact["target_new"]})

    assert offenders(is_silent) == []


def test_neighbours_are_about_others_and_have_other_answers_than_the_target():
    def is_apart(fact):
        return all(
            fact["subject"] not in near["prompt"] and near["answer"] != fact["target_new"]
            for near in fact["neighborhood"]
        )

    assert offenders(is_apart) == []


def test_consequence_names_the_subject_and_not_its_own_answer():
    def is_askable(fact):
        hop = fact["portability"]
        return hop is None or (
            fact["subject"] in hop["prompt"] and hop["answer"] not in hop["prompt"]
        )

    assert offenders(is_askable) == []


def test_cases_carry_all_records():
    cases = list(Starter().cases())

    assert all(isinstance(case, EditCase) for case in cases)
    assert [case.request.id for case in cases] == [fact["id"] for fact in FACTS]
    for case, fact in zip(cases, FACTS, strict=True):
        kinds = Counter(probe.kind for probe in case.probes)
        assert kinds["rephrase"] == 2
        assert kinds["locality"] == 3
        assert kinds["portability"] == (fact["portability"] is not None)
        assert case.request.ground_truth == (fact["answer"],)
        assert case.meta == {"relation": fact["relation"]}


def test_rephrasings_expect_the_target():
    case = next(Starter().cases())

    expected = {probe.expected for probe in case.probes if probe.kind == "rephrase"}

    assert expected == {(case.request.target_new,)}


def test_own_file_is_read(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(FACTS[3]) + "\n", encoding="utf-8")

    assert [case.request.id for case in Starter().cases(file)] == [FACTS[3]["id"]]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 3: the file ends in the middle"),
        ("[]", "line 2: a record is a mapping"),
        ('{"id": "x", "subject": "y"}', "line 2: it lacks 'target_new'"),
    ],
)
def test_malformed_line_is_named(tmp_path, line, problem):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(FACTS[0]) + "\n" + line + "\n", encoding="utf-8")

    with pytest.raises(DataError, match=problem):
        list(checked(Starter().cases(file)))


def test_a_fact_without_a_subject_is_left_out(tmp_path):
    file = tmp_path / "mine.jsonl"
    facts = (FACTS[0], FACTS[1] | {"subject": ""}, FACTS[2])
    file.write_text("".join(json.dumps(fact) + "\n" for fact in facts), encoding="utf-8")

    _, left, _ = Starter().cases(file)
    assert (left.line, left.reason, left.malformed) == (2, "'subject' is empty", False)
    assert {q.fact for q in questions(Starter().cases(file))} == {f["id"] for f in facts[::2]}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_file_is_refused_in_one_sentence(fault, tmp_path):
    own, spoilt = tmp_path / "facts.jsonl", tmp_path / "spoilt"
    own.write_text("".join(json.dumps(fact) + "\n" for fact in FACTS[:3]), encoding="utf-8")
    spoilt.mkdir()

    refuse_spoilt(Starter(), own, fault, spoilt)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        list(Starter().cases(tmp_path / "nowhere.jsonl"))


def test_questions_ask_for_what_is_true_now():
    case = next(Starter().cases())

    asked = questions([case])

    assert Counter(question.kind for question in asked) == {
        "prompt": 1,
        "rephrase": 2,
        "neighborhood": 3,
    }
    assert case.request.target_new not in {a for question in asked for a in question.answers}


def test_any_of_several_answers_is_right():
    question = Question("id", "relation", "prompt", "The king of", ("Spain", "Sweden"))

    assert Reply(question, " Sweden.").is_right
    assert not Reply(question, " Swedenborg").is_right
    assert not Reply(question, " Norway.").is_right


class Knowing:
    """A session whose model knows every answer but those to some prompts."""

    def __init__(self, *unknown):
        asked = questions(Starter().cases())
        self.texts = {question.prompt: f" {question.answers[0]}." for question in asked}
        self.texts.update(dict.fromkeys(unknown, " no idea"))

    def view(self):
        return self

    def greedy(self, prompts, max_new_tokens):
        return [self.texts[prompt] for prompt in prompts]


@pytest.mark.parametrize(
    ("unknown", "exit_code", "own", "neighbours"),
    [
        ([], 0, f"{len(FACTS)}/{len(FACTS)}", f"{3 * len(FACTS)}/{3 * len(FACTS)}"),
        (["The Mets are based in the city of"], 0, f"{len(FACTS)}/{len(FACTS)}", "/"),
        ([filled(FACTS[0])[0]], 1, f"{len(FACTS) - 1}/{len(FACTS)}", "/"),
    ],
    ids=["all", "a neighbour not", "a fact not"],
)
def test_command_fails_if_a_fact_itself_is_unknown(
    monkeypatch, unknown, exit_code, own, neighbours
):
    from kedit_core import editing

    monkeypatch.setattr(editing.ModelHost, "load", lambda name: name)
    monkeypatch.setattr(editing, "EditSession", lambda host: Knowing(*unknown))
    app = typer.Typer()
    app.command()(main)

    result = CliRunner().invoke(app, ["--model", "any"])

    assert result.exit_code == exit_code, result.output
    total = result.stdout.splitlines()[-2]
    assert own in total
    assert neighbours in total
    assert all(prompt in result.stderr for prompt in unknown)


def test_command_answers_an_unknown_model_with_a_sentence():
    app = typer.Typer()
    app.command()(main)

    result = CliRunner().invoke(app, ["--model", "smollm2-136m"])

    assert result.exit_code == 2
    assert "smollm2-136m" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.real
def test_real_model_knows_a_sample_of_the_facts():
    from kedit_core.editing import EditSession, ModelHost

    sample = list(Starter().cases())[:: max(1, len(FACTS) // 20)]

    replies = ask(EditSession(ModelHost.load("smollm2-135m")).view(), questions(sample))

    wrong = [(r.question.prompt, r.text) for r in replies if not r.is_right]
    assert wrong == []
