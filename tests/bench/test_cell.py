"""Regimes: what is edited together, when it is asked, and what survives a crash."""

from __future__ import annotations

import contextlib
import json
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch

from kedit_bench.journal import Journal
from kedit_bench.regime import Regime
from kedit_bench.results import score_journal, write_result
from kedit_bench.run import Run
from kedit_bench.scoring import MetricError, MissingAnswerError, Scorer
from kedit_bench.unedited import Asker
from kedit_core import CaseScore, EditCase, EditRequest, HyperParams, Probe, hookimpl
from kedit_core.ask import Sample, Score, Text, answer_to_json, question_to_json
from kedit_core.editing import EditJob, EditSession, ModuleSwap, Patch
from kedit_core.errors import DataError, EditError, ModelError, SettingError
from kedit_core.numerics.values import VALUES
from kedit_core.plugins import discover
from tests.bench.fakes import LAST, PICKY, WHERE, OnlyTheLast, cell, scorer, toy_cases


@pytest.fixture
def session(toy_host) -> EditSession:
    return EditSession(toy_host("llama"))


def run(made, session, cases):
    made.run(session, Asker(session), cases)
    return means(made, cases)


def means(made, cases) -> dict[tuple[str, str], float]:
    found = score_journal(made.journal, cases, made.scorer)
    return {
        (m.protocol.metric, m.protocol.moment): m.mean for m in found.scores if not m.protocol.part
    }


TF = "efficacy/teacher-forced@1"


def test_single_edits_each_case_on_the_unedited_model(session, tmp_path):
    cases = toy_cases(3, session.host)
    found = run(cell(tmp_path, "single"), session, cases)

    assert found[TF, "immediate"] == 1
    assert found[TF, "unedited"] == 0
    assert not session.is_edited


def test_a_method_that_forgets_all_but_the_last_edit_is_found_out(session, tmp_path):
    cases = toy_cases(4, session.host)
    found = run(cell(tmp_path, "sequential"), session, cases)

    assert found[TF, "immediate"] == 1
    assert found[TF, "final"] == pytest.approx(1 / 4)
    assert not session.is_edited


def test_a_batch_is_in_force_as_a_whole_and_alone(session, tmp_path):
    cases = toy_cases(4, session.host)
    depths = []
    watched = cell(tmp_path, "batch:2")
    edit = session.edit

    def counted(*args, **kwargs):
        depths.append(len(session.stack))
        return edit(*args, **kwargs)

    session.edit = counted
    run(watched, session, cases)

    assert depths == [0, 0]


def test_cases_so_far_are_asked_again_at_checkpoints(session, tmp_path):
    cases = toy_cases(4, session.host)
    made = cell(tmp_path, "sequential", points={2})
    found = run(made, session, cases)

    assert found[TF, "after 2"] == pytest.approx(1 / 2)
    # after two cases: ages 1 and 0, at the end: 3, 2, 1 and 0; only the last edit is remembered
    assert ages(made, cases) == {
        "after 2": [([0, 0], 1.0, 1), ([1, 1], 0.0, 1)],
        "final": [([0, 0], 1.0, 1), ([1, 1], 0.0, 1), ([2, 3], 0.0, 2)],
    }


def ages(made, cases) -> dict[str, list[tuple[list[int], float, int]]]:
    """By moment: ages, each with the mean of token accuracy and its number of cases."""
    found: dict[str, list[tuple[list[int], float, int]]] = {}
    for point in write_result(made.folder, {}, cases, made.scorer)["retention"]:
        if point["protocol"]["metric"] == TF:
            told = point["age"], point["mean"], point["cases"]
            found.setdefault(point["protocol"]["moment"], []).append(told)
    return found


def test_the_age_of_an_edit_counts_cases_of_later_steps(session, tmp_path):
    cases = toy_cases(5, session.host)
    metrics = Scorer(scorer(TF).chosen, {**WHERE, "schedule": "sequential:2"})
    made = cell(tmp_path, "sequential:2", metrics=metrics)
    run(made, session, cases)

    # steps of two, two and one case: ages 3, 3, 1, 1 and 0
    counted = [(age, count) for age, _, count in ages(made, cases)["final"]]
    assert counted == [([0, 0], 1), ([1, 1], 2), ([2, 3], 2)]


