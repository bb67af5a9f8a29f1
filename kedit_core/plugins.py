"""Finding plugins.  One broken plugin costs one line; everything else works."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar, cast

import pluggy

from kedit_core import hookspecs
from kedit_core.errors import PluginError, UnknownNameError, did_you_mean
from kedit_core.hookspecs import GROUP, PROJECT, REGISTRATIONS
from kedit_core.spec import (
    ClassifierSpec,
    DatasetSpec,
    EffectSpec,
    MethodSpec,
    MetricSpec,
    ModelSpec,
    Spec,
    check_spec,
    import_problem,
)

log = logging.getLogger(__name__)

S = TypeVar("S", bound=Spec)


def first_party() -> dict[tuple[str, str], str]:
    """What the plugins of this project offer, by kind and name, and in which distribution.

    It answers an unknown name with `pip install …`.
    """
    text = Path(__file__).with_name("first_party.json").read_text("utf-8")
    return {(k, n): owner for k, names in json.loads(text).items() for n, owner in names.items()}


@dataclass(frozen=True)
class PluginInfo:
    """One plugin as it was found.

    Attributes:
        name: name of the entry point.
        distribution: the distribution that brings it.
        version: that distribution's version.
        offers: names of what it registered, with the kind before it: `method rome`.
        error: why it, or a part of it, cannot be used; empty if all is well.
    """

    name: str
    distribution: str
    version: str
    offers: tuple[str, ...] = ()
    error: str = ""

    @property
    def status(self) -> Literal["ok", "broken"]:
        return "broken" if self.error else "ok"


@dataclass(frozen=True)
class _Entry:
    spec: Spec
    plugin: str
    distribution: str


@dataclass
class Catalog:
    """Everything that is installed, by kind and name."""

    plugins: list[PluginInfo] = field(default_factory=list)
    manager: pluggy.PluginManager = field(default_factory=lambda: pluggy.PluginManager(PROJECT))
    _entries: dict[str, dict[str, list[_Entry]]] = field(default_factory=dict)
    _left_out: dict[str, str] = field(default_factory=dict)  # a distribution's plugin

    def method(self, name: str) -> MethodSpec:
        """The method `name`; raises UnknownNameError or PluginError (as all look-ups do)."""
        return self._find(MethodSpec, name)

    def dataset(self, name: str) -> DatasetSpec:
        """The dataset `name`."""
        return self._find(DatasetSpec, name)

    def metric(self, name: str) -> MetricSpec:
        """The metric `name`."""
        return self._find(MetricSpec, name)

    def classifier(self, name: str) -> ClassifierSpec:
        """The classifier `name`."""
        return self._find(ClassifierSpec, name)

    def effect(self, name: str) -> EffectSpec:
        """The effect type `name`."""
        return self._find(EffectSpec, name)

    def model(self, name: str) -> ModelSpec:
        """The model `name`."""
        return self._find(ModelSpec, name)

    def all(self, kind: type[S]) -> list[S]:
        """All specs of one class, by name; names that two plugins claim are left out."""
        named = self._entries.get(_kind(kind), {})
        return [cast(S, named[name][0].spec) for name in sorted(named) if len(named[name]) == 1]

    def plugin_of(self, spec: Spec) -> PluginInfo:
        """The plugin that registered `spec`."""
        entry = self._entries[_kind(type(spec))][spec.name][0]
        return next(p for p in self.plugins if p.name == entry.plugin)

    @property
    def failing(self) -> str:
        """The distributions whose plugins do not work, as a sentence; empty if there are none."""
        names = ", ".join(sorted({p.distribution for p in self.plugins if p.error}))
        return f"Plugins that do not work: {names} (see `kedit plugins`)." if names else ""

    def has_observers(self, hook: str) -> bool:
        """Whether any plugin implements an observation hook."""
        return bool(getattr(self.manager.hook, hook).get_hookimpls())

    def notify(self, hook: str, event: Any) -> None:
        """Call an observation hook of every plugin; their errors are logged, not raised."""
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            try:
                implementation.function(event)
            except Exception:
                log.exception("plugin %s failed in %s", implementation.plugin_name, hook)

    def _find(self, kind: type[S], name: str) -> S:
        word = _kind(kind)
        named = self._entries.get(word, {})
        entries = named.get(name, [])
        if len(entries) == 1:
            return cast(S, entries[0].spec)
        if entries:
            owners = " and ".join(sorted({e.distribution for e in entries}))
            raise PluginError(f"The {word} '{name}' is offered by {owners}. Uninstall all but one.")
        ours = first_party()
        package = ours.get((word, name))
        if package is not None:
            broken = [p for p in self.plugins if p.distribution == package and p.error]
            if broken:
                raise PluginError(f"The {word} '{name}' is broken: {broken[0].error}")
            if package in self._left_out:
                raise UnknownNameError(
                    f"The {word} '{name}' is left out by the environment variable KEDIT_PLUGINS. "
                    f"Add '{self._left_out[package]}' to it, or unset it."
                )
            raise UnknownNameError(
                f"The {word} '{name}' is not installed. Install it with `pip install {package}`."
            )
        known = {*named, *(n for k, n in ours if k == word)}
        answer = f"There is no {word} '{name}'. {did_you_mean(name, known)} {self.failing}"
        raise UnknownNameError(answer.rstrip())

    def _add(self, entry: _Entry) -> str:
        named = self._entries.setdefault(_kind(type(entry.spec)), {})
        entries = named.setdefault(entry.spec.name, [])
        entries.append(entry)
        return f"{_kind(type(entry.spec))} {entry.spec.name}"


def discover(extra: Iterable[tuple[str, ModuleType]] = ()) -> Catalog:
    """Load every installed plugin; kedit's own metrics come the same way.

    `KEDIT_PLUGINS=a,b` limits what is loaded; `KEDIT_STRICT=1` turns a broken plugin into an
    error.

    Args:
        extra: further plugins as (name, module), for tests and notebooks.

    Raises:
        PluginError: with KEDIT_STRICT, the first plugin that is broken.
    """
    catalog = Catalog()
    catalog.manager.add_hookspecs(hookspecs)
    only = {n.strip() for n in os.environ.get("KEDIT_PLUGINS", "").split(",") if n.strip()}
    points = _entry_points()
    for name in sorted(only - {point.name for point in points}):
        log.warning("KEDIT_PLUGINS names '%s', and no plugin is called so.", name)
    for point in points:
        distribution = point.dist.name if point.dist else "?"
        if only and point.name not in only:
            catalog._left_out[distribution] = point.name
            continue
        version = point.dist.version if point.dist else "?"
        if point.group != GROUP:
            error = f"made for another plugin API: it registers in {point.group}, this is {GROUP}"
            catalog.plugins.append(PluginInfo(point.name, distribution, version, error=error))
        else:
            _admit(catalog, point.name, distribution, point.load, version)
    for name, module in extra:
        _admit(catalog, name, name, lambda: module)  # noqa: B023 - called at once
    _mark_conflicts(catalog)
    broken = next((p for p in catalog.plugins if p.error), None)
    if broken and os.environ.get("KEDIT_STRICT") == "1":
        raise PluginError(f"Plugin {broken.name} of {broken.distribution}: {broken.error}.")
    return catalog


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    family = re.compile(r"kedit\.plugins\.v\d+")
    points = importlib.metadata.entry_points()
    found = [
        p for group in points.groups if family.fullmatch(group) for p in points.select(group=group)
    ]
    return sorted(found, key=lambda p: (p.name, p.dist.name if p.dist else ""))


def _admit(
    catalog: Catalog,
    name: str,
    distribution: str,
    load: Callable[[], ModuleType],
    version: str = "",
) -> None:
    """Import one plugin and take in what it registers; whatever goes wrong stays with it."""
    offers: list[str] = []
    error = ""
    try:
        module = load()
        _check_hooks(module)
        specs = list(_registered(module))
        if catalog.manager.has_plugin(name):
            raise PluginError(f"another plugin is called '{name}' too")
        catalog.manager.register(module, name)
        offers = [catalog._add(_Entry(spec, name, distribution)) for spec in specs]
    except ModuleNotFoundError as problem:
        error = import_problem(problem)
    except (Exception, SystemExit) as problem:
        words = " ".join(str(problem).split())  # one line, whatever it printed
        error = f"{type(problem).__name__}: {words}" if words else type(problem).__name__
        log.debug("plugin %s", name, exc_info=True)
    catalog.plugins.append(PluginInfo(name, distribution, version, tuple(offers), error))


def _check_hooks(module: ModuleType) -> None:
    known = [n for n in vars(hookspecs) if n.startswith("kedit_")]
    for name, value in vars(module).items():
        is_marked = hasattr(value, f"{PROJECT}_impl")
        if is_marked and name not in known:
            raise PluginError(
                f"it implements an unknown hook '{name}'. {did_you_mean(name, known)}"
            )
        is_hook = name in known or name.startswith("kedit_register_")
        if is_hook and inspect.isfunction(value) and not is_marked:
            raise PluginError(f"its function '{name}' is never called: put @hookimpl before it")


def _registered(module: ModuleType) -> Iterable[Spec]:
    for hook, kind in REGISTRATIONS.items():
        implementation = getattr(module, hook, None)
        if implementation is None or not hasattr(implementation, f"{PROJECT}_impl"):
            continue
        for spec in implementation():
            if type(spec) is not kind:
                raise PluginError(f"{hook} returned {spec!r}, not a {kind.__name__}")
            check_spec(spec)
            yield spec


def _mark_conflicts(catalog: Catalog) -> None:
    """Note at each plugin which of its names another one claims too."""
    for kind, named in catalog._entries.items():
        for name, entries in named.items():
            if len(entries) < 2:
                continue
            owners = " and ".join(sorted({e.distribution for e in entries}))
            for index, info in enumerate(catalog.plugins):
                if any(e.plugin == info.name for e in entries) and not info.error:
                    error = f"the {kind} '{name}' is offered by {owners}; uninstall all but one"
                    catalog.plugins[index] = replace(info, error=error)


def _kind(cls: type[Spec]) -> str:
    return cls.__name__.removesuffix("Spec").lower()
