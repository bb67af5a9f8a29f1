"""Descriptions that plugins register.  Plain data: nothing here imports what it describes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kedit_core.errors import PluginError

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
        hint = f" (install '{error.name}')" if isinstance(error, ModuleNotFoundError) else ""
        raise PluginError(f"'{target}' cannot be imported: {error}{hint}.") from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise PluginError(f"'{target}' does not exist in its module.") from error


@dataclass(frozen=True)
class Spec:
    """What all descriptions share.

    Attributes:
        name: what users type; unique among all installed plugins.
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
    """A metric; the name carries its protocol, for example `efficacy/teacher-forced@1`.

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
