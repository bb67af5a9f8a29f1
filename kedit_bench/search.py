"""A search for settings: one field after the other, few facts before many, never below the start.

What is searched, the method's settings say themselves (`kedit_core.hparams.searched`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Protocol

import pydantic

from kedit_core.errors import SettingError, did_you_mean
from kedit_core.hparams import HyperParams, Share, resolve
from kedit_core.spec import MethodSpec, load_target

_FEW = 4  # facts that a candidate is tried on at least

Point = Mapping[str, Any]  # values of searched fields; the others are as at the start


class BudgetSpent(Exception):
    """Nothing more may be measured."""


@dataclass(frozen=True)
class Score:
    """What came out of settings on some facts.

    Attributes:
        value: the harmonic mean of the parts; 0 where nothing could be measured.
        parts: means over the facts, by quantity.
        nll: of the right answers to neighbours, in nats per token; decides between equal values.
        seconds: of an edit, mean over the facts.
        cost: seconds of everything.
        failures: why edits failed; a fact whose edit fails counts 0 in all parts.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    nll: float = 0.0
    seconds: float = 0.0
    cost: float = 0.0
    failures: tuple[str, ...] = ()

    @property
    def order(self) -> tuple[float, float]:
        """By which scores are compared; larger is better."""
        return self.value, -self.nll


class Measure(Protocol):
    """Scores settings on some of the facts, given by number.

    With `until` it raises `BudgetSpent` rather than begin an edit after so many seconds of work.
    """

    def __call__(
        self, hparams: HyperParams, numbers: Sequence[int], until: float = inf
    ) -> Score: ...


@dataclass(frozen=True)
class Space:
    """The settings among which is searched.

    Attributes:
        spec: the method; a field without a value has its first candidate as a default.
        axes: candidates by field, in the order of the search.
        how: preset, file, settings and config, as for `resolve`.
    """

    spec: MethodSpec
    axes: Mapping[str, Sequence[Any]]
    how: Mapping[str, Any]

    def hparams(self, point: Point) -> HyperParams:
        """The settings of a point; those of the start for an empty one.

        Raises:
            SettingError: they do not go together.
        """
        settings = {**self.how["settings"], **point}
        return resolve(self.spec, **{**self.how, "settings": settings}).hparams


def space_of(
    spec: MethodSpec, search: Mapping[str, Sequence[Any]], blocks: int, **how: Any
) -> Space:
    """The space that a method's settings describe.

    Args:
        spec: the method.
        search: candidates of fields, instead of the method's own.
        blocks: of the model.
        how: preset, file, settings and config, as for `resolve`; settings are not searched unless
            `search` names them.

    Raises:
        SettingError: an unknown field, a refused candidate, or nothing to search.
        MissingSettingError: a field has neither value nor candidates.
    """
    cls: type[HyperParams] = load_target(spec.hparams)
    for key in search:
        if key not in cls.model_fields:
            raise SettingError(
                f"{spec.name} has no setting '{key}' to search. "
                f"{did_you_mean(key, cls.model_fields)}"
            )
    axes: dict[str, list[Any]] = {}
    firsts = {}
    for name, info in cls.model_fields.items():
        if name in search:
            axes[name] = list(search[name])
        elif name not in how["settings"]:
            hinted = _hinted(info.json_schema_extra, blocks)
            axes[name] = [value for value in hinted if _accepts(cls, name, value)]
        if info.is_required() and axes.get(name):
            firsts[name] = axes[name][0]
    axes = {name: values for name, values in axes.items() if values}
    if not axes:
        raise SettingError(
            f"{spec.name} does not say what to search. Give --search KEY=A,B,C; its settings are "
            f"{', '.join(cls.model_fields)}."
        )
    space = Space(replace(spec, defaults={**firsts, **spec.defaults}), axes, how)
    space.hparams({})
    for name in search:
        for value in axes[name]:
            space.hparams({name: value})
    return space


def _hinted(extra: object, blocks: int) -> Iterator[Any]:
    """The candidates that a field says itself, each once."""
    hints = extra if isinstance(extra, Mapping) else {}
    yield from hints.get("search", ())
    found: list[Any] = []
    for share in hints.get("search_blocks", ()):
        candidate = _blocks_at(share, blocks)
        if candidate not in found:
            found.append(candidate)
            yield candidate


