"""One method on one list of cases, in one regime: edits, questions, a journal, a result.

Everything that was measured is in the journal, so a run that was killed goes on where it stopped,
and other metrics can be computed from what was kept.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from kedit_bench.effort import Effort, measured
from kedit_bench.journal import Journal
from kedit_bench.regime import Regime
from kedit_bench.run import ANSWERS, STEPS, Cases
from kedit_bench.scoring import (
    FINAL,
    IMMEDIATE,
    UNEDITED,
    Measurement,
    MetricError,
    MissingAnswerError,
    Scorer,
)
from kedit_bench.unedited import Asker
from kedit_core.ask import (
    Answer,
    Answers,
    Question,
    answer_to_json,
    number_to_json,
    question_to_json,
)
from kedit_core.editing import EditSession
from kedit_core.errors import EditError, KEditError, ModelError, RequestError, reason_of
from kedit_core.hookspecs import CaseMeasured
from kedit_core.hparams import HyperParams
from kedit_core.numerics.values import VALUES
from kedit_core.protocols import Preparable
from kedit_core.request import EditCase, EditRequest
from kedit_core.spec import MethodSpec
from kedit_core.stack import SavedStack, read_stack, write_stack

log = logging.getLogger(__name__)

_CHUNK = 16  # cases whose questions are asked together

Numbered = tuple[int, EditCase]


@dataclass(frozen=True)
class _Said:
    """What a model says about cases.

    Attributes:
        answers: to the questions about them.
        about: what the unedited model says about those answers.
        refused: why a case cannot be asked about, by number.
    """

    answers: Answers
    about: Answers
    refused: Mapping[int, str]


@dataclass(frozen=True)
class _Step:
    """What came of a step: the journal's lines, and its cases that have answers of both sides."""

    lines: list[dict[str, Any]]
    cases: tuple[EditCase, ...]
    before: Answers
    after: Answers


