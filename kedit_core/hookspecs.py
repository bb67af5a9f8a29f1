"""All hooks on one screen.

A plugin is a module named in the entry-point group `kedit.plugins.v1`.  It implements any of
these with `@hookimpl`.  The number in the group's name is the API's version: within v1 hooks
and fields are only added.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

from kedit_core.spec import (
    ArchitectureSpec,
    ClassifierSpec,
    CommandSpec,
    DatasetSpec,
    EffectSpec,
    MethodSpec,
    MetricSpec,
    ModelSpec,
    Spec,
)

if TYPE_CHECKING:
    from kedit_core.patch import Patch
    from kedit_core.request import EditCase, EditRequest

PROJECT = "kedit"
GROUP = "kedit.plugins.v1"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class EditFinished:
    """One patch was applied: by which method, for which requests, in how many seconds."""

    method: str
    requests: tuple[EditRequest, ...]
    patch: Patch
    seconds: float


@dataclass(frozen=True)
class CaseMeasured:
    """One case was scored; `scores` maps metric ids, with `[PART]` for a part, to values."""

    method: str
    case: EditCase
    scores: dict[str, float]


@dataclass(frozen=True)
class CellFinished:
    """One benchmark cell is complete; `result` is what its `result.json` holds."""

    folder: str
    result: dict[str, Any]


@hookspec
def kedit_register_methods() -> Iterable[MethodSpec]:  # type: ignore[empty-body]
    """Editing methods.  All registration hooks are called once, when the catalog is built."""


@hookspec
def kedit_register_datasets() -> Iterable[DatasetSpec]:  # type: ignore[empty-body]
    """Dataset adapters."""


@hookspec
def kedit_register_metrics() -> Iterable[MetricSpec]:  # type: ignore[empty-body]
    """Metrics."""


@hookspec
def kedit_register_classifiers() -> Iterable[ClassifierSpec]:  # type: ignore[empty-body]
    """Classifiers of texts, for metrics that need one."""


@hookspec
def kedit_register_effects() -> Iterable[EffectSpec]:  # type: ignore[empty-body]
    """Effect types: wrapped modules and call middleware."""


@hookspec
def kedit_register_models() -> Iterable[ModelSpec]:  # type: ignore[empty-body]
    """Models that come with a package."""


@hookspec
def kedit_register_architectures() -> Iterable[ArchitectureSpec]:  # type: ignore[empty-body]
    """Overrides for model families whose structure is not found by itself."""


@hookspec
def kedit_register_commands() -> Iterable[CommandSpec]:  # type: ignore[empty-body]
    """Commands that join `kedit`."""


@hookspec
def kedit_edit_finished(event: EditFinished) -> None:
    """Observe an edit after its patch was applied.

    Called once per patch, in the order of application, while the edit is in force.  An
    exception is logged with the plugin's name and does not stop the edit.
    """


@hookspec
def kedit_case_measured(event: CaseMeasured) -> None:
    """Observe the scores of one case, right after they are known; errors as above."""


@hookspec
def kedit_cell_finished(event: CellFinished) -> None:
    """Observe a finished benchmark cell; errors as above."""


REGISTRATIONS: dict[str, type[Spec]] = {
    "kedit_register_methods": MethodSpec,
    "kedit_register_datasets": DatasetSpec,
    "kedit_register_metrics": MetricSpec,
    "kedit_register_classifiers": ClassifierSpec,
    "kedit_register_effects": EffectSpec,
    "kedit_register_models": ModelSpec,
    "kedit_register_architectures": ArchitectureSpec,
    "kedit_register_commands": CommandSpec,
}