def test_means_by_age_of_an_earlier_version_are_left_away(session, tmp_path):
    cases = toy_cases(2, session.host)
    made = cell(tmp_path, "sequential")
    run(made, session, cases)
    mixed = {"metric": "portability/greedy@1", "age": [0, 0], "mean": 0.5, "n": 2}
    (tmp_path / "result.json").write_text(json.dumps({"scores": [], "retention": [mixed]}))

    result = write_result(tmp_path, {}, cases, made.scorer)

    assert mixed not in result["retention"]
    assert {point["protocol"]["moment"] for point in result["retention"]} == {"final"}


class Breaks(OnlyTheLast):
    """Adds so much to the residual stream that it overflows."""

    def edit(self, job: EditJob) -> Patch:
        much = torch.full((job.host.model.config.hidden_size,), 3e38)
        paths = [block.path for block in job.host.blocks[:2]]
        return Patch("", tuple(ModuleSwap(path, "shift", {}, {"vector": much}) for path in paths))


class BreaksForLima(Breaks):
    """Where that is the target; otherwise it makes the target the answer to everything."""

    def edit(self, job: EditJob) -> Patch:
        breaks = job.requests[0].target_new == "Lima"
        return super().edit(job) if breaks else OnlyTheLast.edit(self, job)


@pytest.mark.parametrize("regime", ["single", "sequential"])
def test_what_a_broken_model_says_is_in_no_mean_and_counted(session, tmp_path, regime, caplog):
    (whole,) = toy_cases(1, session.host)
    broken = whole.model_copy(
        update={"requests": (whole.request.model_copy(update={"target_new": "Lima"}),)}
    )
    nll, rank, divergence = "efficacy/nll@1", "efficacy/rank@1", "opinion/divergence@1"
    metrics = Scorer(scorer(nll, rank, TF, divergence).chosen, {**WHERE, "schedule": regime})
    made = cell(tmp_path, regime, replace(LAST, method=BreaksForLima), metrics=metrics)
    run(made, session, [whole, broken])

    result = write_result(tmp_path, {}, [whole, broken], metrics)

    left_out = {
        (u["protocol"]["metric"], u["protocol"]["part"], u["protocol"]["moment"]): u["values"]
        for u in result["undefined"]
    }
    expected = {(name, "", "immediate"): 1 for name in (nll, divergence)}
    expected |= {(nll, "perplexity_per_case", "immediate"): 1}
    if regime == "sequential":
        expected |= {(*key[:2], "final"): 2 for key in expected}
    assert left_out == expected
    assert f"{nll}, immediate: the mean leaves out 1 values" in caplog.text
    scores = {
        (s["protocol"]["metric"], s["protocol"]["moment"]): (s["mean"], s["cases"])
        for s in result["scores"]
        if not s["protocol"]["part"]
    }
    assert scores[nll, "immediate"] == (pytest.approx(0, abs=1e-6), 1)
    assert scores[TF, "immediate"] == (1 / 2, 2)
    assert scores[rank, "immediate"] == (session.host.model.config.vocab_size / 2, 2)
    assert ((nll, "final") in scores) is False
    for file in (tmp_path / "answers.jsonl", tmp_path / "result.json"):
        text = file.read_text("utf-8")
        for line in text.splitlines() if file.suffix == ".jsonl" else [text]:
            json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    # Scored anew with other metrics, what was counted stays.
    again = write_result(tmp_path, {}, [whole, broken], Scorer(scorer(TF).chosen, metrics.where))
    assert again["undefined"] == result["undefined"]


def test_figures_of_a_broken_model_are_in_no_mean_either(session, tmp_path):
    cases = toy_cases(1, session.host)
    text = tmp_path / "text.txt"
    text.write_text("Mira Voss lives in Rome and Edda knows it well too. " * 5)
    name = f"side-effects/perplexity@1:text={text},words=20"
    made = cell(tmp_path, "single", replace(LAST, method=Breaks), metrics=scorer(name))
    run(made, session, cases)

    result = write_result(tmp_path, {}, cases, made.scorer)

    assert [s["protocol"]["moment"] for s in result["scores"]] == ["unedited"]
    assert [(u["protocol"]["metric"], u["values"]) for u in result["undefined"]] == [(name, 1)]


