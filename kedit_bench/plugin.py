"""What kedit itself registers, by the same way as any plugin."""

from collections.abc import Iterable, Iterator

from kedit_core import CommandSpec, MetricSpec, hookimpl

PROBES = {  # quantity: kind of its probes, and what it means
    "efficacy": ("rewrite", "The rewritten prompt gives the new answer"),
    "generalization": ("rephrase", "Rephrased prompts give the new answer"),
    "portability": ("portability", "Prompts that follow from the edit give what follows"),
    "locality-accuracy": ("locality", "Unrelated prompts give their right answer"),
    "instance": ("instance", "Instances of an edited concept are still called so"),
}
FORCED, GREEDY = "teacher-forced", "greedy"
PROTOCOLS = {  # protocol: decoding, and how it scores
    "teacher-forced": (FORCED, "share of answer tokens that are most probable"),
    "all-tokens": (FORCED, "all answer tokens are most probable"),
    "with-stop": (FORCED, "share of answer tokens and the end token"),
    "probability": (FORCED, "probability of the whole answer"),
    "nll": (FORCED, "mean negative log-probability of its tokens, and perplexity"),
    "rank": (FORCED, "how many tokens are more probable than its first"),
    "greedy": (GREEDY, "the text begins with it"),
    "greedy-cut": (GREEDY, "the first tokens are the answer's"),
    "greedy-exact": (GREEDY, "the text to its natural end is the answer"),
    "greedy-contains": (GREEDY, "it stands in the text to its natural end"),
    "greedy-f1": (GREEDY, "F1 of the words of the text to its natural end"),
    "task-exact": (GREEDY, "asked as people ask: the text is the answer"),
    "task-contains": (GREEDY, "asked as people ask: it stands in the text"),
    "task-f1": (GREEDY, "asked as people ask: F1 of the words"),
    "easyedit": (FORCED, "as EasyEdit computes token accuracy"),
    "wild-paper": (GREEDY, "as the WILD paper computes exact match"),
}
UNITS = {"nll": "nats per token", "rank": "tokens"}
AGREEMENTS = {
    "teacher-forced": (FORCED, "share of the answer's tokens with the same prediction"),
    "greedy": (GREEDY, "the same first words"),
    "same-text": (GREEDY, "the very same text"),
}
DEFAULT = {"teacher-forced", "all-tokens", "greedy"}


@hookimpl
def kedit_register_metrics() -> Iterable[MetricSpec]:
    return [*_of_answers(), *_of_agreement(), *_others()]


def _of_answers() -> Iterator[MetricSpec]:
    for quantity, (kind, what) in PROBES.items():
        for protocol, (decoding, how) in PROTOCOLS.items():
            yield MetricSpec(
                name=f"{quantity}/{protocol}@1",
                target=f"kedit_bench.metrics.answers:{kind}_{protocol.replace('-', '_')}",
                summary=f"{what}: {how}.",
                unit=UNITS.get(protocol, "share"),
                probe=kind,
                decoding=decoding,
                scorer=protocol,
                reference="truth" if quantity == "locality-accuracy" else "target",
                form="task" if protocol.startswith(("task", "wild")) else "bare",
                better="lower" if (protocol in UNITS) != (quantity == "instance") else "higher",
                default=protocol in DEFAULT and quantity not in ("locality-accuracy", "instance"),
            )


def _of_agreement() -> Iterator[MetricSpec]:
    for protocol, (decoding, how) in AGREEMENTS.items():
        yield MetricSpec(
            name=f"locality-agreement/{protocol}@1",
            target=f"kedit_bench.metrics.answers:locality_agreement_{protocol.replace('-', '_')}",
            summary=f"Unrelated prompts answer as before: {how}.",
            probe="locality",
            decoding=decoding,
            scorer=protocol,
            reference="unedited",
            default=protocol in DEFAULT,
        )


