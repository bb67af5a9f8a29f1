"""Entry point of kedit-halluedit."""

from collections.abc import Iterable

from kedit_core import DatasetSpec, hookimpl


@hookimpl
def kedit_register_datasets() -> Iterable[DatasetSpec]:
    return [
        DatasetSpec(
            name="halluedit",
            target="kedit_halluedit.dataset:HalluEdit",
            summary="HalluEditBench: questions that a model answers wrongly, in eleven forms.",
            paper="arXiv:2410.16251",
            licence="MIT",
        ),
        DatasetSpec(
            name="wise-hallucination",
            target="kedit_halluedit.wise:hallucination",
            summary="WISE's hallucination set: the true next sentence of a biography.",
            paper="arXiv:2405.14768",
            licence="MIT",
            metrics=("efficacy/nll@1", "locality-agreement/teacher-forced@1"),
        ),
        DatasetSpec(
            name="wise-temporal",
            target="kedit_halluedit.wise:temporal",
            summary="WISE's temporal set: a paragraph on a topic, given its first words.",
            paper="arXiv:2405.14768",
            licence="MIT",
            metrics=(
                *("efficacy/teacher-forced@1", "efficacy/all-tokens@1"),
                *("locality-agreement/teacher-forced@1", "locality-agreement/greedy@1"),
            ),
        ),
    ]