def test_requests_that_the_method_refuses_are_left_out_with_the_reason(session, tmp_path):
    without = EditCase(request=EditRequest(prompt="Nobody lives in", target_new="Lima"))
    refused = EditCase(request=EditRequest(prompt="It is refused", subject="It", target_new="Lima"))
    cases = [without, refused, *toy_cases(1, session.host)]
    made = cell(tmp_path, "single", PICKY)
    made.run(session, Asker(session), cases)

    found = score_journal(made.journal, cases, made.scorer)

    assert found.left_out == {
        0: "picky needs the subject of 'Nobody lives in'.",
        1: "The request 'It is refused' is refused.",
    }
    assert len(found.seconds) == 1


REFUSED = EditCase(request=EditRequest(prompt="It is refused", subject="It", target_new="Lima"))


@pytest.mark.parametrize("regime", ["batch:3", "sequential:3"])
def test_a_refused_request_costs_its_own_case_only(regime, session, tmp_path):
    first, second = toy_cases(2, session.host)
    made = cell(tmp_path, regime)
    run(made, session, [first, REFUSED, second])

    found = score_journal(made.journal, [first, REFUSED, second], made.scorer)
    assert found.left_out == {1: "The request 'It is refused' is refused."}
    assert len(found.seconds) == 2


@pytest.mark.parametrize("regime", ["single", "batch:3", "sequential"])
@pytest.mark.parametrize("side", ["unedited", "edited"])
def test_a_case_that_cannot_be_asked_about_is_left_out(side, regime, session, tmp_path):
    first, second = toy_cases(2, session.host)
    long = Probe(kind="rephrase", prompt="Mira Voss lives in", expected="Lima " * 600)
    cases = [first, EditCase(request=second.request, probes=(long,)), second]
    metrics = scorer(TF, "generalization/teacher-forced@1")
    made, asker = cell(tmp_path, regime, metrics=metrics), Asker(session)
    if side == "edited":  # the unedited model could be asked, for example with a shorter prompt
        unedited = asker.unedited

        def all_but_the_long_one(questions):
            wanted = [q for q in questions if q.prompt != long.prompt]
            answer = Score("", "", (1,), (-1.0,), (1,))
            return {**unedited(wanted), **{q: answer for q in questions if q not in wanted}}

        asker.unedited = all_but_the_long_one
    made.run(session, asker, cases)

    found = score_journal(made.journal, cases, made.scorer)
    assert list(found.left_out) == [1]
    assert "leaves no room for its prompt" in found.left_out[1]
    assert len(found.seconds) == 2
    lines = made.journal.path.read_bytes()
    made.run(session, Asker(session), cases)
    assert made.journal.path.read_bytes() == lines


def observer(seen: list) -> ModuleType:
    """A plugin that keeps what it is told of cases."""
    module = ModuleType("observer")

    @hookimpl
    def kedit_case_measured(event):
        seen.append(event)

    module.kedit_case_measured = kedit_case_measured
    return module


@pytest.mark.parametrize("regime", ["single", "sequential"])
def test_observers_are_told_scores_of_what_is_journalled_already(regime, toy_host, tmp_path):
    seen, made = [], cell(tmp_path, regime)
    session = EditSession(toy_host("llama"), catalog=discover([("o", observer(seen))]))
    cases = toy_cases(2, session.host)
    score, journalled = made.scorer.score, []

    def counted(*args):
        journalled.append(sum(1 for _ in made.journal.lines()))
        return score(*args)

    made.scorer.score = counted
    made.run(session, Asker(session), cases)

    assert [(event.case, event.scores[TF]) for event in seen] == [(c, 1.0) for c in cases]
    assert journalled == [1, 2]


def test_no_score_is_computed_where_nobody_observes(session, tmp_path):
    made = cell(tmp_path, "single")
    made.scorer.score = lambda *args: pytest.fail("it was scored")

    made.run(session, Asker(session), toy_cases(1, session.host))


def test_an_edit_that_fails_counts_as_no_edit(session, tmp_path):
    failing = EditCase(request=EditRequest(prompt="It fails in", subject="It", target_new="Lima"))
    cases = [failing, *toy_cases(1, session.host)]
    found = run(cell(tmp_path, "single"), session, cases)
    kept = score_journal(cell(tmp_path, "single").journal, cases, scorer())

    assert kept.failed == {0: "The edit fails."}
    assert found[TF, "immediate"] == pytest.approx(0.5)


