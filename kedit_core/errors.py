"""Everything that a user can cause.  Each error is one sentence that stands alone."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Collection, Iterable
from pathlib import Path


class KEditError(Exception):
    """Base of all errors whose message is meant for the user."""

    exit_code = 2


class RequestError(KEditError):
    """An edit request, a probe or a file of them is malformed."""


class SettingError(KEditError):
    """A hyperparameter, a preset or a settings file is wrong."""


class MissingSettingError(SettingError):
    """A hyperparameter has no value, and no preset gives one."""


class UnknownNameError(KEditError):
    """A name is not in the catalog."""


class PluginError(KEditError):
    """A plugin is broken, ambiguous or not installed."""


class ModelError(KEditError):
    """A model or tokenizer cannot be loaded or lacks something that is needed."""


class SiteError(ModelError):
    """A layer, module or matrix does not exist in this model."""


class PatchError(KEditError):
    """A saved patch or session is malformed, or belongs to other weights."""


class ArtifactError(KEditError):
    """A stored artifact or a corpus for one cannot be used."""


class DataError(KEditError):
    """A dataset cannot be read."""


class EditError(KEditError):
    """An edit was tried and failed; the model is as it was before."""

    exit_code = 1


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, or the error itself where it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def last_call(error: BaseException, *groups: Collection[str]) -> tuple[str, str]:
    """Package, and file with line, of the last call before an error: in the first of the groups of
    packages that has one, or else of all."""
    calls = [
        (
            str(frame.f_globals.get("__name__", "")).partition(".")[0],
            f"{Path(frame.f_code.co_filename).name}:{line}",
        )
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    found = ([call for call in calls if call[0] in group] for group in groups)
    return next(filter(None, found), calls)[-1]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word closest to `word`, or None if nothing is close."""
    lowered = {k.lower(): k for k in known}
    found = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.5)
    return lowered[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`Did you mean 'x'?`, or the list of what there is."""
    known = sorted(known)
    best = nearest(word, known)
    if best is not None:
        return f"Did you mean '{best}'?"
    return f"Known: {', '.join(known)}." if known else "None are known."
