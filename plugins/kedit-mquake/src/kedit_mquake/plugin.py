"""Entry point of kedit-mquake."""

from collections.abc import Iterable

from kedit_core import DatasetSpec, MetricSpec, hookimpl


@hookimpl
def kedit_register_datasets() -> Iterable[DatasetSpec]:
    return [
        DatasetSpec(
            name="mquake",
            target="kedit_mquake.dataset:MQuake",
            summary="One to four facts edited together, and multi-hop questions about them.",
            paper="arXiv:2305.14795",
            licence="MIT",
            metrics=(
                "tests/*",
                "efficacy/greedy-contains@1",
                "generalization/greedy-contains@1",
            ),
        )
    ]


@hookimpl
def kedit_register_metrics() -> Iterable[MetricSpec]:
    return [
        MetricSpec(
            name="multi-hop/few-shot@1",
            target="kedit_mquake.metric:few_shot",
            summary="A multi-hop question is answered after eight questions with answers.",
            paper="arXiv:2305.14795",
            unit="share",
            probe="portability",
            decoding="greedy",
            scorer="any question answered in the first line",
            reference="target",
            form="bare",
            better="higher",
        ),
        MetricSpec(
            name="multi-hop/chain@1",
            target="kedit_mquake.metric:chain",
            summary="A multi-hop question is answered after eight that were thought through.",
            paper="arXiv:2305.14795",
            unit="share",
            probe="portability",
            decoding="greedy",
            scorer="any question answered behind Answer:",
            reference="target",
            form="bare",
            better="higher",
        ),
    ]