class Explodes(OnlyTheLast):
    """Fails in a way that its author has not thought of, at the second request."""

    error: ClassVar[Exception]

    def edit(self, job: EditJob) -> Patch:
        if "second" in job.requests[0].text:
            raise self.error
        return super().edit(job)


EXPLODES = replace(LAST, name="explodes", method=Explodes)
SECOND = EditCase(request=EditRequest(prompt="A second", subject="A", target_new="Lima"))


@pytest.mark.parametrize("regime", ["single", "sequential"])
@pytest.mark.parametrize(
    ("error", "told"),
    [(RuntimeError("shapes differ"), "RuntimeError: shapes differ"), (KeyError(3), "KeyError: 3")],
)
def test_an_edit_that_fails_in_any_way_counts_as_no_edit(
    regime, error, told, session, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(Explodes, "error", error, raising=False)
    first, last = toy_cases(2, session.host)
    made = cell(tmp_path, regime, EXPLODES)
    caplog.set_level("DEBUG", "kedit_bench")
    run(made, session, [first, SECOND, last])

    found = score_journal(made.journal, [first, SECOND, last], made.scorer)
    assert found.failed == {1: told}
    assert (found.cases, len(found.seconds)) == (3, 2)
    assert f"explodes failed, which counts as no edit: {told}" in caplog.messages
    assert any(record.exc_info and record.exc_info[1] is error for record in caplog.records)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError("full")])
def test_an_edit_without_memory_is_made_again_where_there_is_more(
    error, session, tmp_path, monkeypatch
):
    monkeypatch.setattr(Explodes, "error", error, raising=False)
    cases = [*toy_cases(1, session.host), SECOND]
    made = cell(tmp_path, "single", EXPLODES)
    with pytest.raises(ModelError, match=r"explodes ran out of memory \(full\)\. Where there is"):
        run(made, session, cases)
    assert [line["n"] for line in made.journal.lines()] == [0]

    run(cell(tmp_path, "single"), session, cases)
    assert [line["n"] for line in made.journal.lines()] == [0, 1]


def test_a_method_that_fails_in_its_preparation_fails_in_its_edits(session, tmp_path):
    class Unwell(OnlyTheLast):
        def prepare(self, job) -> None:
            raise ZeroDivisionError("of nothing")

        edit = prepare

    cases = toy_cases(1, session.host)
    made = cell(tmp_path, "single", replace(LAST, name="unwell", method=Unwell))
    made.run(session, Asker(session), cases)

    result = write_result(tmp_path, {}, cases, made.scorer)
    assert result["failed"] == {"0": "ZeroDivisionError: of nothing"}


def test_an_edit_that_fails_in_a_sequence_leaves_those_before_it_in_force(session, tmp_path):
    (first,) = toy_cases(1, session.host)
    probe = Probe(kind="locality", prompt="The", expected=first.request.target_new)
    request = EditRequest(prompt="It fails in", subject="It", target_new="Lima")
    cases = [EditCase(request=first.request), EditCase(request=request, probes=(probe,))]
    metric = "locality-accuracy/all-tokens@1"
    found = run(cell(tmp_path, "sequential", metrics=scorer(metric)), session, cases)

    assert found == {(metric, "unedited"): 0, (metric, "immediate"): 1, (metric, "final"): 1}


def test_groups_of_edits_are_made_together(session, tmp_path):
    first, second = toy_cases(2, session.host)
    group = EditCase(requests=(*first.requests, *second.requests))
    stacks = []
    edit = session.edit
    session.edit = lambda spec, requests, **kw: (
        stacks.append(requests) or edit(spec, requests, **kw)
    )

    run(cell(tmp_path, "single"), session, [group])

    assert stacks == [[*first.requests, *second.requests]]


