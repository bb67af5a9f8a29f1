"""Entry point of kedit-judge."""

from collections.abc import Iterable

from kedit_core import MetricSpec, hookimpl

QUANTITIES = (  # quantity, kind of its probes, what its answers are compared with, summary
    ("efficacy", "rewrite", "target", "The rewritten prompt gives the new answer"),
    ("generalization", "rephrase", "target", "Rephrased prompts give the new answer"),
    ("portability", "portability", "target", "Prompts that follow from the edit give what follows"),
    ("locality-accuracy", "locality", "truth", "Unrelated prompts give their right answer"),
)


@hookimpl
def kedit_register_metrics() -> Iterable[MetricSpec]:
    return [
        *_of_answers(),
        MetricSpec(
            name="concept/consistency-judge@1",
            target="kedit_judge.concept:consistency",
            summary="Concept Consistency: is the text close to the new definition or the old one?",
            paper="arXiv:2403.06259",
            unit="points from -1 to 1",
            probe="rewrite",
            decoding="greedy",
            scorer="judge",
            reference="target, unedited",
        ),
        MetricSpec(
            name="personality/pae-judge@1",
            target="kedit_judge.personality:pae",
            summary="PAE: how much more of the target trait a language model finds after the edit.",
            paper="arXiv:2310.02168",
            unit="points from -4 to 4",
            probe="generation",
            decoding="greedy",
            scorer="judge, from 1 to 5",
            reference="target, unedited",
        ),
    ]


def _of_answers() -> Iterable[MetricSpec]:
    return [
        MetricSpec(
            name=f"{quantity}/judge@1",
            target=f"kedit_judge.metric:{kind}",
            summary=f"{summary}: a language model judges the text to its natural end.",
            paper="arXiv:2502.11177",
            unit="share",
            probe=kind,
            decoding="greedy",
            scorer="judge",
            reference=reference,
            form="task",
            better="higher",
        )
        for quantity, kind, reference, summary in QUANTITIES
    ]
