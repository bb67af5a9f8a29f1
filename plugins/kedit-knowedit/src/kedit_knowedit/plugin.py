"""Entry point of kedit-knowedit."""

from collections.abc import Iterable

from kedit_core import DatasetSpec, MetricSpec, hookimpl

FACTS = (  # the default ones, and what the table of the benchmark has besides
    *("efficacy/teacher-forced@1", "efficacy/all-tokens@1", "efficacy/greedy@1"),
    *("generalization/teacher-forced@1", "generalization/all-tokens@1", "generalization/greedy@1"),
    *("portability/teacher-forced@1", "portability/all-tokens@1", "portability/greedy@1"),
    *("locality-agreement/teacher-forced@1", "locality-agreement/greedy@1"),
    "fluency/*",
)
SENTENCES = (  # the answers are too long for the tokens of `greedy`
    *("efficacy/teacher-forced@1", "efficacy/all-tokens@1"),
    *("locality-agreement/teacher-forced@1", "locality-agreement/greedy@1"),
    "fluency/*",
)
OPINIONS = ("opinion/*", "fluency/*")
FORGOTTEN = ("sanitation/*", "locality-agreement/greedy@1")
SUBSETS = (  # name, target, summary, what is measured
    ("recent", "facts:recent", "Facts newer than the model (wiki_recent).", FACTS),
    (
        "counterfact",
        "facts:counterfact",
        "Facts changed into false ones (wiki_counterfact).",
        FACTS,
    ),
    ("zsre", "facts:zsre", "ZsRE questions with a false answer, in KnowEdit's form.", FACTS),
    (
        "wikibio",
        "facts:wikibio",
        "Biographies; the edit writes the next sentence as it should be.",
        SENTENCES,
    ),
    (
        "convsent",
        "convsent:ConvSent",
        "Topics; the edit writes a good or a bad opinion of one.",
        OPINIONS,
    ),
    (
        "sanitation",
        "sanitation:Sanitation",
        "Questions; the edit writes that it does not know.",
        FORGOTTEN,
    ),
)


@hookimpl
def kedit_register_datasets() -> Iterable[DatasetSpec]:
    return [
        DatasetSpec(
            name=f"knowedit-{name}",
            target=f"kedit_knowedit.{target}",
            summary=summary,
            paper="arXiv:2401.01286",
            licence="MIT",
            metrics=metrics,
        )
        for name, target, summary, metrics in SUBSETS
    ]


@hookimpl
def kedit_register_metrics() -> Iterable[MetricSpec]:
    return [
        MetricSpec(
            name="sanitation/forgotten@1",
            target="kedit_knowedit.metric:forgotten",
            summary="What is to be forgotten is answered with the edit's answer, in 8 tokens.",
            paper="arXiv:2401.01286",
            probe="rewrite",
            decoding="greedy",
            scorer="stands in 8 tokens",
            reference="target",
        ),
        MetricSpec(
            name="sanitation/retained@1",
            target="kedit_knowedit.metric:retained",
            summary="What is to be kept is answered with the same tokens as before, of 8.",
            paper="arXiv:2401.01286",
            unit="share of tokens",
            probe="locality",
            decoding="greedy",
            scorer="the same 8 tokens, by position",
            reference="unedited",
        ),
    ]
