"""The command `kedit`.  Heavy imports are inside the commands, after all that can fail cheaply."""

from __future__ import annotations

import logging
import os
import sys

import typer

from kedit_core.cli import authors, edits, lists, models
from kedit_core.errors import KEditError, PluginError

log = logging.getLogger(__name__)


def build_app(with_plugins: bool = True) -> typer.Typer:
    """The application; commands of plugins join it."""
    app = typer.Typer(
        name="kedit",
        help="Edit what a language model knows, and take every edit back bit for bit.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    for module in (lists, edits, models, authors):
        module.register(app)
    if with_plugins:
        _add_plugin_commands(app)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code.

    0 done, 1 the edit or check failed, 2 wrong use.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("kedit_core", "kedit_bench", "kedit"):
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.INFO)
    if not sys.stderr.isatty():
        # Bars of the libraries below; kedit's own are silent by themselves.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    own = {"list-methods", "list-datasets", "list-metrics", "list-models", "plugins", "presets"}
    app = build_app(with_plugins=not (given and given[0] in own))
    try:
        app(given, prog_name="kedit")
    except KEditError as error:
        if debug:
            raise
        typer.echo(f"kedit: {error}", err=True)
        sys.exit(error.exit_code)


def _add_plugin_commands(app: typer.Typer) -> None:
    from kedit_core.plugins import discover
    from kedit_core.spec import CommandSpec

    for spec in discover().all(CommandSpec):
        try:
            app.command(spec.name, help=spec.summary)(spec.load())
        except PluginError as error:
            log.warning("The command '%s' is left out: %s", spec.name, error)
