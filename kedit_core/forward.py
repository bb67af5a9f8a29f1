"""Running a model no further than needed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from kedit_core.host import ModelHost
from kedit_core.sites import Site
from kedit_core.tokens import Batch

Watched = TypeVar("Watched")


@contextlib.contextmanager
def head_only_at(host: ModelHost, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Inside the block the head sees these positions only: logits are (1, positions, vocabulary).

    Everything that a model does to its logits after the head (caps, scales) still happens.
    """

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        device = args[0].device  # not that of the ids where layers are spread over several
        return (args[0][rows.to(device), columns.to(device)][None], *args[1:])

    handle = host.module(host.anatomy.head).register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def label_logits(host: ModelHost, batch: Batch) -> Tensor:
    """Logits that predict the batch's labels: (labels, vocabulary)."""
    with head_only_at(host, batch.rows, batch.columns):
        return run(host, batch).logits[0]


def run(host: ModelHost, batch: Batch, **options: Any) -> Any:
    """One pass over a batch, in which wrapped modules know where its prompts end."""
    with host.reading.of_prompts(batch.ends):
        return host.model(**batch.inputs, **({"use_cache": False} | options))


@contextlib.contextmanager
def forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block the module computes this instead; its hooks still run."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextlib.contextmanager
def added(host: ModelHost, site: Site, change: Tensor) -> Iterator[None]:
    """Inside the block the site's module computes with a change (d_out, d_in) of its weight.

    The product with the change is taken in float32.
    """

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (args[0].float() @ change.mT).to(output.dtype)

    handle = host.base_module(site.module).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def copy_of_cache(cache: Any) -> Any:
    """A cache of keys and values that can grow without touching the tensors of this one."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


@contextlib.contextmanager
def streams(host: ModelHost, depths: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Inside the block the latest residual stream (rows, columns, d) that enters each block.

    Args:
        host: a causal model.
        depths: numbers of blocks.

    Raises:
        SiteError: there is no such block.
    """
    found: dict[int, Tensor] = {}

    def keep(depth: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[depth] = args[0] if args else kwargs["hidden_states"]

        return hook

    with contextlib.ExitStack() as stack:
        for depth in depths:
            block = host.module(host.block(depth).path)
            handle = block.register_forward_pre_hook(keep(depth), with_kwargs=True)
            stack.callback(handle.remove)
        yield found


def unembed(host: ModelHost, states: Tensor) -> Tensor:
    """Logits that the model makes of residual streams (n, d): (n, vocabulary).

    The model itself does it, with every block handing on `states`, so that its final norm, caps
    and scales are there.  Each state is a text of one token, as texts may not be of any length.
    """
    kept: Any = states[:, None]
    output = kept if host.anatomy.layer_output == "tensor" else (kept,)
    ids = torch.zeros(len(states), 1, dtype=torch.long, device=host.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(host.reading.aside())
        for block in host.blocks:
            stack.enter_context(forward_as(host.module(block.path), lambda *a, **k: output))
        return host.model(input_ids=ids, use_cache=False).logits[:, 0]


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
    batch: Batch,
    watch: Mapping[Watched, tuple[str, str]],
    take: Callable[[Watched, Any], None],
) -> None:
    """Run the model until every watched module has run once.

    Args:
        host: the model.
        batch: what it reads.
        watch: for each name a module's path and "input" or "output".
        take: called with the name and the module's first input, or its output.
    """
    missing = set(watch)
    handles = []

    def seen(name: Watched, value: Any) -> None:
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
        run(host, batch)
    except _Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()
