"""The harness asks the edited model, and gets what it would get from its own model class."""

import json
import math
import sys

import pytest
import torch
import yaml
from kedit_lm_eval.metric import LmEval, changes
from kedit_lm_eval.model import EditedLM
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from kedit_core import DataError, ModelError, RequestError, SettingError, discover
from kedit_core.ask import Read
from kedit_core.editing import CallEffect, EditSession, ModuleSwap, Patch, WeightDelta
from kedit_core.named import create
from kedit_core.testing.model_state import assert_same, model_state
from kedit_core.testing.toys import TOYS, toy_facts

FACTS = toy_facts()[:8]
PROMPTS = [fact.prompt.format(fact.subject) for fact in FACTS]
GOLD = [int(n % 4 == 3) for n in range(len(FACTS))]  # mostly what the toys know


# -- a folder of tasks -----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Task files and their data, on this disk."""
    rows = [
        {"prompt": prompt, "choices": [fact.answer, fact.target_new], "gold": gold}
        for prompt, fact, gold in zip(PROMPTS, FACTS, GOLD, strict=True)
    ]
    data = tmp_path / "facts.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data), "train": str(data)},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
    }
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    written = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [{"name": "bare", "filter": [{"function": "remove_whitespace"}]}],
    }
    tasks = {
        "toy_choice": choice,
        "toy_written": written,
        "toy_sampled": {**written, "generation_kwargs": {"do_sample": True, "temperature": 1.0}},
        "toy_unsafe": {**choice, "unsafe_code": True},
        "toy_lost": {**choice, "dataset_kwargs": {"data_files": str(tmp_path / "none.jsonl")}},
        "toy_fewshot": {**choice, "fewshot_split": "train", "num_fewshot": 1},
        "toy_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_target": "{{prompt}}",
            "doc_to_text": "",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    made = tmp_path / "tasks"
    made.mkdir()
    for name, task in tasks.items():
        content = {"task": name, **common, **task, "metadata": {"version": 1}}
        (made / f"{name}.yaml").write_text(yaml.safe_dump(content), "utf-8")
    group = {
        "group": "toy_group",
        "task": ["toy_choice", "toy_fewshot"],
        "aggregate_metric_list": [{"metric": "acc"}],
    }
    (made / "toy_group.yaml").write_text(yaml.safe_dump(group), "utf-8")
    return made


@pytest.fixture
def folder_alone(monkeypatch):
    """The harness knows the tasks of the folder only; to index its own takes long."""
    import lm_eval.tasks

    class Small(lm_eval.tasks.TaskManager):
        def __init__(self, include_path=None, **_):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Small)


def metric(folder, tasks, **settings):
    return LmEval(tasks, include_path=str(folder), **settings)


def accuracy_by_hand(session):
    """Share of facts of which the more probable choice is the right one."""
    right = 0
    for prompt, fact, gold in zip(PROMPTS, FACTS, GOLD, strict=True):
        scores = session.view().score([prompt] * 2, [fact.answer, fact.target_new])
        own, other = (sum(score.logprobs) for score in scores)
        right += (0 if own > other else 1) == gold
    return right / len(FACTS)


# -- the same as the harness's own model class -----------------------------------------------

LONG = " ".join(PROMPTS * 8)  # more tokens than the toys take
PAIRS = [
    (PROMPTS[0], f" {FACTS[0].answer}"),
    (f"{PROMPTS[0]} ", FACTS[0].answer),
    (f"{PROMPTS[0]}\n\n", "The"),
    ("1+1=", "2"),  # no space between them
    ("The", " dog sat on the mat."),
    ("", "The cat sat on the mat."),
]


def requests(kind, *arguments):
    return [Instance(kind, {}, args, n) for n, args in enumerate(arguments)]


@pytest.fixture(params=TOYS)
def both(request, toy_host):
    """Our model and the harness's, each on a toy of its own."""
    host = toy_host(request.param)
    theirs = HFLM(pretrained=host.model, tokenizer=host.tokenizer, batch_size=2)
    return EditedLM(EditSession(toy_host(request.param)).view()), theirs


def test_reading_is_that_of_the_harness(both):
    ours, theirs = (lm.loglikelihood(requests("loglikelihood", *PAIRS)) for lm in both)

    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-3)
    assert [best for _, best in ours] == [best for _, best in theirs]


