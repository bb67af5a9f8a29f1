"""Entry point of kedit-elken."""

from collections.abc import Iterable

from kedit_core import DatasetSpec, hookimpl


@hookimpl
def kedit_register_datasets() -> Iterable[DatasetSpec]:
    return [
        DatasetSpec(
            name="elken",
            target="kedit_elken.dataset:facts",
            summary="ELKEN: the edit writes the facts that an event changes.",
            paper="arXiv:2402.13093",
            licence="CC BY-NC-SA 4.0",
        ),
        DatasetSpec(
            name="elken-event",
            target="kedit_elken.dataset:event",
            summary="ELKEN: the edit writes the event itself, as its authors do.",
            paper="arXiv:2402.13093",
            licence="CC BY-NC-SA 4.0",
            metrics=(
                *("efficacy/teacher-forced@1", "efficacy/all-tokens@1"),
                *("portability/teacher-forced@1", "portability/all-tokens@1"),
                *("portability/greedy@1", "locality-agreement/teacher-forced@1"),
                "locality-agreement/greedy@1",
            ),
        ),
    ]
