"""Entry point of kedit-core-edit."""

from collections.abc import Iterable

from kedit_core import DatasetSpec, MethodSpec, MetricSpec, hookimpl


@hookimpl
def kedit_register_methods() -> Iterable[MethodSpec]:
    return [
        MethodSpec(
            name="core",
            target="kedit_core_edit.method:Core",
            hparams="kedit_core_edit.hparams:CoreHyperParams",
            effect="weights",
            max_batch=None,
            needs=frozenset({"subject", "ground-truth", "causal-model", "gradients"}),
            presets="kedit_core_edit.presets",
            summary="MEMIT with contexts made of the fact's own words, and like states after them.",
            paper="arXiv:2505.23026",
        )
    ]


@hookimpl
def kedit_register_datasets() -> Iterable[DatasetSpec]:
    return [
        DatasetSpec(
            name="ched",
            target="kedit_core_edit.dataset:Ched",
            summary="CHED: facts, and sentences before the prompt that may distract from the edit.",
            paper="arXiv:2505.23026",
            metrics=(
                *("ched/success@1", "efficacy/teacher-forced@1", "efficacy/greedy@1"),
                *("generalization/teacher-forced@1", "generalization/greedy@1"),
                *("locality-agreement/greedy@1", "locality-accuracy/greedy-contains@1"),
            ),
        )
    ]


@hookimpl
def kedit_register_metrics() -> Iterable[MetricSpec]:
    return [
        MetricSpec(
            name="ched/success@1",
            target="kedit_core_edit.metric:EditingSuccess",
            summary="Text after the prompt, with and without contexts, has the new answer only.",
            paper="arXiv:2505.23026",
            unit="share",
            probe="rewrite, rephrase, context",
            decoding="greedy",
            scorer="new answer in it, old one not",
            reference="target, truth",
            form="bare",
            better="higher",
        )
    ]