def test_a_long_context_loses_its_beginning_but_not_its_first_special_token(both):
    ours, theirs = both
    pair = (LONG, f" {FACTS[0].answer}")

    ((value, best),) = ours.loglikelihood(requests("loglikelihood", pair))

    (score,) = ours.view.ask([Read(*pair)]).values()
    assert score.cut
    assert value == pytest.approx(sum(score.logprobs), abs=1e-4)
    if ours.view.host.tokenizer.bos_token is None:  # there is none, which is the harness's way
        assert theirs.loglikelihood(requests("loglikelihood", pair)) == [
            (pytest.approx(value, abs=1e-3), best)
        ]


def test_windows_are_those_of_the_harness(both):
    texts = [("The cat sat on the mat.",), (LONG,), (PROMPTS[0],)]

    ours, theirs = (lm.loglikelihood_rolling(requests("rolling", *texts)) for lm in both)

    assert ours == pytest.approx(theirs, abs=1e-2)


def test_writing_is_that_of_the_harness(both):
    asked = [(prompt, {"until": [".", "\n"], "max_gen_toks": 8}) for prompt in [*PROMPTS, LONG]]

    ours, theirs = (lm.generate_until(requests("generate_until", *asked)) for lm in both)

    assert ours == theirs
    assert any(fact.answer in text for fact, text in zip(FACTS, ours, strict=False))


# -- edits of every kind ---------------------------------------------------------------------


def weights(session):
    weight = session.host.weight(session.host.mlp_out(1))
    return WeightDelta(session.host.mlp_out(1), -weight.clone())


def module(session):
    size = session.model.config.hidden_size
    vector = torch.linspace(-3, 3, size)
    return ModuleSwap(session.host.mlp_out(1).module, "shift", state={"vector": vector})


def prompts(session):
    return CallEffect("preface", config={"text": "x y z "})


def logits(session):
    """Makes the first token of the toys' own answers all but impossible."""
    bias = torch.zeros(session.model.config.vocab_size)
    for score in session.view().score(PROMPTS, [fact.answer for fact in FACTS]):
        bias[score.tokens[0]] = -50.0
    return CallEffect("token-bias", state={"bias": bias})


EFFECTS = (weights, module, prompts, logits)


def edited(host, *effects, overlay=False):
    session = EditSession(host)
    session.apply(Patch("by hand", tuple(effect(session) for effect in effects)), overlay=overlay)
    return session


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("overlay", [False, True])
def test_every_kind_of_edit_is_read(toy, effect, overlay, toy_host):
    session = edited(toy_host(toy), effect, overlay=overlay)
    targets = [fact.answer for fact in FACTS]
    pairs = [(prompt, f" {target}") for prompt, target in zip(PROMPTS, targets, strict=True)]

    found = EditedLM(session.view()).loglikelihood(requests("loglikelihood", *pairs))

    expected = [sum(score.logprobs) for score in session.view().score(PROMPTS, targets)]
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-3)
    with session.suspended():
        unedited = EditedLM(session.view()).loglikelihood(requests("loglikelihood", *pairs))
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, unedited, strict=True)) > 0.1


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("effect", EFFECTS)
def test_every_kind_of_edit_is_written(toy, effect, toy_host):
    session = edited(toy_host(toy), effect)
    asked = [(prompt, {"until": [], "max_gen_toks": 8}) for prompt in PROMPTS]

    found = EditedLM(session.view()).generate_until(requests("generate_until", *asked))

    expected = session.view().greedy(PROMPTS, max_new_tokens=8)
    assert [text.strip() for text in found] == [text.strip() for text in expected]


def test_a_text_before_prompts_stands_before_whole_texts(toy_host):
    text = " The dog is on the mat."

    found = EditedLM(edited(toy_host("gpt2"), prompts).view())

    (score,) = EditSession(toy_host("gpt2")).view().score(["x y z "], [text])
    (value,) = found.loglikelihood_rolling(requests("rolling", (text,)))
    assert value == pytest.approx(sum(score.logprobs), abs=1e-3)


# -- the metric ------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("effects", [(), (logits,), (logits, prompts)])
def test_accuracy_is_counted_by_hand(toy, effects, folder, toy_host):
    session = edited(toy_host(toy), *effects)

    found = metric(folder, "toy_choice").measure(session)

    by_hand = accuracy_by_hand(session)
    assert found[""] == found["toy_choice.acc"] == by_hand
    assert (by_hand == 0.75) == (not effects)  # unedited, the toys know all that they are asked


def test_only_the_first_questions_are_asked(folder, toy_host):
    session = EditSession(toy_host("llama"))

    assert metric(folder, "toy_choice", limit=3).measure(session)[""] == 1  # all but the fourth


