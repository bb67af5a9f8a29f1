"""Running the checks: as data with `run_checks`, in pytest with `parametrize_checks`."""

from __future__ import annotations

import contextlib
import random
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from kedit_core.errors import ModelError, SettingError, UnknownNameError, did_you_mean, last_call
from kedit_core.hparams import HyperParams, presets_of, resolve
from kedit_core.plugins import Catalog, discover
from kedit_core.progress import progress
from kedit_core.spec import Effect, MethodSpec
from kedit_core.testing.bench import Bench, Skipped, Workbench
from kedit_core.testing.checks import answers, contract, effects, history, purity, storage
from kedit_core.testing.model_state import torch_settings_kept
from kedit_core.testing.pytest_plugin import MARKER
from kedit_core.testing.selection import ALL_EFFECTS
from kedit_core.testing.toys import TOYS

if TYPE_CHECKING:
    import pytest

Outcome = Literal["passed", "failed", "xfailed", "xpassed", "skipped"]
Given = Mapping[str, Any] | HyperParams | None

TOY_PRESET = "toy"
_ODD = 271828183
_INDENTED: Any = {
    "width": 100,
    "initial_indent": "    ",
    "subsequent_indent": "    ",
    "break_on_hyphens": False,
}
_MODULES = (contract, purity, answers, history, effects, storage)


@dataclass(frozen=True)
class Check:
    """One behaviour that methods must have.

    Attributes:
        name: of the function, without `check_`.
        function: raises AssertionError where the method does otherwise.
        claim: what a method that passes can claim, in a sentence.
        effects: the kinds of effect that it is for.
        about_facts: whether it is for methods that write facts only.
        once: whether it does not depend on the model and runs for one layout only.
    """

    name: str
    function: Callable[[Bench], None]
    claim: str
    effects: frozenset[Effect]
    about_facts: bool
    once: bool


@dataclass(frozen=True)
class Result:
    """What one check found on one layout.

    Attributes:
        message: why it failed, was skipped, or is expected to fail; empty if it passed.
    """

    check: str
    layout: str
    outcome: Outcome
    seconds: float
    message: str = ""


