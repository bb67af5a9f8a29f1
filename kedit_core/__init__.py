"""The light surface of kedit: what describes and checks, without torch.

What computes is in `kedit_core.editing`.  Names that need pydantic are imported at first use, so
that a plugin's entry point costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kedit_core.errors import (
    ArtifactError,
    DataError,
    EditError,
    KEditError,
    ModelError,
    PatchError,
    PluginError,
    RequestError,
    SettingError,
    SiteError,
    UnknownNameError,
)
from kedit_core.hookspecs import (
    CaseMeasured,
    CellFinished,
    EditFinished,
    hookimpl,
    hookspec,
)
from kedit_core.sites import Site
from kedit_core.spec import (
    ArchitectureSpec,
    ClassifierSpec,
    CommandSpec,
    DatasetSpec,
    EffectSpec,
    MethodSpec,
    MetricSpec,
    ModelSpec,
)

if TYPE_CHECKING:
    from kedit_core.cases import Format, probe, read_cases, request_of
    from kedit_core.hparams import HyperParams
    from kedit_core.plugins import Catalog, discover
    from kedit_core.protocols import (
        CaseScore,
        Classifier,
        DatasetAdapter,
        EditMethod,
        Metric,
        ModelMetric,
        Preparable,
        ProbeSource,
    )
    from kedit_core.records import (
        LeftOut,
        Row,
        RowError,
        Source,
        UnfitRow,
        files_in,
        read_rows,
    )
    from kedit_core.request import EditCase, EditRequest, Probe, read_requests

__version__ = "0.1.0"

_LAZY = {
    "HyperParams": "kedit_core.hparams",
    "Catalog": "kedit_core.plugins",
    "discover": "kedit_core.plugins",
    "EditCase": "kedit_core.request",
    "EditRequest": "kedit_core.request",
    "Probe": "kedit_core.request",
    "read_requests": "kedit_core.request",
    "Format": "kedit_core.cases",
    "probe": "kedit_core.cases",
    "read_cases": "kedit_core.cases",
    "request_of": "kedit_core.cases",
    "LeftOut": "kedit_core.records",
    "Row": "kedit_core.records",
    "RowError": "kedit_core.records",
    "Source": "kedit_core.records",
    "UnfitRow": "kedit_core.records",
    "files_in": "kedit_core.records",
    "read_rows": "kedit_core.records",
    "ProbeSource": "kedit_core.protocols",
    "CaseScore": "kedit_core.protocols",
    "Classifier": "kedit_core.protocols",
    "ModelMetric": "kedit_core.protocols",
    "DatasetAdapter": "kedit_core.protocols",
    "EditMethod": "kedit_core.protocols",
    "Metric": "kedit_core.protocols",
    "Preparable": "kedit_core.protocols",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kedit_core' has no attribute '{name}'")


__all__ = [
    "ArchitectureSpec",
    "ArtifactError",
    "CaseMeasured",
    "CaseScore",
    "Catalog",
    "CellFinished",
    "Classifier",
    "ClassifierSpec",
    "CommandSpec",
    "DataError",
    "DatasetAdapter",
    "DatasetSpec",
    "EditCase",
    "EditError",
    "EditFinished",
    "EditMethod",
    "EditRequest",
    "EffectSpec",
    "Format",
    "HyperParams",
    "KEditError",
    "LeftOut",
    "MethodSpec",
    "Metric",
    "MetricSpec",
    "ModelError",
    "ModelMetric",
    "ModelSpec",
    "PatchError",
    "PluginError",
    "Preparable",
    "Probe",
    "ProbeSource",
    "RequestError",
    "Row",
    "RowError",
    "SettingError",
    "Site",
    "SiteError",
    "Source",
    "UnfitRow",
    "UnknownNameError",
    "discover",
    "files_in",
    "hookimpl",
    "hookspec",
    "probe",
    "read_cases",
    "read_requests",
    "read_rows",
    "request_of",
]
