"""What plugins implement.  Protocols: nothing needs to be inherited."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from kedit_core.job import EditJob
    from kedit_core.patch import Patch
    from kedit_core.request import EditCase
    from kedit_core.view import Answer


@runtime_checkable
class EditMethod(Protocol):
    """An editing method; created with its hyperparameters as the only argument."""

    def edit(self, job: EditJob) -> Patch:
        """Compute the patch for `job.requests`; the model comes back as it was found."""
        ...


@runtime_checkable
class Preparable(Protocol):
    """A method with something to make ahead: statistics, a trained editor, an index."""

    def prepare(self, job: EditJob) -> None:
        """Make what `edit` will need and store it in `job.artifacts`."""
        ...


@runtime_checkable
class DatasetAdapter(Protocol):
    """A dataset; created without arguments."""

    def cases(self, path: Path | None = None) -> Iterator[EditCase]:
        """Yield the cases of the file or folder `path`, or of the data that ships with it."""
        ...


@runtime_checkable
class Metric(Protocol):
    """A metric; created without arguments."""

    def score(
        self, case: EditCase, before: Sequence[Answer], after: Sequence[Answer]
    ) -> Mapping[str, float]:
        """Scores of one case from the answers to its probes, without and with the edit."""
        ...


@runtime_checkable
class Executor(Protocol):
    """Something that runs benchmark cells, given their folders."""

    def run(self, cells: Sequence[Path]) -> None:
        """Run the cells that are not finished; return when all are."""
        ...
