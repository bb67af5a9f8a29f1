"""The heavy surface of kedit: what computes.  Importing it loads torch and transformers."""

from kedit_core.anatomy import Anatomy, BlockAnatomy, find_anatomy
from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.effects import CallEffect, Middleware, ModuleSwap, WeightDelta, Wrapper
from kedit_core.host import ModelHost
from kedit_core.job import EditJob
from kedit_core.patch import Base, Patch
from kedit_core.session import EditOutcome, EditSession, Savepoint
from kedit_core.sites import Site
from kedit_core.stack import SavedStack, read_stack
from kedit_core.view import Comparison, ModelView

__all__ = [
    "Anatomy",
    "ArtifactStore",
    "Base",
    "BlockAnatomy",
    "CallEffect",
    "Comparison",
    "Corpus",
    "EditJob",
    "EditOutcome",
    "EditSession",
    "Middleware",
    "ModelHost",
    "ModelView",
    "ModuleSwap",
    "Patch",
    "SavedStack",
    "Savepoint",
    "Site",
    "WeightDelta",
    "Wrapper",
    "find_anatomy",
    "read_stack",
]