@pytest.mark.parametrize("regime", ["single", "batch:2", "sequential", "sequential:2"])
@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_what_was_stopped_anywhere_goes_on_to_the_same_result(
    regime, stop_after, session, tmp_path
):
    cases = toy_cases(4, session.host)
    whole = cell(tmp_path / "whole", regime, points={2})
    expected = run(whole, session, cases)
    made = cell(tmp_path / "stopped", regime, points={2})
    # Batches of two end before the third write.
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        crash_after(stop_after, patch)
        made.run(session, Asker(session), cases)

    assert run(made, session, cases) == expected
    lines = [json.loads(line) for line in made.journal.path.read_text().splitlines()]
    keys = [(line["n"], line["moment"]) for line in lines]
    assert len(keys) == len(set(keys))
    assert lines_without_effort(whole) == lines_without_effort(made)


def crash_after(count: int, patch: pytest.MonkeyPatch) -> None:
    """The process dies in the middle of the nth write to the journal."""
    append, calls = Journal.append, []

    def dying(self, *records):
        calls.append(records)
        if len(calls) == count:
            append(self, *records[:-1]) if len(records) > 1 else None
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(b'{"n": 3, "mom')
            raise KeyboardInterrupt
        append(self, *records)

    patch.setattr(Journal, "append", dying)


def lines_without_effort(made) -> list[dict]:
    effort = {"seconds", "host_bytes", "device_bytes", "reserved_bytes"}
    lines = [json.loads(line) for line in made.journal.path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in effort} for line in lines]


def test_edits_of_a_sequence_are_not_computed_again(session, tmp_path):
    cases = toy_cases(4, session.host)
    made = cell(tmp_path, "sequential")
    with pytest.MonkeyPatch.context() as patch:
        crash_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            made.run(session, Asker(session), cases)
    edited = []
    edit = session.edit
    session.edit = lambda *args, **kwargs: edited.append(1) or edit(*args, **kwargs)

    made.run(session, Asker(session), cases)

    assert len(edited) == 2  # the third, whose line was lost, and the fourth


def test_scoring_holds_one_case_at_a_time(tmp_path):
    peaks = [scoring_peak(tmp_path / str(count), count) for count in (4, 64)]

    assert peaks[1] < 2 * peaks[0]


def scoring_peak(folder: Path, count: int) -> int:
    """Bytes that are held at most when the journal of a sequence of large cases is scored."""
    metrics, large = scorer("locality-agreement/same-text@1"), "word " * 20_000
    request = EditRequest(prompt="Who?", target_new="me")
    case = EditCase(
        request=request, probes=(Probe(kind="locality", prompt="Where?"),), meta={"text": large}
    )
    run = Run(folder)
    run.begin({}, (case for _ in range(count)), None)
    (question,) = metrics.questions(run.cases()[0])
    answer = answer_to_json(Text("", large, ()))
    both = {"question": question_to_json(question), "before": answer, "after": answer}
    effort = {"seconds": 1.0, "host_bytes": 1, "device_bytes": None}
    journal = Journal(folder / "answers.jsonl")
    for n in range(count):
        journal.append({"n": n, "moment": "immediate", **effort, "answers": [both]})
    del both["before"]
    for n in range(count):
        journal.append({"n": n, "moment": "final", "answers": [both]})
    tracemalloc.start()
    try:
        found = score_journal(journal, run.cases(), metrics)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {(m.protocol.moment, m.cases) for m in found.scores} == {
        *(("unedited", count), ("immediate", count), ("final", count))
    }
    return peak


def test_a_sequence_holds_one_group_of_cases_at_a_time(session, tmp_path):
    peaks = [running_peak(session, tmp_path / str(count), count) for count in (32, 128)]

    assert peaks[1] < 1.5 * peaks[0]


class Wordy:
    """An asker that says much, always the same."""

    def unedited(self, questions):
        return {question: Text(question.prompt, "word " * 2_000, ()) for question in questions}

    edited = unedited


def running_peak(session: EditSession, folder: Path, count: int) -> int:
    """Bytes that are held at most while a sequence of large cases is run."""
    run = Run(folder)
    requests = [EditRequest(prompt=f"{n} is the age of", target_new="Lima") for n in range(count)]
    large = {"text": "word " * 2_000}
    run.begin({}, (EditCase(request=request, meta=large) for request in requests), None)
    made = cell(folder / "cell", "sequential:4", metrics=scorer("efficacy/greedy@1"))
    tracemalloc.start()
    try:
        made.run(session, Wordy(), run.cases())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(line["moment"] == "final" for line in made.journal.lines()) == count
    return peak


