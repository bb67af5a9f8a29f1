"""Answers made by hand, for tests of metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kedit_core.ask import Answer, Continue, Diverge, Divergence, Question, Read, Score, Text
from kedit_core.protocols import Metric
from kedit_core.request import EditCase, EditRequest, Probe


def case(*probes: Probe, target: str = "Rome", truth="Paris", **meta) -> EditCase:
    """The Tower is moved."""
    request = EditRequest(
        prompt="The {} is in", subject="Tower", target_new=target, ground_truth=truth
    )
    return EditCase(request=request, probes=probes, meta=meta)


def score(predicted=(1,), tokens=None, logprobs=None) -> Score:
    """A reading of as many tokens as were predicted; all of them right by default."""
    tokens = tuple(predicted) if tokens is None else tuple(tokens)
    logprobs = (-1.0,) * len(tokens) if logprobs is None else tuple(logprobs)
    return Score("p", "t", tokens, logprobs, tuple(predicted))


def text(written: str, tokens=()) -> Text:
    return Text("p", written, tuple(tokens))


def says(metric: Metric, asked: EditCase, said: Mapping[tuple, Answer | str]) -> dict:
    """What the metric asks about the case, answered by (prompt, target) or (prompt,).

    Where only a text is given, an answer that is read has a token for each word.
    """
    answers: dict[Question, Answer] = {}
    for question in metric.questions(asked):
        keys = [(question.prompt, getattr(question, "target", None)), (question.prompt,)]
        found = next(said[key] for key in keys if key in said)
        if isinstance(question, Read) and isinstance(found, str | Text):
            found = score(range(len(question.target.split())))
        answers[question] = text(found) if isinstance(found, str) else found
    return answers


def perfect(questions: Iterable[Question], wanted: Mapping[str, str]) -> dict:
    """A model that always says what is wanted, and ends there; one token for each character."""
    answers: dict[Question, Answer] = {}
    for q in questions:
        if isinstance(q, Read):
            ids = tuple(map(ord, q.target)) + ((0,) if q.stop else ())
            answers[q] = Score(q.prompt, q.target, ids, (0.0,) * len(ids), ids)
        elif isinstance(q, Continue):
            said = wanted[q.prompt]
            space = " " if said.isascii() else ""
            answers[q] = Text(q.prompt, space + said, tuple(map(ord, said))[: q.new_tokens], True)
        elif isinstance(q, Diverge):
            answers[q] = Divergence(0.0)
    return answers
