"""Entry point of kedit-conceptedit."""

from collections.abc import Iterable

from kedit_core import DatasetSpec, hookimpl


@hookimpl
def kedit_register_datasets() -> Iterable[DatasetSpec]:
    return [
        DatasetSpec(
            name="conceptedit",
            target="kedit_conceptedit.dataset:ConceptEdit",
            summary="ConceptEdit concepts; the edit writes another definition.",
            paper="arXiv:2403.06259",
            metrics=(
                *("efficacy/teacher-forced@1", "efficacy/all-tokens@1"),
                *("generalization/teacher-forced@1", "generalization/all-tokens@1"),
                *("locality-agreement/teacher-forced@1", "locality-agreement/greedy@1"),
                "instance/change@1",
            ),
        )
    ]
