"""Descriptions that plugins register.  Plain data: nothing here imports what it describes."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from kedit_core.errors import PluginError, did_you_mean

if TYPE_CHECKING:
    from kedit_core.request import EditRequest

Effect = Literal["weights", "modules", "calls"]
Need = Literal["subject", "ground-truth", "causal-model", "gradients", "training-data"]


def load_target(target: str) -> Any:
    """The object that `"pkg.module:Name"` points to.

    Raises:
        PluginError: the module cannot be imported or lacks the name.
    """
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a plugin's code runs here, and may fail in any way
        raise PluginError(f"'{target}' cannot be imported: {import_problem(error)}.") from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise PluginError(f"'{target}' does not exist in its module.") from error


def import_problem(error: Exception) -> str:
    """Why an import failed: of a module that was not found, whether its package is there."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return str(error)
    package, dot, _ = error.name.partition(".")
    if dot:  # Python imports the package first
        return f"the package '{package}' has no module '{error.name}'"
    return f"it needs the package '{package}', which is not installed"


@dataclass(frozen=True)
class Spec:
    """What all descriptions share.

    Attributes:
        name: what users type; unique among all installed plugins.  Lower-case letters and digits,
            with single hyphens or dots between words.
        target: `"pkg.module:Name"` of what is described; imported at first use.
        summary: one line for the lists.
        paper: where it was published, for example `arXiv:2202.05262`.
    """

    name: str
    target: str
    summary: str
    paper: str = ""

    def load(self) -> Any:
        """Import and return the target."""
        return load_target(self.target)


@dataclass(frozen=True)
class MethodSpec(Spec):
    """An editing method.

    Attributes:
        hparams: `"pkg.module:Class"` of its `HyperParams`.
        effect: the kind of effect its patches have.
        max_batch: requests that one call of `edit` takes: 1, n, or None for any number.
        sequential: whether edits may follow one another in one session.
        removable: whether one edit can be taken back from among later ones.
        writes_facts: False for a method that changes how the model answers, whatever is asked;
            it takes no requests, and keeps those that it is given as a record only.
        needs: what requests and models must offer.  The session refuses requests without subject
            or ground truth and models that are not causal; `gradients` and `training-data` are
            for readers of the lists.
        presets: package (`"kedit_rome.presets"`) that holds the method's YAML presets.
        variant_of: name of the method of which this is a setting, if any.
        defaults: settings that make the variant; a preset, file or `--set` overrides them.
    """

    hparams: str = ""
    effect: Effect = "weights"
    max_batch: int | None = 1
    sequential: bool = True
    removable: bool = False
    writes_facts: bool = True
    needs: frozenset[Need] = frozenset()
    presets: str = ""
    variant_of: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def refusal(self, request: EditRequest) -> str:
        """Why the method does not take the request; empty if it does."""
        if "subject" in self.needs and request.subject is None:
            return f"{self.name} needs the subject of {request.text!r}."
        if "ground-truth" in self.needs and not request.ground_truth:
            return f"{self.name} needs the former answer to {request.text!r}."
        return ""


@dataclass(frozen=True)
class DatasetSpec(Spec):
    """A dataset adapter: target is a class with `cases(source)`, or with `probes(source)`.

    Attributes:
        licence: licence of the data.
        needs_path: False where the data ships with the plugin.
        metrics: what `kedit eval` computes by default, as names that may hold `*`; where empty,
            all metrics whose spec says `default`.
        holds: `cases`, or `probes` to be asked besides those of another dataset's cases.
    """

    licence: str = ""
    needs_path: bool = True
    metrics: tuple[str, ...] = ()
    holds: Literal["cases", "probes"] = "cases"


@dataclass(frozen=True)
class MetricSpec(Spec):
    """A metric; its name is `quantity/protocol@version`, such as `efficacy/teacher-forced@1`.

    Attributes:
        unit: of its values.
        probe: kind of the probes that count.
        decoding: how the model is asked: teacher-forced, greedy, sampled.
        scorer: how an answer becomes a number.
        reference: what it is compared with: target, unedited, truth.
        form: how prompts are put: bare, or task (chat template or instruction).
        better: which direction is good.
        default: whether `kedit eval` computes it where neither user nor dataset chose.
        measures: `answers` for a `Metric`, `model` for a `ModelMetric`.
    """

    unit: str = "share"
    probe: str = ""
    decoding: str = ""
    scorer: str = ""
    reference: str = ""
    form: str = "bare"
    better: Literal["higher", "lower", ""] = "higher"
    default: bool = False
    measures: Literal["answers", "model"] = "answers"


@dataclass(frozen=True)
class ClassifierSpec(Spec):
    """A classifier of texts: target is a class with `classify(texts)`, made with its settings.

    Attributes:
        labels: the classes that it tells apart, for example `("safe", "unsafe")`.
    """

    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class EffectSpec(Spec):
    """A registered effect type of the kinds "module" or "call"; see `kedit_core.effects`."""

    kind: Literal["module", "call"] = "module"


@dataclass(frozen=True)
class ModelSpec(Spec):
    """A model that comes with a package: target is a function that returns its folder.

    Attributes:
        config: facts of the config that choose presets before any weight is read.
        licence: licence of the weights.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    licence: str = ""


@dataclass(frozen=True)
class ArchitectureSpec(Spec):
    """Where things are in a model family that structure alone does not reveal.

    Target is a mapping of templates for `kedit_core.anatomy.find_anatomy`; `config` holds the
    config values (for example `{"model_type": "odd"}`) of the models that it is for.
    """

    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CommandSpec(Spec):
    """A command that joins `kedit`: target is a typer-compatible function, or a `typer.Typer`."""


def check_spec(spec: Spec) -> None:
    """Check a spec's name, and the values of fields that have few.

    Raises:
        PluginError: says which is wrong, and what may stand there.
    """
    owner = f"{type(spec).__name__} '{spec.name}'"
    word = "[a-z0-9]+([.-][a-z0-9]+)*"
    if isinstance(spec, MetricSpec):
        pattern, form = f"{word}/{word}@[0-9]+", "quantity/protocol@version, as my-score/greedy@1"
    else:
        pattern, form = word, "lower-case words with hyphens between them, as my-name"
    if not re.fullmatch(pattern, spec.name):
        raise PluginError(f"{owner}: its name must be {form}")
    for key, (is_set, known) in _choices(type(spec)).items():  # type: ignore[arg-type]
        given = getattr(spec, key)
        for value in given if is_set else (given,):
            if value not in known:
                hint = did_you_mean(str(value), known)
                raise PluginError(f"{owner}: {key} cannot be {value!r}. {hint}")
    if isinstance(spec, MethodSpec) and spec.max_batch is not None and spec.max_batch < 1:
        raise PluginError(f"{owner}: max_batch is {spec.max_batch}; give 1 or more, or None")


@functools.cache  # hints cost more than all checks
def _choices(kind: type[Spec]) -> dict[str, tuple[bool, tuple[str, ...]]]:
    """Of each field with few values, whether it is a set of them, and what they are."""
    found = {}
    for key, hint in get_type_hints(kind).items():
        is_set = get_origin(hint) is frozenset
        values = get_args(hint)[0] if is_set else hint
        if get_origin(values) is Literal:
            found[key] = is_set, get_args(values)
    return found
