"""Options that commands share, and what they check before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kedit_core.paths import expanded, is_path

_FILES = (".txt", ".md", ".npz")  # a dataset's name does not end so

if TYPE_CHECKING:
    from kedit_core.editing import EditSession
    from kedit_core.plugins import Catalog
    from kedit_core.spec import MethodSpec

Model = Annotated[
    str, typer.Option("--model", "-m", help="Name from `kedit list-models`, folder or hub id.")
]
Method = Annotated[str, typer.Option("--method", help="Name from `kedit list-methods`.")]
Preset = Annotated[str | None, typer.Option(help="Name from `kedit presets METHOD`.")]
HparamsFile = Annotated[Path | None, typer.Option("--hparams", help="YAML file of settings.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting; repeatable.")
]
Device = Annotated[
    str | None, typer.Option(help="Where the model goes; 'auto' spreads it. [default: the GPU]")
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: the checkpoint's.")]
Seed = Annotated[int, typer.Option(help="Of all random numbers.")]
CorpusOption = Annotated[
    str,
    typer.Option(
        "--corpus", help="Text for statistics: a file, a dataset's name, or 'self': generated."
    ),
]
Trust = Annotated[bool, typer.Option(help="Run code that comes with the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def check_settings(
    catalog: Catalog,
    spec: MethodSpec,
    model: str,
    preset: str | None,
    file: Path | None,
    pairs: Sequence[str] | None,
) -> dict[str, Any]:
    """Check model name and settings before torch is loaded; returns the settings of `--set`.

    A hub id's config is not known yet, so a missing value is not an error here.
    """
    from kedit_core.errors import MissingSettingError
    from kedit_core.hparams import parse_settings, resolve
    from kedit_core.models import check, known_config

    settings = parse_settings(pairs or ())
    check(model, catalog)
    config = known_config(model, catalog)
    try:
        resolve(spec, preset=preset, file=file, settings=settings, config=config)
    except MissingSettingError:
        if config is not None:
            raise
    return settings


def open_session(
    catalog: Catalog,
    model: str,
    *,
    device: str | None,
    dtype: str,
    trust_remote_code: bool = False,
    seed: int = 0,
    corpus: str = "self",
) -> EditSession:
    """Load the model; torch is loaded here."""
    _check_corpus(corpus)
    from kedit_core.editing import Corpus, EditSession, ModelHost

    quiet()
    host = ModelHost.load(
        model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, catalog=catalog
    )
    return EditSession(host, corpus=Corpus(corpus), seed=seed, catalog=catalog)


def _check_corpus(corpus: str) -> None:
    """Refuse a path where there is nothing; other names may be those of datasets.

    Raises:
        ArtifactError: names the path.
    """
    from kedit_core.errors import ArtifactError

    path = expanded(corpus)
    if (is_path(corpus) or path.suffix in _FILES) and not path.exists():
        raise ArtifactError(f"The corpus {path} does not exist.")


def quiet() -> None:
    """Silence the bars of transformers where nobody watches."""
    import sys

    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