@dataclass(frozen=True)
class Report:
    """The results of one method."""

    method: str
    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed and nothing passed that was expected to fail."""
        return not self.failures

    @property
    def failures(self) -> tuple[Result, ...]:
        """What failed, or passed against expectation."""
        return tuple(r for r in self.results if r.outcome in ("failed", "xpassed"))

    @property
    def counts(self) -> dict[Outcome, int]:
        """How many results there are of each outcome."""
        return dict(Counter(result.outcome for result in self.results))

    def as_data(self) -> dict[str, Any]:
        """The report as JSON values."""
        results = [asdict(result) for result in self.results]
        return {"method": self.method, "ok": self.ok, "counts": self.counts, "results": results}

    def table(self) -> str:
        """One line per check with its outcome on each layout, then each reason with its checks:
        by name, or as `layout-name` where it is that of some layouts only."""
        layouts = list(dict.fromkeys(r.layout for r in self.results))
        found = {(r.check, r.layout): r.outcome for r in self.results}
        names = list(dict.fromkeys(r.check for r in self.results))
        width = max(map(len, names), default=0)
        lines = ["  ".join([self.method.ljust(width), *(n.ljust(7) for n in layouts)]).rstrip()]
        for name in names:
            cells = (found.get((name, layout), "").ljust(7) for layout in layouts)
            lines.append("  ".join([name.ljust(width), *cells]).rstrip())
        runs = Counter(r.check for r in self.results)
        reasons: dict[str, list[Result]] = {}
        for r in self.results:
            if r.message:
                reasons.setdefault(f"{r.outcome}: {r.message}", []).append(r)
        for reason, results in reasons.items():
            times = Counter(r.check for r in results)
            checks = dict.fromkeys(
                r.check if times[r.check] == runs[r.check] else f"{r.layout}-{r.check}"
                for r in results
            )
            lines += [reason, *textwrap.wrap(", ".join(checks), **_INDENTED)]
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.items())
        lines.append(f"{len(names)} checks on {' and '.join(layouts)}: {counts}")
        return "\n".join(lines)


def all_checks() -> tuple[Check, ...]:
    """Every check of the suite, in the order in which they run."""
    return tuple(
        Check(
            name=name.removeprefix("check_"),
            function=function,
            claim=(function.__doc__ or "").strip().splitlines()[0],
            effects=getattr(function, "effects", ALL_EFFECTS),
            about_facts=hasattr(function, "about_facts"),
            once=hasattr(function, "once"),
        )
        for module in _MODULES
        for name, function in vars(module).items()
        if name.startswith("check_") and function.__module__ == module.__name__
    )


def run_checks(
    method: str | MethodSpec,
    hparams: Given = None,
    expected_failures: Mapping[str, str] | None = None,
    layouts: Sequence[str] = TOYS,
    catalog: Catalog | None = None,
    only: Sequence[str] = (),
) -> Report:
    """Run every check on the toy models.

    Args:
        method: a name from `kedit list-methods`, or a spec.
        hparams: settings that suit the toys; by default those of the method's preset `toy`.
        expected_failures: for names of checks, or `layout-check`, the reason why they fail.  Such
            a check must fail: where it passes it counts as failed ("xpassed").
        layouts: names of toy models.
        catalog: the installed plugins, if they are known already.
        only: names of the checks to run; by default all.

    Raises:
        SettingError: there is no preset `toy`, a setting is wrong, or a reason is empty.
        UnknownNameError: no such method, or no such check.
    """
    expected = _expected(expected_failures, layouts)
    run = _Run(method, hparams, catalog).checked()
    _known(only)
    planned = [
        (layout, check) for layout, check in _plan(layouts) if not only or check.name in only
    ]
    results = []
    with progress(len(planned), f"checks of {run.spec.name}", "check") as bar:
        for layout, check in planned:
            results.append(_result(run, check, layout, expected))
            bar.update(1)
    return Report(run.spec.name, tuple(results))


def parametrize_checks(
    method: str | MethodSpec,
    hparams: Given = None,
    expected_failures: Mapping[str, str] | None = None,
    layouts: Sequence[str] = TOYS,
    catalog: Catalog | None = None,
) -> pytest.MarkDecorator:
    """Decorator for `def test_conformance(check): check()`: a test for each check and layout.

    The arguments are those of `run_checks`; expected failures become strict xfails.
    """
    import pytest

    expected = _expected(expected_failures, layouts)
    run = _Run(method, hparams, catalog)
    name = method if isinstance(method, str) else method.name

    def test_of(layout: str, check: Check) -> Callable[[], None]:
        def call() -> None:
            try:
                run.call(check, layout)
            except Skipped as reason:
                pytest.skip(str(reason))

        return call

    parameters = []
    for layout, check in _plan(layouts):
        marks = [getattr(pytest.mark, MARKER)(name)]
        reason = _reason(expected, check, layout)
        if reason is not None:
            marks.append(pytest.mark.xfail(reason=reason, strict=True))
        identity = f"{layout}-{check.name}"
        parameters.append(pytest.param(test_of(layout, check), id=identity, marks=marks))
    return pytest.mark.parametrize("check", parameters)


class _Run:
    """One method with its settings; looked up when the first check needs it."""

    def __init__(self, method: str | MethodSpec, hparams: Given, catalog: Catalog | None) -> None:
        self._method, self._given, self._catalog = method, hparams, catalog

    @cached_property
    def catalog(self) -> Catalog:
        return self._catalog or discover()

    @cached_property
    def spec(self) -> MethodSpec:
        method = self._method
        return self.catalog.method(method) if isinstance(method, str) else method

    @cached_property
    def hparams(self) -> HyperParams:
        return _settings(self.spec, self._given)

    @cached_property
    def workbench(self) -> Workbench:
        return Workbench()

    def checked(self) -> _Run:
        """The run itself, once method and settings are known to be right."""
        assert self.hparams is not None
        return self

    def call(self, check: Check, layout: str) -> None:
        """Run one check.

        Raises:
            Skipped: it does not apply, or the method refuses the toy as a model.
            AssertionError: the method does otherwise.
        """
        if check.about_facts and not self.spec.writes_facts:
            raise Skipped("the method writes no facts")
        if self.spec.effect not in check.effects:
            kinds = " or ".join(sorted(check.effects))
            raise Skipped(f"for methods whose effect is {kinds}; this one's is {self.spec.effect}")
        bench = Bench(self.spec, self.hparams, layout, self.catalog, self.workbench)
        with torch_settings_kept(), _surroundings():
            try:
                check.function(bench)
            except ModelError as error:
                if type(error) is not ModelError or str(error) != bench.refusal():
                    raise
                raise Skipped(str(error)) from error


def _settings(spec: MethodSpec, given: Given) -> HyperParams:
    if isinstance(given, HyperParams):
        return given
    if given is not None:
        return resolve(spec, settings=given).hparams
    if TOY_PRESET not in [preset.name for preset in presets_of(spec)]:
        raise SettingError(
            f"{spec.name} has no preset '{TOY_PRESET}' with settings for the toy models. Add "
            f"presets/{TOY_PRESET}.yaml to its plugin."
        )
    return resolve(spec, preset=TOY_PRESET).hparams


def _plan(layouts: Sequence[str]) -> list[tuple[str, Check]]:
    return [
        (layout, check)
        for number, layout in enumerate(layouts)
        for check in all_checks()
        if number == 0 or not check.once
    ]


def _expected(given: Mapping[str, str] | None, layouts: Sequence[str]) -> dict[str, str]:
    """The expected failures, checked: known names, each with a reason."""
    prefixes = tuple(f"{layout}-" for layout in layouts)
    for name, reason in (given or {}).items():
        prefix = next((p for p in prefixes if name.startswith(p)), "")
        _known([name.removeprefix(prefix)])
        if not reason.strip():
            raise SettingError(f"The check '{name}' is expected to fail: say why.")
    return dict(given or {})


def _known(names: Iterable[str]) -> None:
    known = {check.name for check in all_checks()}
    for name in names:
        if name not in known:
            raise UnknownNameError(f"There is no check '{name}'. {did_you_mean(name, known)}")


def _reason(expected: Mapping[str, str], check: Check, layout: str) -> str | None:
    return expected.get(f"{layout}-{check.name}", expected.get(check.name))


def _result(run: _Run, check: Check, layout: str, expected: Mapping[str, str]) -> Result:
    started = time.perf_counter()
    outcome: Outcome = "passed"
    message = ""
    try:
        run.call(check, layout)
    except Skipped as skipped:
        outcome, message = "skipped", str(skipped)
    except AssertionError as problem:
        # The first line is ours; pytest adds its own explanation below.
        outcome, message = "failed", (str(problem).splitlines() or ["it fails"])[0]
    except Exception as problem:
        # Foreign code: whatever it raises is what the check found.
        outcome = "failed"
        package = run.spec.target.partition(":")[0].partition(".")[0]
        _, where = last_call(problem, {package})
        message = f"{type(problem).__name__}: {problem} ({where})"
    reason = _reason(expected, check, layout)
    if reason is not None and outcome == "failed":
        outcome, message = "xfailed", reason
    elif reason is not None and outcome == "passed":
        outcome, message = "xpassed", f"it passes, though expected to fail: {reason}"
    return Result(check.name, layout, outcome, time.perf_counter() - started, message)


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """One thread, on which tiny models run faster, and random states that nobody would choose, so
    that seeding shows; these and all settings of torch are as before after the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    torch.set_num_threads(1)
    random.seed(_ODD)
    np.random.seed(_ODD)
    torch.manual_seed(_ODD)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
