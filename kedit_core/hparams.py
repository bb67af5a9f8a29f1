"""Hyperparameters: their base class, presets, and where each value came from."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict

from kedit_core.errors import MissingSettingError, PluginError, SettingError, did_you_mean
from kedit_core.spec import MethodSpec, import_problem, load_target

Share = float | tuple[float, float]


class HyperParams(BaseModel):
    """Base of all hyperparameters: frozen, unknown keys refused.

    Only numbers of the algorithm.  Devices, paths and model names belong to the run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def searched(*values: Any) -> dict[str, Any]:
    """What `kedit tune` tries for a field, given to it as `json_schema_extra`.

    Fields are searched in the order in which they are declared, so what comes after a costly part
    of the algorithm is best declared after it.  The first value is where the search begins if the
    field has none.
    """
    return {"search": list(values)}


def searched_blocks(*shares: Share | Mapping[str, Share]) -> dict[str, Any]:
    """The same for blocks, as shares of the model's depth: 0 is the first one, 1 the last.

    A number stands for a block (`layer`), a pair for all blocks from one to another (`layers`),
    and a mapping for the blocks of each of its keys (`matrices`).
    """
    return {"search_blocks": list(shares)}


@dataclass(frozen=True)
class Preset:
    """Published or tuned settings of one method for one kind of model.

    Attributes:
        name: file name without `.yaml`.
        methods: names of the methods that it is for.
        source: where the numbers come from.
        fits: config values of the models that it is for; empty if it fits any.
        settings: the hyperparameters that it sets.
    """

    name: str
    methods: tuple[str, ...]
    source: str
    fits: Mapping[str, Any]
    settings: Mapping[str, Any]

    def suits(self, config: Mapping[str, Any]) -> bool:
        """Whether `config` has every value that the preset names."""
        return bool(self.fits) and all(config.get(key) == value for key, value in self.fits.items())


@dataclass(frozen=True)
class Settings:
    """Checked hyperparameters, and for each field where its value came from."""

    hparams: HyperParams
    origin: Mapping[str, str]


def presets_of(spec: MethodSpec) -> list[Preset]:
    """The presets that ship with the method's plugin, by name.

    Raises:
        SettingError: a preset file is malformed.
        PluginError: the package that holds them cannot be imported.
    """
    if not spec.presets:
        return []
    try:
        folder = importlib.resources.files(spec.presets)
    except Exception as error:  # a plugin's code runs here, and may fail in any way
        raise PluginError(
            f"The presets of {spec.name}, '{spec.presets}', cannot be imported: "
            f"{import_problem(error)}."
        ) from error
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    presets = [_read_preset(f.name, f.read_text(encoding="utf-8")) for f in files]
    return [p for p in presets if spec.name in p.methods]


def _read_preset(name: str, text: str) -> Preset:
    data = _read_mapping(name, text)
    unknown = set(data) - {"methods", "source", "fits", "settings"}
    if unknown or not {"methods", "source", "settings"} <= set(data):
        raise SettingError(f"Preset {name}: the keys are methods, source, fits and settings.")
    methods, source, settings = data["methods"], data["source"], data["settings"]
    fits = data.get("fits") or {}
    if not isinstance(methods, list) or not methods or not all(isinstance(m, str) for m in methods):
        raise SettingError(f"Preset {name}: `methods` is no list of names, such as [rome].")
    if not isinstance(source, str):
        raise SettingError(f"Preset {name}: `source` is no text.")
    for key, value in (("fits", fits), ("settings", settings)):
        if not isinstance(value, dict):
            raise SettingError(f"Preset {name}: `{key}` is no mapping; write KEY: VALUE lines.")
    return Preset(name.removesuffix(".yaml"), tuple(methods), source, fits, settings)


def parse_settings(pairs: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """`KEY=VALUE` pairs of an option as a mapping; values are read as YAML.

    Raises:
        SettingError: a pair lacks its `=`, or the value is not YAML.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise SettingError(f"{option} {pair!r}: write KEY=VALUE, for example {option} layer=5.")
        try:
            settings[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: 2024-13-45 is read as a date
            problem = " ".join(str(error).split())
            raise SettingError(
                f"{option} {pair!r}: {value!r} is not a value ({problem})."
            ) from None
    return settings


def resolve(
    spec: MethodSpec,
    *,
    preset: str | None = None,
    file: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Settings:
    """Hyperparameters of a method: preset < file < settings.

    Without a preset's name, the preset that suits the model's `config` is taken, if there is one.
    A file holds settings, or is itself a preset, as `kedit tune` writes it.

    Raises:
        SettingError: unknown preset or key, or a value out of bounds.
        MissingSettingError: a value is missing, and no preset suits the model.
    """
    cls: type[HyperParams] = load_target(spec.hparams)
    presets = presets_of(spec)
    layers: list[tuple[str, Mapping[str, Any]]] = [(spec.name, spec.defaults)]
    chosen = _choose(spec, presets, preset, config)
    if chosen is not None:
        layers.append((f"preset {chosen.name}", chosen.settings))
    if file is not None:
        layers.append((str(file), _read_file(file, spec)))
    if settings:
        layers.append(("set", settings))

    values: dict[str, Any] = {}
    origin = dict.fromkeys(cls.model_fields, "default")
    for where, layer in layers:
        for key in layer:
            if key not in cls.model_fields:
                raise SettingError(
                    f"Unknown setting '{key}' of {spec.name} ({where}). "
                    f"{did_you_mean(str(key), cls.model_fields)}"
                )
        values.update(layer)
        origin.update(dict.fromkeys(layer, where))
    return Settings(_build(cls, spec, values, origin, presets), origin)


def _choose(
    spec: MethodSpec,
    presets: Sequence[Preset],
    name: str | None,
    config: Mapping[str, Any] | None,
) -> Preset | None:
    if name is None:
        return next((p for p in presets if config and p.suits(config)), None)
    for preset in presets:
        if preset.name == name:
            return preset
    known = [p.name for p in presets]
    raise SettingError(f"{spec.name} has no preset '{name}'. {did_you_mean(name, known)}")


def _build(
    cls: type[HyperParams],
    spec: MethodSpec,
    values: Mapping[str, Any],
    origin: Mapping[str, str],
    presets: Sequence[Preset],
) -> HyperParams:
    try:
        return cls(**values)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
    key = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "missing":
        names = ", ".join(p.name for p in presets)
        raise MissingSettingError(
            f"{spec.name} needs a value for '{key}', and no preset of it fits this model. Give "
            f"--set {key}=…" + (f", or choose a preset: {names}." if names else ".")
        )
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if problem["type"] == "tuple_type" and isinstance(problem["input"], int | float | str):
        message = f"input should be a list; write [{problem['input']}]"
    where = f" ({origin[key]})" if key in origin else ""
    given = f" = {problem['input']!r}" if key else ""
    raise SettingError(f"Setting '{key or spec.name}'{given} of {spec.name}{where}: {message}.")


def _read_file(path: Path, spec: MethodSpec) -> Mapping[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"The settings file {path} cannot be read: {error}.") from None
    data = _read_mapping(str(path), text)
    if not {"methods", "settings"} <= set(data):
        return data
    preset = _read_preset(str(path), text)
    if spec.name not in preset.methods:
        raise SettingError(f"{path} is a preset of {', '.join(preset.methods)}, not {spec.name}.")
    return preset.settings


def _read_mapping(name: str, text: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise SettingError(f"{name} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(data, dict):
        raise SettingError(f"{name} is no mapping. Write one 'key: value' per line.")
    return data
