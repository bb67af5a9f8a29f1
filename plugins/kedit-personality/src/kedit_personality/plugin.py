"""Entry point of kedit-personality."""

from collections.abc import Iterable

from kedit_core import DatasetSpec, MetricSpec, hookimpl


@hookimpl
def kedit_register_datasets() -> Iterable[DatasetSpec]:
    return [
        DatasetSpec(
            name="personality",
            target="kedit_personality.dataset:Personality",
            summary="PersonalityEdit topics; the edit writes an opinion in the manner of a trait.",
            paper="arXiv:2310.02168",
            licence="MIT",
            metrics=("opinion/*", "personality/accuracy@*", "personality/tpei@*"),
        )
    ]


@hookimpl
def kedit_register_metrics() -> Iterable[MetricSpec]:
    return [
        MetricSpec(
            name="personality/accuracy@1",
            target="kedit_personality.metric:Accuracy",
            summary="Acc: a classifier finds the target trait in what the edited model writes.",
            paper="arXiv:2310.02168",
            unit="share",
            probe="generation",
            decoding="greedy",
            scorer="classifier, most probable trait",
            reference="target",
            form="bare",
            better="higher",
        ),
        MetricSpec(
            name="personality/tpei@1",
            target="kedit_personality.metric:Tpei",
            summary="TPEI: how much more of the target trait a classifier finds after the edit.",
            paper="arXiv:2310.02168",
            unit="nats",
            probe="generation",
            decoding="greedy",
            scorer="classifier, cross-entropy of the trait",
            reference="target, unedited",
            form="bare",
            better="higher",
        ),
    ]
