"""`kedit new-method`, `new-dataset`, `new-metric`: a small plugin that works as it is."""

from __future__ import annotations

import importlib.resources
import importlib.util
import re
from collections.abc import Iterator, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import Literal

from kedit_core import __version__
from kedit_core.errors import PluginError
from kedit_core.files import new_folder
from kedit_core.plugins import discover, first_party

Kind = Literal["method", "dataset", "metric"]

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_LONGEST = 30  # so that no line of the rendered files becomes too long
_SUFFIX = ".jinja"


def new_plugin(kind: Kind, name: str, parent: Path) -> Path:
    """Write the folder `kedit-NAME` with a plugin that offers a method, dataset or metric.

    Args:
        kind: of the plugin.
        name: of the method or dataset, or the quantity in the metric's name; lower-case words with
            hyphens between them.
        parent: folder in which to make it.

    Returns:
        The new folder.

    Raises:
        PluginError: the name is malformed or taken, the folder exists, or the disk refuses.
    """
    _check_name(kind, name)
    folder = Path(parent) / f"kedit-{name}"
    if folder.exists():
        raise PluginError(f"{folder} exists already. Choose another name or another folder.")
    try:
        with new_folder(folder) as temporary:
            for part in ("any", kind):
                _render(part, _words(kind, name), temporary)
    except OSError as error:
        raise PluginError(f"{folder} cannot be written: {error}.") from None
    return folder


def _check_name(kind: Kind, name: str) -> None:
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        raise PluginError(
            f"'{name}' is no name for a {kind}. Write at most {_LONGEST} lower-case letters and "
            f"digits, with single hyphens between words, such as my-{kind}."
        )
    words = _words(kind, name)
    taken = {offer for plugin in discover().plugins for offer in plugin.offers}
    taken |= {" ".join(offer) for offer in first_party()}
    if f"{kind} {name}" in {offer.partition("/")[0] for offer in taken}:
        raise PluginError(f"There is a {kind} '{name}' already. Choose another name.")
    is_ours = words["distribution"] in first_party().values()
    if is_ours or importlib.util.find_spec(words["package"]) is not None:
        raise PluginError(
            f"The package {words['distribution']} exists already. Choose another name."
        )


def _words(kind: Kind, name: str) -> dict[str, str]:
    """What the template calls things."""
    return {
        "kind": kind,
        "name": name,
        "distribution": f"kedit-{name}",
        "package": f"kedit_{name.replace('-', '_')}",
        "camel": "".join(word.capitalize() for word in name.split("-")),
        "requirement": f"kedit>={__version__},<{int(__version__.partition('.')[0]) + 1}",
    }


def _render(part: str, words: Mapping[str, str], folder: Path) -> None:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    template = importlib.resources.files("kedit_core") / "_template" / part
    for path, file in _files(template, PurePosixPath()):
        target = folder / environment.from_string(str(path)).render(words)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = environment.from_string(file.read_text(encoding="utf-8")).render(words)
        target.write_text(text, encoding="utf-8")


def _files(
    folder: Traversable, under: PurePosixPath
) -> Iterator[tuple[PurePosixPath, Traversable]]:
    """The template's files with their paths, without the template's suffix."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry, under / entry.name)
        elif entry.name.endswith(_SUFFIX):
            yield under / entry.name.removesuffix(_SUFFIX), entry
