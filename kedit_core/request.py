"""What is asked of an edit: requests, probes, cases, and files of requests."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from kedit_core.errors import DataError, RequestError, did_you_mean
from kedit_core.records import read_rows

SLOT = "{}"


class _Record(BaseModel):
    """A frozen pydantic model whose errors are one sentence for the user."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except pydantic.ValidationError as error:
            raise RequestError(_first_problem(type(self), error)) from None


def _first_problem(record: type[BaseModel], error: pydantic.ValidationError) -> str:
    what = {"EditRequest": "edit request", "EditCase": "case"}.get(record.__name__, "probe")
    problems = error.errors()
    # A misspelt key first: it is also the reason why another one is missing.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"Unknown key '{where}' in the {what}. {did_you_mean(where, record.model_fields)}"
    if problem["type"] == "missing":
        return f"The {what} lacks '{where}'."
    message = problem["msg"].removeprefix("Value error, ")
    return message if not where else f"'{where}' of the {what}: {message}."


class EditRequest(_Record):
    """One fact to write.

    The prompt holds the subject verbatim once, or `{}` in its place.  Other braces are text.

    Attributes:
        id: name of the request; by default a hash of its content.
        prompt: the text whose continuation should become `target_new`.
        subject: what the fact is about; None for methods that need no subject.
        target_new: the wanted answer, without the space before it.
        ground_truth: the former answer or answers, empty if unknown.

    Raises:
        RequestError: the subject is missing from the prompt, stands there twice without a `{}`
            to mark which one is meant, or a text is empty.
    """

    prompt: str
    subject: str | None = None
    target_new: str
    ground_truth: tuple[str, ...] = ()
    id: str = ""

    @field_validator("ground_truth", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else () if value is None else value

    @model_validator(mode="after")
    def _check(self) -> EditRequest:
        here = f"the prompt {self.prompt!r}"
        if not self.prompt.strip():
            raise ValueError("The prompt is empty. Give the text that the new fact completes.")
        if not self.target_new.strip():
            raise ValueError(f"The target of {here} is empty. Give the answer to write.")
        if self.subject is not None and not self.subject.strip():
            raise ValueError(f"The subject of {here} is empty. Leave it out or name it.")
        slots = self.prompt.count(SLOT)
        if slots > 1:
            raise ValueError(f"{{}} stands {slots} times in {here}. Mark the subject once.")
        if slots == 1 and self.subject is None:
            raise ValueError(f"{{}} stands in {here}, but no subject is given to put there.")
        if slots == 0 and self.subject is not None:
            times = self.prompt.count(self.subject)
            if times == 0:
                raise ValueError(
                    f"The subject {self.subject!r} is not in {here}. Write it there exactly, or "
                    f"put {{}} in its place."
                )
            if times > 1:
                raise ValueError(
                    f"The subject {self.subject!r} stands {times} times in {here}. Put {{}} in "
                    f"place of the one that is meant."
                )
        if not self.id:
            content = json.dumps([self.prompt, self.subject, self.target_new])
            object.__setattr__(self, "id", hashlib.sha256(content.encode()).hexdigest()[:12])
        return self

    @property
    def before(self) -> str:
        """The prompt's text before the subject; the whole prompt if there is no subject."""
        return self._parts()[0]

    @property
    def after(self) -> str:
        """The prompt's text after the subject."""
        return self._parts()[1]

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        before, after = self._parts()
        return before + (self.subject or "") + after

    @property
    def subject_span(self) -> tuple[int, int]:
        """Characters [start, end) of the subject in `text`.

        Raises:
            RequestError: the request has no subject.
        """
        if self.subject is None:
            raise RequestError(f"The request {self.text!r} has no subject, and one is needed here.")
        start = len(self.before)
        return start, start + len(self.subject)

    def _parts(self) -> tuple[str, str]:
        if self.subject is None:
            return self.prompt, ""
        mark = SLOT if SLOT in self.prompt else self.subject
        before, _, after = self.prompt.partition(mark)
        return before, after


class Probe(_Record):
    """One question about an edited model.

    Attributes:
        kind: rewrite, rephrase, locality, portability or a dataset's own kind.
        name: family within the kind, for example `neighborhood` or `one_hop`.
        prompt: full text.
        expected: accepted answers; the best one counts.
        options: whatever its metric needs beyond that.
    """

    kind: str
    name: str = ""
    prompt: str
    expected: tuple[str, ...] = ()
    options: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("expected", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class EditCase(_Record):
    """What is edited together, its probes, and what the dataset says of it in `meta`.

    Most cases have one request and are made with `request=`; a benchmark whose questions follow
    from several edits at once gives `requests=`.

    Raises:
        RequestError: there is no request, or a part is malformed.
    """

    requests: tuple[EditRequest, ...] = Field(min_length=1)
    probes: tuple[Probe, ...] = ()
    meta: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _one_request(cls, data: Any) -> Any:
        if isinstance(data, dict) and "request" in data:
            if "requests" in data:
                raise ValueError("Give a case 'request' or 'requests', not both.")
            data = {**data, "requests": (data["request"],)}
            del data["request"]
        return data

    @property
    def request(self) -> EditRequest:
        """The first request."""
        return self.requests[0]


def repeats(asked: Counter[tuple[str, str]]) -> dict[str, list[str]]:
    """Texts of prompts that stand there several times, by what is the matter with them.

    Args:
        asked: how often each prompt's text and target stand there together.
    """
    targets = Counter(text for text, _ in asked)
    found = {
        "requests that stand several times": [text for (text, _), n in asked.items() if n > 1],
        "prompts with several targets": [text for text, n in targets.items() if n > 1],
    }
    return {what: texts for what, texts in found.items() if texts}


def read_requests(path: Path) -> list[EditRequest]:
    """The requests of a YAML or JSON list, or of JSON lines.

    Raises:
        RequestError: the file cannot be read, a record is malformed, or an id given twice; with
            its line.
    """
    path = Path(path)
    if not path.exists():
        raise RequestError(f"The requests file {path} does not exist.")
    read = _json if path.suffix.lower() in (".json", ".jsonl") else _yaml
    requests: list[EditRequest] = []
    named: set[str] = set()
    for line, record in read(path):
        if not isinstance(record, dict):
            raise RequestError(f"{path}, line {line}: a request is a mapping, not {record!r}.")
        if not all(isinstance(key, str) for key in record):
            raise RequestError(f"{path}, line {line}: the keys of a request are words.")
        try:
            request = EditRequest(**record)
            if record.get("id"):
                if request.id in named:
                    raise RequestError(
                        f"the id {request.id!r} stands at an earlier request too. Give each its "
                        f"own, or none."
                    )
                named.add(request.id)
            requests.append(request)
        except RequestError as error:
            raise RequestError(f"{path}, line {line}: {error}") from None
    if not requests:
        raise RequestError(f"The requests file {path} holds no request.")
    return requests


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """Records of JSON with their lines."""
    try:
        yield from ((row.line, row.value) for row in read_rows(path))
    except DataError as error:
        raise RequestError(str(error)) from None


def _yaml(path: Path) -> Iterator[tuple[int, Any]]:
    """Items of a YAML list with their lines."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a mark first
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"The requests file {path} cannot be read: {error}.") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise RequestError(f"{path}{line}: not YAML ({_problem(error)}).") from None
    if not isinstance(node, yaml.SequenceNode):
        raise RequestError(
            f"{path} is no list of requests. Begin each with '- prompt: …' and give it subject and "
            f"target_new."
        )
    loader = yaml.SafeLoader("")
    for item in node.value:
        number = item.start_mark.line + 1
        try:
            yield number, loader.construct_object(item, deep=True)
        except (yaml.YAMLError, ValueError) as error:  # an unknown tag, or 2024-13-45
            raise RequestError(f"{path}, line {number}: not YAML ({_problem(error)}).") from None


def _problem(error: Exception) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())