def test_sampled_text_is_read_by_the_unedited_model_at_each_moment(session, tmp_path):
    name = "naturalness/unedited-nll@1:length=20"
    cases = toy_cases(3, session.host)
    sample = [Sample(case.request.text, 20) for case in cases]
    own = session.view().ask(sample)
    session.edit(LAST, cases[2].request, hparams=HyperParams())
    edited = session.view().ask(sample)
    session.rollback()

    found = run(cell(tmp_path, "sequential", metrics=scorer(name)), session, cases)

    for moment, answers in (("unedited", own), ("final", edited)):
        expected = [nll(session.host, q.prompt, answers[q].text) for q in sample]
        assert found[name, moment] == pytest.approx(sum(expected) / 3, abs=1e-4)
    assert found[name, "final"] > found[name, "unedited"] + 1


@torch.no_grad()
def nll(host, prompt: str, text: str) -> float:
    """Mean over the tokens that follow the prompt, by one plain call of the model."""
    ids = host.tokenizer(prompt + text, return_tensors="pt")["input_ids"]
    start = len(host.tokenizer(prompt)["input_ids"])
    logprobs = host.model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
    return -float(logprobs.gather(1, ids[0, start:, None]).mean())


def test_a_result_says_what_was_measured_and_how(session, tmp_path):
    cases = toy_cases(2, session.host)
    made = cell(tmp_path, "single")
    made.run(session, Asker(session), cases)
    result = write_result(tmp_path, {"method": "last", "label": "last"}, cases, made.scorer)

    assert json.loads((tmp_path / "result.json").read_text()) == result
    score = next(s for s in result["scores"] if s["protocol"]["metric"] == TF)
    assert {"probe", "decoding", "scorer", "reference", "form", "schedule", "moment"} <= set(
        score["protocol"]
    )
    assert (score["cases"], score["probes"]) == (2, 2)
    assert result["seconds_per_edit"] > 0


def test_time_is_the_median_of_edits_that_did_not_fail(session, tmp_path):
    cases = toy_cases(5, session.host)
    made = cell(tmp_path, "single")
    made.run(session, Asker(session), cases)
    lines = [json.loads(line) for line in made.journal.path.read_text().splitlines()]
    for line, seconds in zip(lines, (4.0, 0.0, 1.0, 0.0, 2.0), strict=True):
        line["seconds"] = seconds
    lines[1]["failed"] = lines[3]["failed"] = "The edit fails."
    made.journal.path.unlink()
    made.journal.append(*lines[:4])
    result = write_result(tmp_path, {}, cases, made.scorer)
    assert (result["cases"], result["seconds_per_edit"], result["seconds"]) == (4, 2.5, 5)

    made.journal.append(lines[4])
    result = write_result(tmp_path, {}, cases, made.scorer)
    assert (result["cases"], result["seconds_per_edit"], result["seconds"]) == (5, 2, 7)


class KeepsTargets(OnlyTheLast):
    """Finds what an earlier edit of the same fact made."""

    def edit(self, job: EditJob) -> Patch:
        for request in job.requests:
            key = {"text": request.text}
            if job.artifacts.get(VALUES, key) is None:
                job.artifacts.put(VALUES, key, {"delta": torch.zeros(1)})
        return super().edit(job)


def test_edits_that_take_kept_targets_are_counted_and_do_not_tell_how_long_an_edit_takes(
    session, tmp_path
):
    cases = toy_cases(3, session.host)
    spec = replace(LAST, method=KeepsTargets)
    results = []
    for number, asked in enumerate((cases[:2], cases[:2], cases)):
        made = cell(tmp_path / str(number), "single", spec)
        made.run(session, Asker(session), asked)
        results.append(write_result(tmp_path / str(number), {}, asked, made.scorer))

    assert [r["kept_targets"] for r in results] == [0, 2, 2]
    assert [r["seconds_per_edit"] is None for r in results] == [False, True, False]
    (own,) = (line for line in made.journal.lines() if not line["kept_targets"])
    assert own["n"] == 2
    assert results[2]["seconds"] == own["seconds"]


