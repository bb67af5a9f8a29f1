"""Entry point of kedit-similarity."""

from collections.abc import Iterable

from kedit_core import MetricSpec, hookimpl

PROBES = (  # quantity, kind of its probes, what it means
    ("efficacy", "rewrite", "What follows the rewritten prompt is like the new answer"),
    ("generalization", "rephrase", "What follows rephrased prompts is like the new answer"),
    ("portability", "portability", "What follows from the edit is answered alike"),
    ("locality-accuracy", "locality", "Unrelated prompts are answered like their right answer"),
)
PROTOCOLS = (  # protocol, how it scores, unit
    ("rouge-1", "ROUGE-1 recall", "share"),
    ("rouge-2", "ROUGE-2 recall", "share"),
    ("rouge-l", "ROUGE-L recall", "share"),
    ("bleu", "sentence BLEU", "share"),
    ("cosine", "cosine of sentence embeddings", "cosine"),
)


@hookimpl
def kedit_register_metrics() -> Iterable[MetricSpec]:
    for quantity, kind, what in PROBES:
        for protocol, how, unit in PROTOCOLS:
            yield MetricSpec(
                name=f"{quantity}/{protocol}@1",
                target=f"kedit_similarity.protocols:{kind}_{protocol.replace('-', '_')}",
                summary=f"{what}: {how}.",
                paper="arXiv:2405.15349",
                unit=unit,
                probe=kind,
                decoding="greedy",
                scorer=how,
                reference="truth" if kind == "locality" else "target",
            )
    yield MetricSpec(
        name="weighted/cknowedit@1",
        target="kedit_similarity.weighted:Weighted",
        summary="CKnowEdit's total of edit, portability, locality and fluency: give encoder=MODEL.",
        paper="arXiv:2409.05806",
        unit="points",
        probe="rewrite, portability, locality",
        decoding="greedy",
        scorer="ROUGE-L recall, cosine of sentence embeddings, n-gram entropy",
        reference="target and truth",
    )
