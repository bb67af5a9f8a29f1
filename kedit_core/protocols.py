"""What plugins implement.  Protocols: nothing needs to be inherited."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from kedit_core.ask import Answers, Question
    from kedit_core.job import EditJob
    from kedit_core.patch import Patch
    from kedit_core.records import LeftOut, Source
    from kedit_core.request import EditCase, Probe
    from kedit_core.session import EditSession


@dataclass(frozen=True)
class CaseScore:
    """What a metric says of one case: a value, and over how many probes it was taken."""

    value: float
    probes: int = 1


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

    def cases(self, source: Source | None = None) -> Iterator[EditCase | LeftOut]:
        """Yield the cases of a file, folder or `hub:` name, or of the data that ships with it.

        A row that makes no case is yielded as `LeftOut`, in its place; the file's order is kept.
        """
        ...


@runtime_checkable
class ProbeSource(Protocol):
    """Probes that suit any edit; created without arguments."""

    def probes(self, source: Source | None = None) -> Iterator[Probe | LeftOut]:
        """Yield the probes of a file, folder or `hub:` name, in its order."""
        ...


@runtime_checkable
class Metric(Protocol):
    """A metric of single cases; created with its settings as keyword arguments.

    It may also have

    - `details`, a text that becomes part of its scores' protocol (for example the name of a model
      that it asks);
    - `followups(case, answers)`, further questions about what one model, the edited or the
      unedited one, has answered: the unedited model is asked, and its answers join `before`;
    - `combine(means)`, which makes figures of the means over cases: a mapping from parts to means
      becomes a mapping from further parts to values.  A value called `PART.name` counts the cases
      of PART, one called `name` those of the headline.
    """

    def questions(self, case: EditCase) -> Iterable[Question]:
        """What must be asked, of the unedited and of the edited model."""
        ...

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """Scores of one case by part: "" for the headline, others for families of probes.

        Empty where the case has nothing that this metric measures.
        """
        ...


@runtime_checkable
class ModelMetric(Protocol):
    """A metric of the model as a whole; created with its settings as keyword arguments."""

    def measure(self, session: EditSession) -> Mapping[str, float]:
        """Figures by part: "" for the headline."""
        ...


@runtime_checkable
class Classifier(Protocol):
    """A classifier of texts; created with its settings as keyword arguments."""

    def classify(self, texts: Sequence[str]) -> list[Mapping[str, float]]:
        """For each text the probability of each label."""
        ...