def test_several_tasks_have_no_headline(folder, toy_host):
    session = EditSession(toy_host("llama"))

    found = metric(folder, "toy_choice + toy_written+toy_text").measure(session)

    greedy = session.view().greedy(PROMPTS, max_new_tokens=8)
    exact = [t.split(".")[0].strip() == f.answer for t, f in zip(greedy, FACTS, strict=True)]
    assert found.keys() == {
        "toy_choice.acc",
        "toy_written.exact_match.bare",
        "toy_text.word_perplexity",
    }
    assert found["toy_written.exact_match.bare"] == sum(exact) / len(exact) > 0.5


def test_perplexity_is_per_word(folder, toy_host):
    session = EditSession(toy_host("gpt2"))

    found = metric(folder, "toy_text").measure(session)

    end = session.host.tokenizer.eos_token
    ids = [session.host.tokenizer(end + prompt)["input_ids"] for prompt in PROMPTS]
    with torch.no_grad():
        losses = [
            session.model(torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1)
            for row in ids
        ]
    count = sum(len(prompt.split()) for prompt in PROMPTS)
    assert found == {
        "toy_text.word_perplexity": pytest.approx(math.exp(float(sum(losses)) / count), rel=1e-4)
    }


def test_examples_are_drawn_alike_each_time(folder, toy_host, monkeypatch):
    contexts = []
    original = EditedLM.loglikelihood

    def noted(self, asked):
        contexts.append([request.args[0] for request in asked])
        return original(self, asked)

    monkeypatch.setattr(EditedLM, "loglikelihood", noted)
    session = EditSession(toy_host("gpt2"))
    for settings in ({}, {"num_fewshot": 2}, {"num_fewshot": 2}, {"num_fewshot": 0}):
        metric(folder, "toy_fewshot", limit=1, **settings).measure(session)

    lengths = [len(asked[0].split("\n\n")) for asked in contexts]
    assert lengths == [2, 3, 3, 1]
    assert contexts[1] == contexts[2]


# -- against the unedited model --------------------------------------------------------------

ENDS = ("change", "change_low", "change_high")


def values(*numbers):
    return {"t.acc": dict(enumerate(numbers))}


def test_change_is_a_mean_over_questions_with_an_interval():
    found = changes(values(0, 1, 1, 0), values(1, 1, 1, 0))

    # The mean of four draws of 1, 0, 0, 0 is 0 in 32 % of cases, at most ½ in 95 %, ¾ in 99.6 %.
    assert found == {"t.acc.change": 0.25, "t.acc.change_low": 0.0, "t.acc.change_high": 0.75}


def test_interval_of_a_constant_change_has_no_width():
    found = changes(values(0.5, 0.25, 1.0), values(0.0, -0.25, 0.5))

    assert found == {f"t.acc.{end}": -0.5 for end in ENDS}


def test_questions_are_paired_by_their_number():
    found = changes({"t.acc": {0: 1.0, 1: 0.0}}, {"t.acc": {1: 0.0, 0: 1.0}})

    assert found == {f"t.acc.{end}": 0.0 for end in ENDS}
    assert changes({"t.acc": {0: 1.0, 1: 0.0}}, {"t.acc": {0: 1.0, 2: 0.0}}) == {}


def test_a_model_that_gives_no_number_has_no_change():
    found = changes(values(1, 1), values(1, math.nan))

    assert found.keys() == {f"t.acc.{end}" for end in ENDS}
    assert all(map(math.isnan, found.values()))


@pytest.mark.parametrize("toy", TOYS)
def test_change_is_from_the_unedited_model_whichever_is_measured_first(
    toy, folder, toy_host, monkeypatch
):
    tasks = "toy_choice+toy_written+toy_text"
    session, ours = EditSession(toy_host(toy)), metric(folder, tasks)
    before = ours.measure(session)
    session.apply(Patch("by hand", (logits(session), weights(session))))
    with monkeypatch.context() as patched:
        patched.setattr(session, "suspended", None)  # what is known is not asked again
        after = ours.measure(session)

    assert metric(folder, tasks).measure(session) == after
    means = ("toy_choice.acc", "toy_written.exact_match.bare")
    assert after.keys() - before.keys() == {f"{part}.{end}" for part in means for end in ENDS}
    assert after.keys() > before.keys()
    for part in means:
        change, low, high = (after[f"{part}.{end}"] for end in ENDS)
        assert change == pytest.approx(after[part] - before[part])
        assert low <= change <= high
    assert after["toy_written.exact_match.bare.change_high"] < 0