def _others() -> Iterator[MetricSpec]:
    metrics = "kedit_bench.metrics"
    yield MetricSpec(
        name="counterfact/contrast@1",
        target=f"{metrics}.contrast:Contrast",
        summary="ES, PS, NS, EM, PM, NM: is the new answer more probable than the true one?",
        paper="arXiv:2202.05262",
        probe="rewrite, rephrase, neighborhood",
        decoding=FORCED,
        scorer="probability comparison",
        reference="target against truth",
    )
    yield MetricSpec(
        name="zsre/alphaedit@1",
        target=f"{metrics}.zsre:ZsreHarness",
        summary="ZsRE as in AlphaEdit and MEMIT; with bos=TOKEN as AlphaEdit scores LLaMA-3.",
        paper="arXiv:2410.02355",
        unit="share of tokens",
        probe="rewrite, rephrase, locality",
        decoding=FORCED,
        scorer="alphaedit",
        reference="target, truth",
    )
    yield MetricSpec(
        name="fluency/ngram-entropy@1",
        target=f"{metrics}.generation:Fluency",
        summary="Entropy of word pairs and triples of sampled text.",
        paper="arXiv:2202.05262",
        unit="bits",
        probe="generation",
        decoding="sampled",
        scorer="n-gram entropy",
        reference="none",
    )
    yield MetricSpec(
        name="naturalness/unedited-nll@1",
        target=f"{metrics}.generation:Naturalness",
        summary="How unlikely the unedited model finds sampled text, and perplexity.",
        unit="nats per token",
        probe="generation",
        decoding="sampled",
        scorer="nll",
        reference="unedited",
        better="lower",
    )
    yield MetricSpec(
        name="consistency/tfidf@1",
        target=f"{metrics}.generation:Consistency",
        summary="TF-IDF cosine of sampled text and of texts about the new fact.",
        paper="arXiv:2202.05262",
        unit="cosine",
        probe="generation",
        decoding="sampled",
        scorer="tf-idf cosine",
        reference="texts about the new fact",
    )
    yield MetricSpec(
        name="essence/nll@1",
        target=f"{metrics}.generation:Essence",
        summary="How unlikely the edited model finds texts about the subject, and perplexity.",
        paper="arXiv:2202.05262",
        unit="nats per token",
        probe="texts about the subject",
        decoding=FORCED,
        scorer="nll",
        reference="texts about the subject",
        better="lower",
    )
    yield MetricSpec(
        name="opinion/score@1",
        target=f"{metrics}.opinion:Opinion",
        summary="The wanted opinion is more likely than the others and than before.",
        paper="arXiv:2206.06520",
        probe="opinion",
        decoding=FORCED,
        scorer="likelihood comparison",
        reference="other opinions and unedited",
    )
    yield MetricSpec(
        name="opinion/divergence@1",
        target=f"{metrics}.opinion:divergence",
        summary="KL from the unedited model on what is said about another topic.",
        paper="arXiv:2206.06520",
        unit="nats per token",
        probe="locality",
        decoding=FORCED,
        scorer="KL",
        reference="unedited",
        better="lower",
    )
    yield MetricSpec(
        name="tests/greedy-contains@1",
        target=f"{metrics}.tests_passed:TestsPassed",
        summary="Tests of several questions passed: multi-hop questions, ripple effects.",
        paper="arXiv:2307.12976",
        probe="tests",
        decoding=GREEDY,
        scorer="any or all questions answered",
        reference="target",
    )
    yield MetricSpec(
        name="side-effects/perplexity@1",
        target=f"{metrics}.side_effects:Perplexity",
        summary="Perplexity of the whole model on a text: give text=FILE.",
        unit="perplexity",
        probe="text",
        decoding=FORCED,
        scorer="perplexity",
        reference="text",
        better="lower",
        measures="model",
    )
    yield MetricSpec(
        name="side-effects/weight-change@1",
        target=f"{metrics}.side_effects:WeightChange",
        summary="Norm of all changes of a matrix over its own; the largest of all matrices.",
        unit="ratio of norms",
        probe="weights",
        decoding="none",
        scorer="Frobenius norm",
        reference="unedited",
        better="lower",
        measures="model",
    )
    yield MetricSpec(
        name="side-effects/inference@1",
        target=f"{metrics}.side_effects:Inference",
        summary="Tokens per second, edited over unedited, and bytes beside the weights.",
        unit="ratio of tokens per second",
        probe="text",
        decoding=GREEDY,
        scorer="seconds",
        reference="unedited",
        measures="model",
    )


@hookimpl
def kedit_register_commands() -> Iterable[CommandSpec]:
    return [
        CommandSpec("eval", "kedit_bench.commands:app", "Score methods on a dataset."),
        CommandSpec("tune", "kedit_bench.tune:tune", "Search settings for a model: a preset."),
        CommandSpec("demo", "kedit_bench.demo:demo", "Edit five facts, show them, roll back."),
    ]
