"""Running a model no further than needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig

from kedit_core.host import ModelHost
from kedit_core.tokens import Batch


@contextlib.contextmanager
def head_only_at(host: ModelHost, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Inside the block the head sees these positions only: logits are (1, positions, vocabulary).

    Everything that a model does to its logits after the head (caps, scales) still happens.
    """

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][rows, columns][None], *args[1:])

    handle = host.module(host.anatomy.head).register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def label_logits(host: ModelHost, batch: Batch) -> Tensor:
    """Logits that predict the batch's labels: (labels, vocabulary)."""
    with head_only_at(host, batch.rows, batch.columns):
        return host.model(**batch.inputs, use_cache=False).logits[0]


@contextlib.contextmanager
def only_config(host: ModelHost, config: GenerationConfig) -> Iterator[None]:
    """Inside the block `generate` fills no gaps of `config` from the model's own settings.

    Those may end a text early, forbid tokens or repetitions, or sample.
    """
    own = host.model.generation_config
    host.model.generation_config = config
    try:
        yield
    finally:
        host.model.generation_config = own


class _Seen(Exception):
    """Ends a forward pass when all that was wanted is recorded."""


def run_until(
    host: ModelHost,
    inputs: Mapping[str, Tensor],
    watch: Mapping[str, tuple[str, str]],
    take: Callable[[str, Any], None],
) -> None:
    """Run the model until every watched module has run once.

    Args:
        host: the model.
        inputs: keyword arguments of its forward.
        watch: for each name a module's path and "input" or "output".
        take: called with the name and the module's first input, or its output.
    """
    missing = set(watch)
    handles = []

    def seen(name: str, value: Any) -> None:
        take(name, value)
        missing.discard(name)
        if not missing:
            raise _Seen

    for name, (path, side) in watch.items():
        module = host.base_module(path)
        if side == "input":
            hook = lambda m, args, name=name: seen(name, args[0])  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
        else:
            after = lambda m, args, out, name=name: seen(name, out)  # noqa: E731
            handles.append(module.register_forward_hook(after))
    try:
        host.model(**inputs, use_cache=False)
    except _Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()
