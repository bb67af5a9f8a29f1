"""The command line's application.  Heavy imports are inside the commands, after all that can fail
cheaply."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Annotated

import typer

from kedit_core import __version__
from kedit_core.cli import authors, data, edits, models, presets, trace
from kedit_core.cli.lists import LISTS
from kedit_core.cli.options import Json
from kedit_core.errors import PluginError
from kedit_core.plugins import discover
from kedit_core.spec import CommandSpec

log = logging.getLogger(__name__)


def build_app() -> typer.Typer:
    """The application; commands of plugins join it."""
    app = typer.Typer(
        name="kedit",
        help="Edit what a language model knows, and take every edit back bit for bit.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_start)
    for name, show in LISTS.items():
        app.command(name, help=show.__doc__)(_listing(show))
    for module in (presets, edits, models, trace, data, authors):
        module.register(app)
    _add_plugin_commands(app)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kedit {__version__}")
        raise typer.Exit


def _start(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show kedit's own."),
    ] = False,
) -> None:
    """What is given before a command."""


def _listing(show: Callable[[bool], None]) -> Callable[..., None]:
    def listing(as_json: Json = False) -> None:
        show(as_json)

    return listing


def _add_plugin_commands(app: typer.Typer) -> None:
    for spec in discover().all(CommandSpec):
        try:
            command = spec.load()
        except PluginError as error:
            log.warning("The command '%s' is left out: %s", spec.name, error)
            continue
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=spec.name, help=spec.summary)
        else:
            app.command(spec.name, help=spec.summary)(command)
