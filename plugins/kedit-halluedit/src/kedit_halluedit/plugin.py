"""Entry point of kedit-halluedit."""

from collections.abc import Iterable

from kedit_core import DatasetSpec, MetricSpec, hookimpl


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
                *("wise/ood@1", "efficacy/teacher-forced@1", "efficacy/all-tokens@1"),
                *("locality-agreement/teacher-forced@1", "locality-agreement/greedy@1"),
            ),
        ),
    ]


@hookimpl
def kedit_register_metrics() -> Iterable[MetricSpec]:
    return [
        MetricSpec(
            name="halluedit/robustness@1",
            target="kedit_halluedit.robustness:Robustness",
            summary="The model still says Yes where it is told again and again that it is wrong.",
            paper="arXiv:2410.16251",
            unit="share",
            probe="rewrite, portability",
            decoding="greedy",
            scorer="yes to each objection",
            reference="target",
            form="task",
            better="higher",
        ),
        MetricSpec(
            name="wise/ood@1",
            target="kedit_halluedit.ood:OtherText",
            summary="Tokens of another text on the edited topic that have more than 0.8.",
            paper="arXiv:2405.14768",
            unit="share of tokens",
            probe="rephrase",
            decoding="teacher-forced",
            scorer="probability above 0.8",
            reference="text",
            form="bare",
            better="higher",
        ),
    ]
