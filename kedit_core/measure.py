"""What metrics share: means over a case's probes of one kind, makers for each kind of them, checked
settings, classifiers by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kedit_core.ask import Answers, Question, Score, Text
from kedit_core.errors import SettingError
from kedit_core.named import create
from kedit_core.plugins import discover
from kedit_core.protocols import CaseScore, Classifier
from kedit_core.request import EditCase, Probe

# Questions about one probe, and its value from the answers without and with the edit: None where
# they do not tell.
Asks = Callable[[Probe], Iterable[Question]]
Value = Callable[[Probe, Answers, Answers], float | None]


@dataclass(frozen=True)
class ProbeMetric:
    """The mean over families of the mean over a case's probes of one kind.

    Attributes:
        kind: kind of the probes that count.
        asks: what is asked about a probe.
        value: value of a probe.
        needs_expected: whether a probe without an accepted answer is left out.
    """

    kind: str
    asks: Asks
    value: Value
    needs_expected: bool = True

    def questions(self, case: EditCase) -> Iterable[Question]:
        """What is asked about the case's probes of this kind."""
        return [question for probe in self._probes(case) for question in self.asks(probe)]

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """Scores by family; empty where the case has no such probe that has a value."""
        values = ((p.name, self.value(p, before, after)) for p in self._probes(case))
        return by_family((name, value) for name, value in values if value is not None)

    def _probes(self, case: EditCase) -> list[Probe]:
        return [
            probe
            for probe in probes_of(case)
            if probe.kind == self.kind and (probe.expected or not self.needs_expected)
        ]


def for_kinds(functions: Mapping[str, Any], kinds: Sequence[str]) -> Callable[[str], Any]:
    """A `__getattr__` for a module of functions that make a metric of one kind of probes.

    Each function then has a name for each kind that can be a spec's target: `rephrase_rank()` is
    `rank("rephrase")`, and so on.

    Args:
        functions: the module's globals.
        kinds: of probes.
    """

    def find(name: str) -> Any:
        kind, _, function = name.partition("_")
        if kind in kinds and function in functions:
            return partial(functions[function], kind)
        raise AttributeError(f"module '{functions['__name__']}' has no attribute '{name}'")

    return find


def probes_of(case: EditCase) -> tuple[Probe, ...]:
    """The case's probes with the rewritten prompts themselves in front.

    These are of the family `meta["group"]`, where a dataset has groups of cases whose scores are
    of interest by themselves.
    """
    group = str(case.meta.get("group", ""))
    rewrites = [
        Probe(kind="rewrite", name=group, prompt=request.text, expected=(request.target_new,))
        for request in case.requests
    ]
    return (*rewrites, *case.probes)


def mean(values: Iterable[float]) -> float:
    """The mean of at least one value."""
    listed = list(values)
    return sum(listed) / len(listed)


def by_family(values: Iterable[tuple[str, float]]) -> dict[str, CaseScore]:
    """Scores by family, and under "" the mean over families (a probe without a name: "")."""
    families: dict[str, list[float]] = defaultdict(list)
    for name, value in values:
        families[name].append(value)
    if not families:
        return {}
    total = sum(map(len, families.values()))
    headline = CaseScore(mean(map(mean, families.values())), total)
    parts = {name: CaseScore(mean(v), len(v)) for name, v in families.items() if name}
    return {**parts, "": headline}


def read_of(answers: Answers, question: Question) -> Score:
    """The answer to a `Read`."""
    found = answers[question]
    assert isinstance(found, Score)
    return found


def text_of(answers: Answers, question: Question) -> Text:
    """The answer to a `Continue`, a `Converse` or a `Sample`."""
    found = answers[question]
    assert isinstance(found, Text)
    return found


def at_least_one(name: str, value: int) -> int:
    """A setting that counts something, checked.

    Raises:
        SettingError: it is no whole number from 1 on.
    """
    if type(value) is not int or value < 1:
        raise SettingError(f"{name} must be a whole number from 1 on, not {value!r}.")
    return value


def classifier_of(
    name: str, model: str, labels: str, *, own: tuple[str, str, str], needed: Sequence[str]
) -> Classifier:
    """The classifier of this name, a metric's own where nothing else is said.

    Args:
        name: of an installed classifier.
        model, labels: its settings; empty ones are not given.
        own: name of the metric's own classifier, and the model and labels that it has where that
            name is given without a model.
        needed: labels that the metric asks for.

    Raises:
        UnknownNameError: there is no such classifier.
        SettingError: a setting is refused, or the classifier cannot be loaded or lacks a label.
    """
    own_name, own_model, own_labels = own
    if name == own_name and not model:
        model, labels = own_model, labels or own_labels
    given = {"model": model, "labels": labels}
    spec = discover().classifier(name)
    made: Classifier = create(spec, {key: value for key, value in given.items() if value})
    known = getattr(made, "labels", spec.labels)  # its own where settings decide them
    lacking = [label for label in needed if label not in known]
    if lacking:
        raise SettingError(
            f"The classifier '{name}' has no label '{lacking[0]}' (its labels: "
            f"{', '.join(known) or 'none'}). Name its classes in their order, as "
            f"labels={own_labels} does, or choose another."
        )
    return made
