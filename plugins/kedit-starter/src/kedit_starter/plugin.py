"""Entry point of kedit-starter."""

from collections.abc import Iterable

from kedit_core import DatasetSpec, hookimpl


@hookimpl
def kedit_register_datasets() -> Iterable[DatasetSpec]:
    return [
        DatasetSpec(
            name="starter",
            target="kedit_starter.dataset:Starter",
            summary="Everyday facts that smollm2-135m knows, with rephrasings and neighbours.",
            licence="MIT",
            needs_path=False,
        )
    ]
