"""Finding a model by its name, and what its config says, before torch is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from kedit_core.errors import ModelError, UnknownNameError
from kedit_core.paths import expanded, is_path
from kedit_core.plugins import Catalog
from kedit_core.spec import ModelSpec

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")


def check(name: str, catalog: Catalog) -> None:
    """Check that `name` is a registered model, a complete folder, or shaped like a hub id.

    Raises:
        ModelError: a folder without config or tokenizer, or a path that is no folder.
        UnknownNameError: a name that nothing has.
    """
    if _registered(name, catalog):
        return
    path = expanded(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"The folder {path} has no config.json, so it is no model.")
        if not any((path / file).is_file() for file in _TOKENIZER_FILES):
            raise ModelError(
                f"The model folder {path} has no tokenizer. Save it there with "
                f"`tokenizer.save_pretrained('{path}')`."
            )
    elif is_path(name):
        raise ModelError(f"The model folder {path} does not exist.")
    elif "/" not in name:
        try:
            catalog.model(name)
        except UnknownNameError as error:
            raise UnknownNameError(
                f"{error} '{name}' is no folder either, and a hub id has the form owner/name."
            ) from None
    elif not _HUB_ID.fullmatch(name):
        raise ModelError(f"'{name}' is no folder, and a hub id has the form owner/name.")


def locate(name: str, catalog: Catalog) -> str:
    """The folder or hub id to load `name` from; raises as `check`."""
    check(name, catalog)
    if spec := _registered(name, catalog):
        return str(spec.load()())
    path = expanded(name)
    return str(path) if path.is_dir() else name


def known_config(name: str, catalog: Catalog) -> dict[str, Any] | None:
    """Config values of a model that can be told without loading it, or None.

    Raises:
        ModelError: the folder's config.json is not JSON.
    """
    if spec := _registered(name, catalog):
        return dict(spec.config)
    file = expanded(name) / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON ({error}).") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} is no mapping, so it is no model's config.")
    return config_facts(config)


def _registered(name: str, catalog: Catalog) -> ModelSpec | None:
    return next((spec for spec in catalog.all(ModelSpec) if spec.name == name), None)


def config_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config under the names that presets use: GPT-2's older words are translated."""
    older = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_inner": "intermediate_size",
    }
    facts = {older.get(key, key): value for key, value in config.items()}
    text = facts.get("text_config")
    return facts | config_facts(text) if isinstance(text, Mapping) else facts
