"""Parts of a model whose output is watched or changed, and token embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kedit_core.errors import ModelError
from kedit_core.forward import run, streams
from kedit_core.host import ModelHost
from kedit_core.numerics.losses import wide
from kedit_core.probing import hidden_of, with_hidden
from kedit_core.tokens import Row, pad

Kind = Literal["block", "mlp", "attn"]


def part_of(host: ModelHost, kind: Kind, layer: int) -> str:
    """Path of the module whose output is restored.

    For MLP and attention that is the output projection: what these write into the residual
    stream, also where the module round it adds the stream itself.

    Raises:
        SiteError: the block has no single such projection.
    """
    block = host.block(layer)
    if kind == "block":
        return block.path
    if kind == "mlp":
        return host.mlp_out(layer).module
    if block.attention_out is None:
        raise ModelError(
            f"Block {layer} of {host.name} has no attention output projection. Trace blocks or "
            f"MLPs instead."
        )
    return block.attention_out.module


@contextlib.contextmanager
def changed(
    host: ModelHost, path: str, rows: int, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Inside the block the module's output, seen as (rows, tokens, d), is changed."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        states = hidden.reshape(rows, -1, hidden.shape[-1])  # OPT flattens rows
        return with_hidden(output, change(states).reshape(hidden.shape))

    handle = host.module(path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def embeddings(host: ModelHost, ids: Sequence[int]) -> Tensor:
    """Token embeddings as they are looked up: (tokens, width), float32 or wider."""
    tokens = torch.tensor([list(ids)], device=host.device)
    with torch.no_grad():
        return wide(host.module(host.anatomy.embedding)(tokens)[0])


@torch.no_grad()
def embedding_scale(host: ModelHost, ids: Sequence[int]) -> float:
    """What token embeddings are multiplied by on their way from the table to the first block.

    Found by doubling them.  1 where something else stands between: a norm, a projection.
    """
    table = embeddings(host, ids)
    batch = pad(host, [Row(tuple(ids))] * 2)

    def double(states: Tensor) -> Tensor:
        return torch.stack([states[0], 2 * states[1]])

    with streams(host, [0]) as entering, changed(host, host.anatomy.embedding, 2, double):
        run(host, batch)
    plain, doubled = wide(entering[0])
    change = (doubled - plain).to(table.device)
    if change.shape != table.shape:
        return 1.0
    scale = float((change * table).sum() / (table * table).sum())
    rounding = 5e-2 * change.norm()
    return scale if (change - scale * table).norm() <= rounding else 1.0


def with_tokens(
    states: Tensor, tokens: Sequence[int], new: Tensor, rows: slice = slice(None)
) -> Tensor:
    """A copy of states (rows, tokens, d) with `new` (rows or 1, n, d) at some tokens."""
    copied = states.clone()
    copied[rows, list(tokens)] = new.to(states)
    return copied
