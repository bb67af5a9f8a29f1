"""`EditJob`: what a method is given."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.effects import WeightDelta
from kedit_core.host import ModelHost
from kedit_core.patch import Patch
from kedit_core.request import EditRequest, repeats
from kedit_core.sites import Site

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EditJob:
    """One call of a method; it tells of requests that stand twice, and of those that disagree.

    Attributes:
        host: the model with all earlier edits in force.  Weights are frozen; hooks, flags and
            gradients that a method leaves behind are cleaned up after it.
        requests: the facts to write; as many as the method's spec allows.
        artifacts: where dear things are kept.
        fingerprint: of the unedited model, for artifact keys.
        corpus: text for statistics.
        seed: from which `generator` makes the random numbers.
        earlier: the method's own patches in force, oldest first.
        state: what the latest of them left, or nothing.
        unedited: a context in which the model is as it was before any edit.
        is_edited: whether any edit is in force, of whichever method.
        overlays: gives the changes that now lie over the weights.
    """

    host: ModelHost
    requests: tuple[EditRequest, ...]
    artifacts: ArtifactStore
    fingerprint: str
    corpus: Corpus
    seed: int
    unedited: Callable[[], AbstractContextManager[None]]
    earlier: tuple[Patch, ...] = ()
    is_edited: bool = False
    overlays: Callable[[], Sequence[WeightDelta]] = tuple

    def __post_init__(self) -> None:
        asked = Counter((request.text, request.target_new) for request in self.requests)
        for what, texts in repeats(asked).items():
            log.warning("%s in one batch: %d, first %r.", what.capitalize(), len(texts), texts[0])

    @property
    def state(self) -> Mapping[str, Tensor]:
        return next((patch.state for patch in reversed(self.earlier) if patch.state), {})

    def weight(self, site: Site) -> Tensor:
        """The matrix (d_out, d_in) with all that is in force now, overlays too; not to write to."""
        weight = self.host.weight(site)
        for delta in self.overlays():
            if delta.site == site:
                weight = weight + delta.to(weight.device).dense()
        return weight

    def generator(self) -> torch.Generator:
        """A fresh CPU generator for this job's seed."""
        return torch.Generator().manual_seed(self.seed)
