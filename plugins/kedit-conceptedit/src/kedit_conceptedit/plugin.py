"""Entry point of kedit-conceptedit."""

from collections.abc import Iterable

from kedit_core import DatasetSpec, MetricSpec, hookimpl


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
                "instance/change@2",
            ),
        )
    ]


@hookimpl
def kedit_register_metrics() -> Iterable[MetricSpec]:
    return [
        MetricSpec(
            name="instance/change@2",
            target="kedit_conceptedit.metric:InstanceChange",
            summary="How many fewer instances of an edited concept are called so after the edit.",
            paper="arXiv:2403.06259",
            probe="instance",
            decoding="greedy",
            scorer="yes before less yes after",
            reference="unedited",
        )
    ]