@dataclass(frozen=True)
class Cell:
    """A method in a regime, and the folder of its journal.

    Attributes:
        folder: holds `answers.jsonl` and, in a sequence, the edits of each step.
        spec, hparams: the method.
        regime: single, batches or a sequence.
        scorer: says which questions are asked.
        checkpoints: in a sequence, after how many cases all cases so far are asked again.
    """

    folder: Path
    spec: MethodSpec
    hparams: HyperParams
    regime: Regime
    scorer: Scorer
    checkpoints: frozenset[int] = frozenset()

    @property
    def journal(self) -> Journal:
        """The lines: seconds of preparation, answers of a case at a moment, figures of the model,
        cases left out."""
        return Journal(self.folder / ANSWERS)

    def run(
        self,
        session: EditSession,
        asker: Asker,
        cases: Sequence[EditCase] | Cases,
        tick: Callable[[int], object] = lambda cases: None,
    ) -> None:
        """Do what is not done yet; the session ends without edits.

        Args:
            session: without edits.
            asker: of the same session.
            cases: the same ones, in the same order, whenever the cell is run.  They are read again
                for each moment, and not held.
            tick: told how many cases are done.

        Raises:
            DataError: the journal is damaged.
            KEditError: what an edit raises, but for requests that the method refuses and questions
                that cannot be asked (the case is left out, and the others of its step go on) and
                for edits that fail (the model is scored as it was before them).
            ModelError: memory runs out.
            MetricError: the model as a whole cannot be measured before the first edit.
        """
        done = _Done(self.journal)
        done.append(self.journal, self._figures(session, done, UNEDITED))
        self._prepare(session, done)
        try:
            if self.regime.keeps:
                self._sequence(session, asker, cases, done, tick)
            else:
                self._apart(session, asker, cases, done, tick)
        finally:
            session.rollback()

    def _prepare(self, session: EditSession, done: _Done) -> None:
        """Make what the method makes once, before the first edit, so that no edit's time has it."""
        if done.begun:
            return
        try:
            with editing(self.spec), measured(session.host.device) as effort:
                if not isinstance(self.spec.load()(self.hparams), Preparable):
                    return
                session.prepare(self.spec, hparams=self.hparams)
        except EditError as error:  # as each edit will say
            log.warning("%s cannot be prepared: %s", self.spec.name, error)
            return
        done.append(self.journal, [{"preparation": effort.seconds}])

    # -- each step on the unedited model ----------------------------------------------------

    def _apart(
        self,
        session: EditSession,
        asker: Asker,
        cases: Iterable[EditCase],
        done: _Done,
        tick: Callable[[int], object],
    ) -> None:
        for group in self._groups(cases):
            todo = [c for c in _chunks(group, self.regime.size) if not done.has(c, IMMEDIATE)]
            # All of the group's, so that batches are the same whenever it is run.
            unedited = self._unedited(asker, group if todo else [])
            for step in todo:
                try:
                    made = self._step(session, asker, step, unedited)
                    figures = []
                    if made.cases:
                        figures = self._figures(session, done, IMMEDIATE, step[0][0])
                    # In front: a step whose answers are there is not made again.
                    done.append(self.journal, [*figures, *made.lines])
                    self._tell(session, made)
                finally:
                    session.rollback()
            tick(len(group))

    def _step(
        self, session: EditSession, asker: Asker, step: Sequence[Numbered], unedited: _Said
    ) -> _Step:
        """Edit a step's cases, and ask about those that could be edited."""
        left_out = {n: reason for n, case in step if (reason := self._refusal(n, case, unedited))}
        fit = [(n, case) for n, case in step if n not in left_out]
        effort, failure = Effort(), ""
        kept = session.artifacts.found[VALUES]
        while fit:
            try:
                with editing(self.spec), measured(session.host.device) as effort:
                    session.edit(self.spec, _requests(fit), hparams=self.hparams)
            except EditError as error:
                failure = str(error)
                log.warning("%s failed, which counts as no edit: %s", self.spec.name, failure)
            except RequestError as error:
                left_out |= self._refused(session, fit, error)
                fit = [(n, case) for n, case in fit if n not in left_out]
                continue
            break
        kept = session.artifacts.found[VALUES] - kept
        if not fit:
            return _Step(_left_out(left_out), (), {}, {})
        if failure and not session.is_edited:
            edited = _Said(dict(unedited.answers), {}, {})
        else:  # after a failure in a sequence the edits before it are still in force
            edited = self._ask(asker.edited, asker, fit)
        asked = [(n, case) for n, case in fit if n not in edited.refused]
        before, after = {**unedited.answers, **edited.about}, edited.answers
        lines = _left_out({**left_out, **edited.refused})
        for n, case in asked:
            line = {
                "n": n,
                "moment": IMMEDIATE,
                "seconds": effort.seconds / len(fit),
                "host_bytes": effort.host_bytes,
                "device_bytes": effort.device_bytes,
                "reserved_bytes": effort.reserved_bytes,
                "kept_targets": kept,
                "answers": [
                    *(_both(q, before[q], after[q]) for q in self.scorer.questions(case)),
                    *self._about(case, (before, after), before),
                ],
            }
            lines.append(line | {"failed": failure} if failure else line)
        return _Step(lines, tuple(case for _, case in asked), before, after)

    def _tell(self, session: EditSession, made: _Step) -> None:
        """Tell observers the scores of a step's cases; without any, nothing is computed."""
        hook = "kedit_case_measured"
        for case in made.cases if session.catalog.has_observers(hook) else ():
            with contextlib.suppress(MetricError, MissingAnswerError):  # told with the result
                scored = self.scorer.score(case, made.before, made.after, IMMEDIATE)
                scores = {_label(m): m.value for m in scored}
                session.catalog.notify(hook, CaseMeasured(self.spec.name, case, scores))

    def _refusal(self, n: int, case: EditCase, unedited: _Said) -> str:
        """Why a case is not edited: the method does not take it, or it cannot be asked about."""
        refusals = (self.spec.refusal(request) for request in case.requests)
        return next(filter(None, refusals), "") or unedited.refused.get(n, "")

    def _refused(
        self, session: EditSession, cases: Sequence[Numbered], error: RequestError
    ) -> dict[int, str]:
        """Which cases the method refuses by themselves, and why; all of them where it is none."""
        found = {}
        for n, case in cases if len(cases) > 1 else ():
            try:
                trial = session.trial(self.spec, case.requests, hparams=self.hparams)
                with editing(self.spec), trial:
                    pass
            except RequestError as own:
                found[n] = str(own)
            except EditError:
                continue  # not refused
        return found or {n: str(error) for n, _ in cases}

    # -- steps that follow one another --------------------------------------------------------

    def _sequence(
        self,
        session: EditSession,
        asker: Asker,
        cases: Sequence[EditCase] | Cases,
        done: _Done,
        tick: Callable[[int], object],
    ) -> None:
        for group in self._groups(cases):
            self._unedited(asker, group)  # kept on disk, so that no edit is suspended for it later
        edited = 0
        for group in self._groups(cases):
            unedited = self._unedited(asker, group)
            for step in _chunks(group, self.regime.size):
                self._next(session, asker, step, unedited, done)
                edited += len(step)
                tick(len(step))
                so_far = islice(enumerate(cases), edited)
                if edited == len(cases):
                    self._moment(session, asker, so_far, done, FINAL)
                elif any(edited - len(step) < point <= edited for point in self.checkpoints):
                    self._moment(session, asker, so_far, done, f"after {edited}")

    def _next(
        self,
        session: EditSession,
        asker: Asker,
        step: Sequence[Numbered],
        unedited: _Said,
        done: _Done,
    ) -> None:
        """Make a step's edits, or those that were made and journalled before."""
        folder = self.folder / STEPS / f"{step[0][0] // self.regime.size:06d}"
        if done.has(step, IMMEDIATE):
            if folder.exists():
                for patch, overlay in read_stack(folder).entries:
                    session.apply(patch, overlay=overlay)
            return
        shutil.rmtree(folder, ignore_errors=True)  # it was saved, but not journalled
        depth = len(session.stack)
        made = self._step(session, asker, step, unedited)
        if new := tuple((patch, False) for patch in session.stack[depth:]):
            write_stack(folder, SavedStack(session.host.name, session.fingerprint, new))
        done.append(self.journal, made.lines)
        self._tell(session, made)

    def _moment(
        self,
        session: EditSession,
        asker: Asker,
        cases: Iterable[Numbered],
        done: _Done,
        moment: str,
    ) -> None:
        """Ask all cases so far again."""
        for group in _chunks(cases, _CHUNK):
            if done.has(group, moment):
                continue
            kept = [(n, case) for n, case in group if n not in done.left_out]
            ask = asker.edited if session.is_edited else asker.unedited
            said = self._ask(ask, asker, kept)
            lines = [
                {
                    "n": n,
                    "moment": moment,
                    "answers": [
                        *(_one(q, "after", said.answers[q]) for q in self.scorer.questions(case)),
                        *self._about(case, (said.answers,), said.about),
                    ],
                }
                for n, case in kept
                if n not in said.refused
            ]
            done.append(self.journal, [*_left_out(said.refused), *lines])
        done.append(self.journal, self._figures(session, done, moment))

    # -- the model as a whole -------------------------------------------------------------------

    def _figures(
        self, session: EditSession, done: _Done, moment: str, n: int | None = None
    ) -> list[dict[str, Any]]:
        """The journal's line about the model as it is; none where it is there or not asked for."""
        if not self.scorer.of_models() or (n, moment) in done.figures:
            return []
        found = {
            name: {part: number_to_json(value) for part, value in figures.items()}
            for name, figures in self.scorer.measure(session).items()
        }
        if moment == UNEDITED and self.scorer.broken:  # nothing is lost yet
            raise next(iter(self.scorer.broken.values()))
        return [{"figures": found, "moment": moment, "case": n}]

    # -- questions ------------------------------------------------------------------------------

    def _groups(self, cases: Iterable[EditCase]) -> Iterator[list[Numbered]]:
        """Whole steps whose questions to the unedited model are asked together."""
        return _chunks(enumerate(cases), self.regime.size * max(1, _CHUNK // self.regime.size))

    def _unedited(self, asker: Asker, cases: Sequence[Numbered]) -> _Said:
        """What the unedited model says about cases, and about its own answers."""
        said = self._ask(asker.unedited, asker, cases)
        return replace(said, answers={**said.answers, **said.about})

    def _ask(
        self,
        ask: Callable[[Iterable[Question]], Answers],
        asker: Asker,
        cases: Sequence[Numbered],
    ) -> _Said:
        """Ask one side about cases: all together, or each by itself where that is refused."""
        try:
            answers = ask(self._questions(cases))
            return _Said(answers, self._followups(asker, cases, answers), {})
        except RequestError as error:
            if len(cases) == 1:
                return _Said({}, {}, {cases[0][0]: str(error)})
        each = [self._ask(ask, asker, [case]) for case in cases]
        return _Said(
            {q: answer for said in each for q, answer in said.answers.items()},
            {q: answer for said in each for q, answer in said.about.items()},
            {n: reason for said in each for n, reason in said.refused.items()},
        )

    def _followups(self, asker: Asker, cases: Sequence[Numbered], answers: Answers) -> Answers:
        """What the unedited model says about a model's answers."""
        asked = [q for _, case in cases for q in self.scorer.followups(case, answers)]
        return asker.unedited(asked) if asked else {}

    def _about(
        self, case: EditCase, sides: Iterable[Answers], said: Answers
    ) -> list[dict[str, Any]]:
        """What was `said` by the unedited model about answers, as the journal has it."""
        asked = (q for answers in sides for q in self.scorer.followups(case, answers))
        return [_one(q, "before", said[q]) for q in dict.fromkeys(asked)]

    def _questions(self, cases: Iterable[Numbered]) -> list[Question]:
        asked = (q for _, case in cases for q in self.scorer.questions(case))
        return list(dict.fromkeys(asked))


class _Done:
    """What the journal holds already."""

    def __init__(self, journal: Journal) -> None:
        self.answered: set[tuple[int, str]] = set()
        self.left_out: set[int] = set()
        self.figures: set[tuple[int | None, str]] = set()
        self.prepared = False
        for line in journal.lines():
            self._note(line)

    @property
    def begun(self) -> bool:
        """Whether the method was prepared, or has edited without it."""
        return self.prepared or bool(self.answered)

    def has(self, cases: Iterable[Numbered], moment: str) -> bool:
        """Whether each of the cases was answered at this moment, or left out."""
        return all((n, moment) in self.answered or n in self.left_out for n, _ in cases)

    def append(self, journal: Journal, lines: Sequence[Mapping[str, Any]]) -> None:
        """Journal those lines that are not there yet."""
        new = [line for line in lines if not self._known(line)]
        if new:
            journal.append(*new)
        for line in new:
            self._note(line)

    def _known(self, line: Mapping[str, Any]) -> bool:
        if "figures" in line:
            return (line["case"], line["moment"]) in self.figures
        if "preparation" in line:
            return self.prepared
        if "left_out" in line:
            return line["n"] in self.left_out
        return (line["n"], line["moment"]) in self.answered

    def _note(self, line: Mapping[str, Any]) -> None:
        if "figures" in line:
            self.figures.add((line["case"], line["moment"]))
        elif "preparation" in line:
            self.prepared = True
        elif "left_out" in line:
            self.left_out.add(line["n"])
        else:
            self.answered.add((line["n"], line["moment"]))


@contextlib.contextmanager
def editing(spec: MethodSpec) -> Iterator[None]:
    """Where a method's code runs: what it raises is an edit that failed.

    Raises:
        EditError: names the exception.
        ModelError: memory ran out, and where there is more the edit may not fail.
    """
    try:
        yield
    except KEditError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelError(
            f"{spec.name} ran out of memory ({reason_of(error)}). Where there is more, the same "
            f"command goes on from here."
        ) from error
    except Exception as error:
        log.debug("%s", spec.name, exc_info=True)
        raise EditError(f"{type(error).__name__}: {reason_of(error)}") from error


def _left_out(reasons: Mapping[int, str]) -> list[dict[str, Any]]:
    return [{"n": n, "left_out": reason} for n, reason in reasons.items()]


def _requests(cases: Iterable[Numbered]) -> list[EditRequest]:
    return [request for _, case in cases for request in case.requests]


def _both(question: Question, before: Answer, after: Answer) -> dict[str, Any]:
    return {
        "question": question_to_json(question),
        "before": answer_to_json(before),
        "after": answer_to_json(after),
    }


def _one(question: Question, side: str, answer: Answer) -> dict[str, Any]:
    return {"question": question_to_json(question), side: answer_to_json(answer)}


def _label(measurement: Measurement) -> str:
    protocol = measurement.protocol
    return f"{protocol.metric}[{protocol.part}]" if protocol.part else protocol.metric


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
