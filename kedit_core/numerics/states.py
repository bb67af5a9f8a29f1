"""What parts of a model read and write, and token embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kedit_core.errors import ModelError
from kedit_core.forward import Watched, run, run_until, streams
from kedit_core.host import ModelHost
from kedit_core.probing import hidden_of, with_hidden
from kedit_core.tokens import MAX_TOKENS, Row, buckets, pad

Kind = Literal["block", "mlp", "attn"]
Side = Literal["input", "output"]


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or wider where it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def states_at_marks(
    host: ModelHost, rows: Sequence[Row], points: Mapping[str, tuple[str, Side]]
) -> dict[str, Tensor]:
    """Inputs or outputs of modules at each row's mark.

    What stands after a mark cannot change it in a causal model, so rows are cut there; the pass
    ends at the last module that is wanted.

    Args:
        host: a causal model.
        rows: each with its mark in the prompt.
        points: for each name a module's path and side.

    Returns:
        For each name (rows, width) in the model's type.
    """
    cut = [row.until_mark for row in rows]
    found: dict[str, list[Tensor | None]] = {name: [None] * len(rows) for name in points}
    for group in buckets([len(row.ids) for row in cut], MAX_TOKENS):
        batch = pad(host, [cut[n] for n in group])
        at = torch.tensor([cut[n].mark for n in group], device=host.device)

        def take(name: str, value: Any, group: list[int] = group, at: Tensor = at) -> None:
            hidden = hidden_of(value)
            hidden = hidden.reshape(len(group), -1, hidden.shape[-1])  # OPT flattens rows
            picked = hidden[torch.arange(len(group), device=hidden.device), at.to(hidden.device)]
            for n, state in zip(group, picked, strict=True):
                found[name][n] = state

        run_until(host, batch, points, take)
    return {
        name: torch.stack([state for state in states if state is not None])
        for name, states in found.items()
    }


@torch.no_grad()
def watch_tokens(
    host: ModelHost,
    rows: Sequence[Row],
    points: Mapping[Watched, tuple[str, str]],
    take: Callable[[Watched, Tensor], object],
) -> None:
    """Hand over what modules read or write at each token of some rows, which are one batch.

    Args:
        host: the model.
        rows: one or more.
        points: as for `run_until`.
        take: called with the name and the states (tokens, width), row by row, in the model's type.
    """
    batch = pad(host, rows)
    mask = batch.inputs["attention_mask"].bool()

    def pick(name: Watched, value: Any) -> None:
        states = hidden_of(value).reshape(*mask.shape, -1)  # OPT flattens rows
        take(name, states[mask.to(states.device)])  # a model may be spread over several devices

    run_until(host, batch, points, pick)


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