def test_each_model_is_compared_with_itself(folder, toy_host):
    ours = metric(folder, "toy_choice")
    plain, other = EditSession(toy_host("llama")), edited(toy_host("gpt2"), weights)
    ours.measure(plain)
    expected = metric(folder, "toy_choice").measure(other)

    site = plain.host.mlp_out(0)
    with torch.no_grad():
        plain.host.weight(site).neg_()
    broken = EditSession(plain.host)  # another model of the same shape
    broken.apply(Patch("by hand", (logits(broken),)))

    assert ours.measure(other) == expected
    assert ours.measure(broken) == metric(folder, "toy_choice").measure(broken)


@pytest.mark.usefixtures("folder_alone")
def test_a_group_has_its_score_and_its_tasks_have_changes(folder, toy_host):
    found = metric(folder, "toy_group").measure(edited(toy_host("gpt2"), logits))

    tasks = ("toy_choice.acc", "toy_fewshot.acc")
    assert found.keys() == {"", "toy_group.acc", *tasks} | {
        f"{t}.{end}" for t in tasks for end in ENDS
    }


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("task", ["toy_choice", "toy_written", "toy_text", "toy_sampled"])
def test_model_and_surroundings_stay_as_they_are(toy, task, folder, toy_host):
    session = edited(toy_host(toy), weights, module, prompts, logits)
    session.model.train()
    session.model.requires_grad_(True)
    session.host.tokenizer.padding_side = "right"
    before = model_state(session.host)

    if task == "toy_sampled":
        with pytest.raises(SettingError):
            metric(folder, task).measure(session)
    else:
        metric(folder, task).measure(session)

    assert_same(before, model_state(session.host), "After the harness")


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "error", "words"),
    [
        ("toy_sampled", SettingError, "'toy_sampled' draws its answers at random"),
        ("toy_unsafe", SettingError, "'toy_unsafe' runs code that a model writes"),
        ("toy_lost", DataError, "cannot load 'toy_lost': "),
    ],
)
def test_what_cannot_be_measured_says_why(task, error, words, folder, toy_host):
    with pytest.raises(error, match=words) as caught:
        metric(folder, task).measure(EditSession(toy_host("gpt2")))

    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("folder_alone")
def test_an_unknown_task_is_answered_with_the_nearest(folder):
    with pytest.raises(SettingError, match=r"no task 'toy_chioce'. Did you mean 'toy_choice'\?"):
        metric(folder, "toy_written+toy_chioce")


def test_the_harness_itself_knows_what_a_folder_lacks(folder, monkeypatch):
    import lm_eval.tasks

    made = []

    class Noted(lm_eval.tasks.TaskManager):
        """Notes whether the harness's own tasks are asked for."""

        def __init__(self, include_path=None, include_defaults=True):
            made.append(include_defaults)
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Noted)

    metric(folder, "toy_written+toy_choice")
    assert made == [False]
    with pytest.raises(SettingError):
        metric(folder, "toy_choice+piqa")
    assert made == [False, False, True]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"num_fewshot": -1}, "num_fewshot is -1"),
        ({"include_path": "/nowhere/at/all"}, "/nowhere/at/all of tasks does not exist"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings, words):
    with pytest.raises(SettingError, match=words):
        LmEval("piqa", **settings)


def test_a_missing_harness_costs_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)

    with pytest.raises(SettingError, match=r"pip install lm_eval$"):
        LmEval("piqa")


def test_an_answer_longer_than_the_model_is_refused(toy_host):
    lm = EditedLM(EditSession(toy_host("gpt2")).view())

    with pytest.raises(RequestError, match="leaves no room for its prompt"):
        lm.generate_until(requests("generate_until", ("The", {"until": []})))


def test_nothing_to_read_is_refused(toy_host):
    lm = EditedLM(EditSession(toy_host("gpt2")).view())

    with pytest.raises(RequestError, match="has no token of its own"):
        lm.loglikelihood(requests("loglikelihood", ("The", "")))


def test_an_encoder_decoder_is_refused(toy_host):
    session = EditSession(toy_host("gpt2"))
    session.model.config.is_encoder_decoder = True

    with pytest.raises(ModelError, match="is an encoder-decoder"):
        EditedLM(session.view())


def test_the_metric_is_found_and_made_with_its_settings(folder):
    spec = discover().metric("side-effects/lm-eval@1")

    made = create(spec, {"tasks": "toy_choice", "limit": "2", "include_path": str(folder)})

    assert (made.tasks, made.limit, made.num_fewshot) == (["toy_choice"], 2, None)
    assert spec.measures == "model"
    with pytest.raises(SettingError, match="lm-eval@1:tasks=…"):
        create(spec, {})