@pytest.mark.parametrize(
    ("peaks", "highest"), [((0, 0), 0), ((None, 0), 0), ((5, None), 5), ((None, None), None)]
)
def test_a_peak_of_nothing_is_not_one_that_was_not_measured(peaks, highest, session, tmp_path):
    cases = toy_cases(2, session.host)
    made = cell(tmp_path, "single")
    made.run(session, Asker(session), cases)
    lines = list(made.journal.lines())
    made.journal.path.unlink()
    made.journal.append(*({**line, "host_bytes": p} for line, p in zip(lines, peaks, strict=True)))

    assert write_result(tmp_path, {}, cases, made.scorer)["peak_host_bytes"] == highest


class Ready(OnlyTheLast):
    """Has something to make ahead, which takes a while."""

    made: ClassVar[list[int]] = []

    def prepare(self, job) -> None:
        self.made.append(len(job.requests))
        time.sleep(0.2)


class Unready(OnlyTheLast):
    """Can neither be prepared nor edit."""

    def prepare(self, job) -> None:
        raise EditError("No direction is free.")

    edit = prepare


READY = replace(LAST, name="ready", method=Ready)


@pytest.mark.parametrize("regime", ["single", "batch:2", "sequential"])
def test_what_is_made_once_is_timed_apart_from_the_edits(regime, session, tmp_path, monkeypatch):
    monkeypatch.setattr(Ready, "made", [])
    cases = toy_cases(4, session.host)
    made = cell(tmp_path, regime, READY)
    with pytest.MonkeyPatch.context() as patch:
        crash_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            made.run(session, Asker(session), cases)
    line, *_ = made.journal.lines()  # before any case
    made.run(session, Asker(session), cases)
    result = write_result(tmp_path, {}, cases, made.scorer)

    assert Ready.made == [0]  # once, with no request
    assert result["preparation_seconds"] == line["preparation"] >= 0.2


def test_a_method_with_nothing_to_make_ahead_has_no_such_seconds(session, tmp_path):
    cases = toy_cases(1, session.host)
    made = cell(tmp_path, "single")
    made.run(session, Asker(session), cases)

    assert write_result(tmp_path, {}, cases, made.scorer)["preparation_seconds"] is None


def test_a_run_that_began_without_preparation_goes_on_without(session, tmp_path, monkeypatch):
    monkeypatch.setattr(Ready, "made", [])
    cases = toy_cases(2, session.host)
    cell(tmp_path, "single").run(session, Asker(session), cases[:1])
    made = cell(tmp_path, "single", READY)
    made.run(session, Asker(session), cases)

    result = write_result(tmp_path, {}, cases, made.scorer)
    assert (result["cases"], result["preparation_seconds"], Ready.made) == (2, None, [])


def test_what_cannot_be_prepared_fails_in_its_edits(session, tmp_path):
    cases = toy_cases(2, session.host)
    made = cell(tmp_path, "single", replace(LAST, name="unready", method=Unready))
    made.run(session, Asker(session), cases)

    result = write_result(tmp_path, {}, cases, made.scorer)
    assert result["failed"] == dict.fromkeys("01", "No direction is free.")
    assert result["preparation_seconds"] is None


def test_a_metric_whose_answers_were_not_kept_is_refused(session, tmp_path):
    cases = toy_cases(1, session.host)
    made = cell(tmp_path, "single")
    made.run(session, Asker(session), cases)

    with pytest.raises(DataError, match="does not hold the answer"):
        score_journal(made.journal, cases, scorer("fluency/ngram-entropy@1"))


def test_the_model_as_a_whole_is_measured_before_and_after(session, tmp_path):
    words = "Mira Voss lives in Lima and Tamsin speaks Norse in New Haven"
    (tmp_path / "text.txt").write_text(words)
    metrics = scorer(TF, f"side-effects/perplexity@1:text={tmp_path / 'text.txt'},words=10")
    cases = toy_cases(2, session.host)
    found = run(cell(tmp_path / "c", "sequential", metrics=metrics), session, cases)
    name = metrics.chosen[1].name

    assert found[name, "final"] > found[name, "unedited"] * 10


