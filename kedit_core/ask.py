"""Questions to a model and its answers, as plain data.

A metric says which questions it needs; whoever runs an evaluation asks all of them together, once
each, keeps the answers, and can give them to another metric later without asking again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from kedit_core.errors import DataError

Form = Literal["bare", "task"]


@dataclass(frozen=True)
class Read:
    """How does the model read this answer, token by token (teacher forcing)?

    Attributes:
        prompt, target: what is given, and what is read after it.
        form: `bare` for the prompt itself; `task` for how people ask: with the model's chat
            template, or with an instruction where it has none.  A chat template is followed by the
            target with no separator.
        stop: read the end-of-text token after the target too.
        exact: the target follows as it is written, with no separator before it.
    """

    prompt: str
    target: str
    form: Form = "bare"
    stop: bool = False
    exact: bool = False


@dataclass(frozen=True)
class Continue:
    """What does the model say by itself, each token the most probable one?

    Attributes:
        prompt: what it continues.
        new_tokens: how many tokens at most.
        form: see `Read`.
    """

    prompt: str
    new_tokens: int
    form: Form = "bare"


@dataclass(frozen=True)
class Converse:
    """What does the model say at the end of a conversation in which every reply is its own?

    Asked as people ask, see `Read.form`; each token is the most probable one.  Where there is no
    chat template, only the first line of a reply stands in what follows it.

    Attributes:
        turns: what it is told, one after another; at least one.
        new_tokens: how many tokens at most a reply has.
    """

    turns: tuple[str, ...]
    new_tokens: int

    @property
    def prompt(self) -> str:
        """What it is told last."""
        return self.turns[-1]


@dataclass(frozen=True)
class Sample:
    """What does the model write freely?

    Attributes:
        prompt: what it continues.
        length: tokens of prompt and continuation together.
        top_k: draw among so many most probable tokens.
        seed: together with the prompt it decides what is drawn.
    """

    prompt: str
    length: int = 100
    top_k: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Diverge:
    """How far from the unedited model's are the distributions along this text?

    Attributes:
        prompt, target: the distributions are those that predict the target's tokens.
    """

    prompt: str
    target: str


Question = Read | Continue | Converse | Sample | Diverge


@dataclass(frozen=True)
class Score:
    """How a model reads a given answer.

    Attributes:
        prompt, target: what was asked.
        tokens: ids of the target.
        logprobs: natural log-probability of each, given all before it.
        predicted: the most probable token at each place.
        rank: how many tokens were more probable than the first one.
        merged: the first token holds characters of the prompt too.
        cut: the prompt was too long, and its beginning was left out.
    """

    prompt: str
    target: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    predicted: tuple[int, ...]
    rank: int = 0
    merged: bool = False
    cut: bool = False

    @property
    def accuracy(self) -> float:
        """Share of target tokens that are the most probable ones."""
        hits = [a == b for a, b in zip(self.tokens, self.predicted, strict=True)]
        return sum(hits) / len(hits)

    @property
    def mean_logprob(self) -> float:
        """Mean of the tokens' log-probabilities."""
        return sum(self.logprobs) / len(self.logprobs)


@dataclass(frozen=True)
class Text:
    """What a model wrote.

    Attributes:
        prompt: what it continued.
        text: the continuation alone.
        tokens: its ids.
        ended: the model ended it; otherwise it ran out of tokens.
        cut: the prompt was too long, and its beginning was left out.
        room: how many tokens it could have; None where that is unknown.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    ended: bool = False
    cut: bool = False
    room: int | None = None


@dataclass(frozen=True)
class Divergence:
    """How far a model is from the unedited one along a target.

    Attributes:
        kl: mean over tokens of KL(unedited ‖ asked), in nats; 0 for the unedited model itself.
        tokens: how many there are; 1 where that is unknown.
    """

    kl: float
    tokens: int = 1


Answer = Score | Text | Divergence
Answers = Mapping[Question, Answer]

_QUESTIONS: Mapping[str, type[Question]] = {
    "read": Read,
    "continue": Continue,
    "converse": Converse,
    "sample": Sample,
    "diverge": Diverge,
}
_ANSWERS: Mapping[str, type[Answer]] = {
    "read": Score,
    "continue": Text,
    "converse": Text,
    "sample": Text,
    "diverge": Divergence,
}


def question_to_json(question: Question) -> list[Any]:
    """A list that starts with the kind of question."""
    kind = next(name for name, cls in _QUESTIONS.items() if type(question) is cls)
    return [kind, *asdict(question).values()]


def question_from_json(data: list[Any]) -> Question:
    """What `question_to_json` wrote.

    Raises:
        DataError: it is something else.
    """
    try:
        said: Any = (tuple(value) if isinstance(value, list) else value for value in data[1:])
        return _QUESTIONS[data[0]](*said)
    except (KeyError, TypeError, IndexError):
        raise DataError(f"{data!r} is no stored question.") from None


def number_to_json(number: float) -> float | str:
    """The number, or the word for one that JSON has none for; `float` reads both."""
    return number if math.isfinite(number) else str(float(number))


def answer_to_json(answer: Answer) -> dict[str, Any]:
    """The answer without what its question says."""
    data = {k: v for k, v in asdict(answer).items() if k not in ("prompt", "target")}
    if isinstance(answer, Score):
        data["logprobs"] = tuple(map(number_to_json, answer.logprobs))
    elif isinstance(answer, Divergence):
        data["kl"] = number_to_json(answer.kl)
    return data


def answer_from_json(question: Question, data: Mapping[str, Any]) -> Answer:
    """What `answer_to_json` wrote for this question.

    Raises:
        DataError: it is something else.
    """
    kind = question_to_json(question)[0]
    cls = _ANSWERS[kind]
    known = {field.name for field in fields(cls)}
    said: dict[str, Any] = {k: getattr(question, k) for k in ("prompt", "target") if k in known}
    said.update({k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})
    try:
        if "logprobs" in said:
            said["logprobs"] = tuple(map(float, said["logprobs"]))
        if "kl" in said:
            said["kl"] = float(said["kl"])
        return cls(**said)
    except (TypeError, ValueError):
        raise DataError(f"{dict(data)!r} is no stored answer to {question}.") from None