def _blocks_at(share: Share | Mapping[str, Share], blocks: int) -> Any:
    """What a share of the depth means in a model of so many blocks."""
    if isinstance(share, Mapping):
        return {key: _blocks_at(own, blocks) for key, own in share.items()}
    if isinstance(share, tuple):
        first, last = (round(end * (blocks - 1)) for end in share)
        return list(range(first, last + 1))
    return round(share * (blocks - 1))


def _accepts(cls: type[HyperParams], name: str, value: Any) -> bool:
    """Whether the field itself takes the value, whatever the others are."""
    try:
        cls(**{name: value})
    except pydantic.ValidationError as error:
        return all(problem["loc"][:1] != (name,) for problem in error.errors())
    return True


@dataclass(frozen=True)
class Trial:
    """Settings that were tried.

    Attributes:
        change: where they differ from the start.
        facts: on how many facts they were scored last.
        score: there.
    """

    change: Point
    facts: int
    score: Score


@dataclass(frozen=True)
class Found:
    """The end of a search.

    Attributes:
        start, best: what it began with, and what is best on the facts for tuning.
        start_held_out, best_held_out: their scores on the facts that were held out.
    """

    start: Trial
    best: Trial
    start_held_out: Score
    best_held_out: Score

    @property
    def keeps_start(self) -> bool:
        """Whether the best settings do worse on the held-out facts, so that the start stays."""
        return self.best_held_out.value < self.start_held_out.value

    @property
    def kept(self) -> Trial:
        """What is worth keeping."""
        return self.start if self.keeps_start else self.best


class Search:
    """Coordinate descent; of a field's candidates the better half goes on to more facts.

    Args:
        space: where to search.
        measure: scores settings.
        facts: how many there are for tuning; their numbers begin at 0.
        held_out: how many there are besides, numbered on.
        trials: how many settings are tried at most, the start being the first.
        seconds: no edit begins after so much work, but for those of the start and of the check at
            the end, for which time is left.
    """

    def __init__(
        self,
        space: Space,
        measure: Measure,
        facts: int,
        held_out: int,
        *,
        trials: float = inf,
        seconds: float = inf,
    ) -> None:
        self.space = space
        self.tried: dict[str, Trial] = {}
        self._measure = measure
        self._held_out = range(facts, facts + held_out)
        self._trials, self._seconds = trials, seconds
        self._start = space.hparams({}).model_dump(mode="json")
        self._sizes = [facts]
        while self._sizes[0] // 2 >= _FEW:
            self._sizes.insert(0, self._sizes[0] // 2)

    def run(self) -> Found:
        """Search until nothing gets better, or the budget is spent."""
        (start,) = self._try([{}], self._sizes[-1], inf)
        start_held_out = self._check(start)
        best = start
        with contextlib.suppress(BudgetSpent):
            for better in self._better(start, self._seconds - start_held_out.cost):
                best = better
        best_held_out = start_held_out if best is start else self._check(best)
        return Found(start, best, start_held_out, best_held_out)

    def _better(self, best: Trial, until: float) -> Iterator[Trial]:
        """Each trial that beats what was the best before it."""
        before = None
        while best is not before:
            before = best
            for name, values in self.space.axes.items():
                rivals: list[Point] = [{**best.change, name: value} for value in values]
                for size in self._sizes[:-1]:
                    if len(rivals) > 1:
                        tried = list(self._try(rivals, size, until, best))
                        tried.sort(key=lambda trial: trial.score.order, reverse=True)
                        rivals = [trial.change for trial in tried[: (len(tried) + 1) // 2]]
                for trial in self._try(rivals, self._sizes[-1], until, best):
                    if trial.score.order > best.score.order:
                        best = trial
                        yield best

    def _try(
        self, points: Iterable[Point], facts: int, until: float, best: Trial | None = None
    ) -> Iterator[Trial]:
        """Score points on the first facts; without the best one, and those beyond the budget."""
        score: Score | None
        for point in points:
            try:
                hparams = self.space.hparams(point)
            except SettingError as error:  # fields that do not go together
                change, score = dict(point), Score(0.0, failures=(str(error),))
            else:
                dump = hparams.model_dump(mode="json")
                change, score = {k: v for k, v in dump.items() if v != self._start[k]}, None
            key = json.dumps(change, sort_keys=True)
            if best is not None and change == best.change:
                continue
            if key not in self.tried and len(self.tried) >= self._trials:
                continue
            trial = Trial(change, facts, score or self._measure(hparams, range(facts), until))
            if key not in self.tried or facts >= self.tried[key].facts:
                self.tried[key] = trial
            yield trial

    def _check(self, trial: Trial) -> Score:
        return self._measure(self.space.hparams(trial.change), self._held_out)