def test_a_case_that_is_left_out_says_nothing_about_the_edited_model(session, tmp_path):
    (tmp_path / "text.txt").write_text("Mira Voss lives in Lima and Tamsin speaks Norse")
    metrics = scorer(TF, f"side-effects/perplexity@1:text={tmp_path / 'text.txt'},words=8")
    without = EditCase(request=EditRequest(prompt="Nobody lives in", target_new="Lima"))
    made = cell(tmp_path / "c", "single", PICKY, metrics=metrics)
    made.run(session, Asker(session), [without, *toy_cases(1, session.host)])

    figures = [line for line in made.journal.lines() if "figures" in line]
    assert [(line["moment"], line["case"]) for line in figures] == [
        ("unedited", None),
        ("immediate", 1),
    ]


class Measures:
    """Can measure the unedited model only, or none."""

    def __init__(self, *, none: bool = False) -> None:
        self._none = none

    def measure(self, session):
        if self._none or session.is_edited:
            raise RuntimeError("no such matrix")
        return {"": 1.0}


def with_metric(metric) -> Scorer:
    (chosen,) = scorer(TF).chosen
    return Scorer([chosen, replace(chosen, name="mine", metric=metric)], WHERE)


def test_a_metric_that_cannot_measure_the_edited_model_has_no_scores(session, tmp_path):
    cases = toy_cases(2, session.host)
    made = cell(tmp_path, "single", metrics=with_metric(Measures()))
    made.run(session, Asker(session), cases)
    result = write_result(tmp_path, {}, cases, made.scorer)

    assert result["broken"] == {
        "mine": "The metric mine failed in measure(): RuntimeError: no such matrix."
    }
    assert {score["protocol"]["metric"] for score in result["scores"]} == {TF}
    assert {score["cases"] for score in result["scores"]} == {2}
    with pytest.raises(MissingAnswerError, match="does not hold the answers that mine needs"):
        score_journal(made.journal, cases, with_metric(Measures()))


def test_a_metric_that_cannot_measure_the_unedited_model_fails_before_the_first_edit(
    session, tmp_path
):
    made = cell(tmp_path, "single", metrics=with_metric(Measures(none=True)))
    with pytest.raises(MetricError, match=r"mine failed in measure\(\): RuntimeError: no such"):
        made.run(session, Asker(session), toy_cases(1, session.host))

    assert list(made.journal.lines()) == []


def test_observers_miss_a_case_that_cannot_be_scored_and_the_evaluation_goes_on(toy_host, tmp_path):
    class Unable:
        def questions(self, case):
            return []

        def score(self, case, before, after):
            return {"": CaseScore(1 / (case != cases[0]))}

    seen, made = [], cell(tmp_path, "single", metrics=with_metric(Unable()))
    session = EditSession(toy_host("llama"), catalog=discover([("o", observer(seen))]))
    cases = toy_cases(2, session.host)
    made.run(session, Asker(session), cases)

    assert [event.case for event in seen] == cases[1:]
    assert write_result(tmp_path, {}, cases, made.scorer)["broken"].keys() == {"mine"}


def test_figures_of_the_model_survive_a_crash(session, tmp_path):
    (tmp_path / "text.txt").write_text("Mira Voss lives in Lima and Tamsin speaks Norse")
    metrics = scorer(TF, f"side-effects/perplexity@1:text={tmp_path / 'text.txt'},words=8")
    cases = toy_cases(2, session.host)
    whole = cell(tmp_path / "whole", "single", metrics=metrics)
    expected = run(whole, session, cases)
    made = cell(tmp_path / "stopped", "single", metrics=metrics)
    with pytest.MonkeyPatch.context() as patch:
        crash_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            made.run(session, Asker(session), cases)

    assert run(made, session, cases) == expected
    assert lines_without_effort(made) == lines_without_effort(whole)


@pytest.mark.parametrize("text", ["", "singel", "batch", "batch:0", "batch:x", "sequential:-1"])
def test_an_unknown_regime_is_one_sentence(text):
    with pytest.raises(SettingError, match="There is no regime"):
        Regime.parse(text)


def test_a_method_that_makes_one_edit_only_is_refused_a_second(session):
    cases = toy_cases(2, session.host)
    once = replace(LAST, name="once", sequential=False)
    session.edit(once, cases[0].request, hparams=HyperParams())

    with pytest.raises(SettingError, match="once makes one edit in a session"):
        session.edit(once, cases[1].request, hparams=HyperParams())
    assert len(session.stack) == 1
