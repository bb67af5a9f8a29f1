"""Names with settings, `jsonl:prompt=question,target_new=answer`, and what they make."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kedit_core.errors import DataError, PluginError, SettingError, did_you_mean
from kedit_core.paths import expanded
from kedit_core.records import HUB, LeftOut, Source
from kedit_core.spec import DatasetSpec, Spec

if TYPE_CHECKING:
    from kedit_core.plugins import Catalog
    from kedit_core.request import EditCase, Probe

# What stands between commas; those in a list (of lists), a mapping and a quoted value do not count.
_PAIR = re.compile(r"""(?:\[(?:\[[^]]*\]|[^]])*\]|\{[^}]*\}|=\s*(?:"[^"]*"|'[^']*')|[^,])+""")


def split_named(text: str) -> tuple[str, dict[str, str]]:
    """A name and its settings as they are written.

    Commas part the settings, outside brackets, braces and quotes.

    Raises:
        SettingError: a setting has no value or is given twice.
    """
    name, _, rest = text.partition(":")
    settings: dict[str, str] = {}
    for pair in _PAIR.findall(rest):
        key, equals, value = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise SettingError(f"'{pair}' in '{text}' is no setting. Write {name}:KEY=VALUE.")
        if key in settings:
            raise SettingError(f"'{key}' is given twice in '{text}'.")
        settings[key] = value.strip()
    return name.strip(), settings


def create(spec: Spec, settings: Mapping[str, str]) -> Any:
    """What the spec points to, made with these keyword settings.

    Values are read as YAML, except where the parameter is annotated as a text or a number.

    Raises:
        SettingError: a setting is unknown, missing, or refused.
    """
    target = spec.load()
    known = {
        name: parameter
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }
    for key in settings:
        if key not in known:
            raise SettingError(f"'{spec.name}' has no setting '{key}'. {did_you_mean(key, known)}")
    missing = [n for n, p in known.items() if p.default is p.empty and n not in settings]
    if missing:
        raise SettingError(
            f"'{spec.name}' needs the setting '{missing[0]}': {spec.name}:{missing[0]}=…"
        )
    try:
        return target(**{k: _read(v, known[k].annotation) for k, v in settings.items()})
    except (TypeError, ValueError) as error:
        raise SettingError(f"'{spec.name}' refuses its settings: {error}.") from error


def read_dataset(
    catalog: Catalog, text: str, path: str | None
) -> tuple[DatasetSpec, Iterator[EditCase | Probe | LeftOut]]:
    """The dataset of a name with settings, and what it yields.

    Raises:
        DataError: it needs a path, or the path does not exist.
        UnknownNameError, SettingError: the name or a setting is wrong.
        PluginError: the dataset's class cannot be read from.
    """
    name, settings = split_named(text)
    spec = catalog.dataset(name)
    if spec.needs_path and path is None:
        raise DataError(f"The dataset '{name}' needs its file or folder.")
    source: Source | None = path
    if path is not None and not path.startswith(HUB):
        source = expanded(path)
        if not source.exists():
            raise DataError(f"{path} does not exist. Give the dataset's file or folder.")
    read = getattr(create(spec, settings), spec.holds, None)
    if read is None:
        raise PluginError(f"'{name}' is no dataset: '{spec.target}' has no {spec.holds}(source).")
    return spec, read(source)


def _read(value: str, annotation: Any) -> Any:
    """A setting's value; `ValueError` where it is no number or switch and should be one."""
    kind = inspect.formatannotation(annotation).strip("'")
    if kind in ("str", "str | None"):
        is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        return value[1:-1] if is_quoted else value
    if kind in ("int", "float"):
        return int(value) if kind == "int" else float(value)
    import yaml

    try:
        found = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):  # ValueError: of 2024-13-45
        found = value
    if kind == "bool" and not isinstance(found, bool):
        raise ValueError(f"'{value}' is neither true nor false")
    return found
