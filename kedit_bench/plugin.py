"""What kedit itself registers, by the same way as any plugin."""

from collections.abc import Iterable

from kedit_core import CommandSpec, MetricSpec, hookimpl


@hookimpl
def kedit_register_metrics() -> Iterable[MetricSpec]:
    probes = {
        "efficacy": "the rewritten prompt gives the new answer",
        "generalization": "rephrased prompts give the new answer",
        "locality": "neighbouring prompts answer as before",
        "portability": "prompts that follow from the edit give the answer that follows",
    }
    protocols = {
        "teacher-forced": "share of answer tokens that are the most probable ones",
        "greedy": "share of prompts whose greedy answer begins with it",
    }
    return [
        MetricSpec(
            name=f"{kind}/{protocol}@1",
            target=f"kedit_bench.metrics:{kind}_{protocol.replace('-', '_')}",
            summary=f"{what[0].upper()}{what[1:]}: {how}.",
        )
        for kind, what in probes.items()
        for protocol, how in protocols.items()
    ]


@hookimpl
def kedit_register_commands() -> Iterable[CommandSpec]:
    return [
        CommandSpec("eval", "kedit_bench.commands:evaluate", "Score a method on a dataset."),
        CommandSpec("demo", "kedit_bench.demo:demo", "Edit five facts, show them, roll back."),
    ]
