"""The command `kedit`."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from kedit_core.cli.lists import LISTS
from kedit_core.errors import KEditError, last_call, reason_of

INTERRUPTED = 130  # what a shell calls the end by SIGINT
_OURS = {"kedit_core", "kedit_bench"}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code.

    0 done, 1 the edit, the check or a plugin failed, 2 wrong use, 130 interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_ours_or_serious)
    logging.getLogger().setLevel(logging.DEBUG if debug else logging.INFO)
    if not sys.stderr.isatty():
        # Bars of the libraries below; kedit's own are silent by themselves.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    # Read when torch is loaded. Threads that spin for long take the core from each other where
    # other work runs too (docs/speed.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    try:
        if given and given[0] in LISTS and set(given[1:]) <= {"--json"}:
            LISTS[given[0]]("--json" in given)
            sys.stdout.flush()
            sys.exit(0)
        from kedit_core.cli.app import build_app

        build_app()(given, prog_name="kedit")
    except KEditError as error:
        if debug:
            raise
        sys.stderr.write(f"kedit: {error}\n")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:
            raise
        then = " The same command goes on where it was." if _keeps_work(given) else ""
        sys.stderr.write(f"kedit: Stopped.{then}\n")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:  # a plugin's code runs here, and may fail in any way
        if debug:
            raise
        sys.stderr.write(f"kedit: {_failure(error)} Add --debug to see the traceback.\n")
        sys.exit(1)


def _failure(error: Exception) -> str:
    """Which plugin failed, or kedit itself, and where: a sentence about an error of no kind."""
    from kedit_core.plugins import discover

    plugins: list[tuple[str, Any]] = discover().manager.list_name_plugin()
    names = {module.__name__.partition(".")[0]: name for name, module in plugins}
    package, where = last_call(error, names.keys() - _OURS, _OURS)
    who = "kedit" if package in _OURS else names.get(package, package)
    return f"{who} failed in {where} ({type(error).__name__}: {reason_of(error)})."


def _keeps_work(given: list[str]) -> bool:
    """Whether an interrupted command has kept what it had done."""
    command, options = next(iter(given), ""), {a.partition("=")[0] for a in given}
    kept_with = {"edit": "--batch", "eval": "--out"}
    return command in ("tune", "prepare") or kept_with.get(command) in options


def _is_ours_or_serious(record: logging.LogRecord) -> bool:
    """What kedit and its plugins say, and warnings of everybody else."""
    return record.name.startswith("kedit") or record.levelno >= logging.WARNING
