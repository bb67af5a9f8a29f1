"""Where things are in a transformers model: found from one tiny forward, never from names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Literal, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from kedit_core.errors import SiteError, did_you_mean
from kedit_core.probing import (
    BATCH,
    LENGTH,
    Trace,
    hidden_of,
    mixes_positions,
    record,
    stored_transposed,
    undisturbed,
    with_hidden,
)
from kedit_core.sites import Site

__all__ = ["Anatomy", "BlockAnatomy", "find_anatomy", "hidden_of", "with_hidden"]

OF_MODEL = frozenset({"blocks", "encoder_blocks", "final_norm", "head", "embedding"})
OF_BLOCK = frozenset({"mlp_out", "mlp_in", "mlp", "attention", "attention_out"})
T = TypeVar("T")


@dataclass(frozen=True)
class BlockAnatomy:
    """What one block consists of; paths are those of `named_modules`.

    Attributes:
        path: the block, for example `model.layers.3`.
        mlp_out: the MLP's output ("down") projection; None in a block without a dense MLP.
        mlp_in: its input projections: gate and up, one fused matrix, or a plain one.
        mlp: the smallest module that holds both, if that is not the block itself (as in OPT).
        attention: the smallest module that holds the projections of what mixes positions.
        attention_out: the output projection in there.
        experts: stacked output projections of routed experts: (experts, ·, ·) parameters.
    """

    path: str
    mlp_out: Site | None
    mlp_in: tuple[Site, ...]
    mlp: str | None
    attention: str | None
    attention_out: Site | None
    experts: tuple[Site, ...] = ()


@dataclass(frozen=True)
class Anatomy:
    """Where things are in a model.

    Attributes:
        blocks: the blocks of the decoder, in order.
        encoder_blocks: the blocks of the encoder, if there is one.
        final_norm: the normalisation between the last block and the head, if there is one.
        head: module that turns hidden states into logits.
        embedding: module that turns token ids into hidden states.
        tied: whether head and embedding share their weight.
        hidden_size: width of the residual stream.
        layer_output: what a hook on a block gets; `hidden_of` reads both.
        sequence_first: whether hidden states are (position, row, feature) instead of
            (row, position, feature).
    """

    blocks: tuple[BlockAnatomy, ...]
    encoder_blocks: tuple[BlockAnatomy, ...]
    final_norm: str | None
    head: str
    embedding: str
    tied: bool
    hidden_size: int
    layer_output: Literal["tensor", "tuple"]
    sequence_first: bool = False

    def describe(self) -> str:
        """A table of what was found; blocks of equal structure share a paragraph."""
        rows = [("embedding", self.embedding)]
        for side, blocks in (("encoder", self.encoder_blocks), ("blocks", self.blocks)):
            alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
            for block in blocks:
                alike.setdefault(_described(block), []).append(block.path)
            for parts, paths in alike.items():
                rows += [(side, _span(paths)), *((f"  {name}", found) for name, found in parts)]
        rows += [
            ("final_norm", self.final_norm or "none"),
            ("head", self.head + ", weight shared with the embedding" * self.tied),
            ("hidden_size", str(self.hidden_size)),
            ("layer_output", self.layer_output),
        ]
        return "\n".join(f"{name:<16} {found}" for name, found in rows)


def find_anatomy(model: PreTrainedModel, override: Mapping[str, str] | None = None) -> Anatomy:
    """Find the parts of a model from how tensors flow through it.

    Runs the model on two sequences of three tokens, then each child of a block once more.  The
    model comes back as it was: no hooks, the same weights and training flags.

    Args:
        model: a causal or encoder-decoder language model without edits.
        override: module paths that replace what is found, by field of `Anatomy` or
            `BlockAnatomy`.  `blocks` is the container of the blocks; fields of a block are
            relative to it and count for the blocks that have such a module.  For example
            `{"blocks": "transformer.h", "mlp_in": "mlp.w1, mlp.w2", "mlp_out": "mlp.c_proj"}`.

    Raises:
        SiteError: there are no blocks or no head, or an override fits nothing.
        ModelError: the model does not run on token ids alone.
    """
    chosen = dict(override or {})
    for field in sorted(chosen.keys() - OF_MODEL - OF_BLOCK):
        hint = did_you_mean(field, OF_MODEL | OF_BLOCK)
        raise SiteError(f"'{field}' is not a part of a model that can be overridden. {hint}")
    with undisturbed(model):
        trace = record(model)
        _check(trace, chosen, OF_MODEL, [""])
        encoder, decoder = _block_lists(model, trace, chosen)
        _check(trace, chosen, OF_BLOCK, [f"{block}." for block in encoder + decoder])
        encoder_blocks = tuple(_block(trace, path, chosen) for path in encoder)
        blocks = tuple(_block(trace, path, chosen) for path in decoder)
    head = chosen.get("head") or _path_of(trace, model.get_output_embeddings())
    embedding = chosen.get("embedding") or _path_of(trace, model.get_input_embeddings())
    if head is None or embedding is None:
        raise SiteError(
            f"{type(model).__name__} has no output head: load the model with "
            f"AutoModelForCausalLM or AutoModelForSeq2SeqLM."
        )
    last = trace.calls[decoder[-1]]
    return Anatomy(
        blocks=blocks,
        encoder_blocks=encoder_blocks,
        final_norm=chosen.get("final_norm") or _final_norm(trace, decoder[-1]),
        head=head,
        embedding=embedding,
        tied=_is_tied(model, trace.modules[head], trace.modules[embedding]),
        hidden_size=last.d_out,
        layer_output="tuple" if last.as_tuple else "tensor",
        sequence_first=last.returned is not None and last.returned.shape[:2] == (LENGTH, BATCH),
    )


def _block_lists(
    model: PreTrainedModel, trace: Trace, chosen: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Paths of the encoder's blocks, which run first, and of the decoder's."""
    sides = ["encoder_blocks", "blocks"] if model.config.is_encoder_decoder else ["blocks"]
    order = list(trace.calls)
    longest = sorted(_streams(trace), key=lambda path: len(trace.children(path)))[-len(sides) :]
    longest.sort(key=lambda path: order.index(trace.children(path)[0]))
    found = dict(zip(sides, longest, strict=True)) if len(longest) == len(sides) else {}
    lists = {**found, **chosen}
    if not lists.keys() >= set(sides):
        raise SiteError(
            f"{type(model).__name__} has no module list that could be its blocks: each module in "
            f"it must turn a hidden state into one of the same shape. Module lists seen: "
            f"{_seen_lists(trace)}. An ArchitectureSpec can name the blocks, for example "
            f"{{'blocks': 'transformer.h'}}."
        )
    steps = [trace.children(lists[side]) for side in sides]
    for side, paths in zip(sides, steps, strict=True):
        if not paths or not all(path in trace.calls for path in paths):
            raise SiteError(f"'{lists[side]}' cannot be `{side}`: not all of its children ran.")
    return (steps[0] if len(steps) == 2 else []), steps[-1]


def _streams(trace: Trace) -> list[str]:
    """Module lists whose children all map a hidden state to another; the outer of nested ones."""
    found = []
    for path, module in trace.modules.items():
        calls = [trace.calls.get(c) for c in trace.children(path) if not trace.is_leaf(c)]
        whole = isinstance(module, nn.ModuleList) and 0 < len(module) == len(calls)
        if whole and all(call and call.keeps_shape for call in calls):
            found.append(path)
    return [path for path in found if not _is_in(path, set(found) - {path})]


def _block(trace: Trace, block: str, chosen: Mapping[str, str]) -> BlockAnatomy:
    """What one block consists of."""

    def named(field: str) -> list[str]:
        names = chosen[field].split(",") if field in chosen else []
        paths = [f"{block}.{name.strip()}" for name in names]
        return [path for path in paths if path in trace.modules]

    width = trace.calls[block].d_in
    mixers = [p for p in trace.parts(block) if mixes_positions(trace.modules[p], trace.calls[p])]
    mixing = trace.projections(mixers[0]) if mixers else []
    plain = [p for p in trace.below(block) if not _is_in(p, mixers)]
    routed = _copies(trace, block)
    matrices = [p for p in plain if trace.is_projection(p) and not _is_in(p, routed)]

    out = named("attention_out") or [p for p in mixing if trace.calls[p].d_out == width][-1:]
    down = named("mlp_out") or _down(trace, matrices, width)
    ups = named("mlp_in") or _ups(trace, matrices, width, down)
    mlp = named("mlp") or _holder(trace, block, ups + down)
    attention = named("attention") or _holder(trace, block, mixing) or mixers
    return BlockAnatomy(
        path=block,
        mlp_out=_first(_sites(trace, down)),
        mlp_in=_sites(trace, ups),
        mlp=_first(mlp),
        attention=_first(attention),
        attention_out=_first(_sites(trace, out)),
        experts=_experts(trace, plain, width),
    )


def _copies(trace: Trace, block: str) -> list[str]:
    """Copies of one module side by side in a list, as routed experts used to be kept."""
    found: list[str] = []
    for path, module in trace.modules.items():
        if path.startswith(f"{block}.") and isinstance(module, nn.ModuleList | nn.ModuleDict):
            children = trace.children(path)
            kinds = {type(trace.modules[child]) for child in children if not trace.is_leaf(child)}
            found += children if len(children) > 1 == len(kinds) else []
    return found


def _is_in(path: str, roots: Iterable[str]) -> bool:
    return any(f"{path}.".startswith(f"{root}.") for root in roots)


def _down(trace: Trace, matrices: list[str], width: int) -> list[str]:
    """The MLP's output projection: the widest that returns to the stream, the last of equals."""
    back = [path for path in matrices if trace.calls[path].d_out == width]
    from_inner = [path for path in back if trace.calls[path].d_in != width]
    if not from_inner:  # a square MLP has a second matrix of the same sizes
        return back[1:][-1:]
    widest = max(trace.calls[path].d_in for path in from_inner)
    return [path for path in from_inner if trace.calls[path].d_in == widest][-1:]


def _ups(trace: Trace, matrices: list[str], width: int, down: list[str]) -> list[str]:
    """What leads from the stream into the output projection, also when gate and up are fused."""
    if not down or down[0] not in matrices:
        return []
    inner = trace.calls[down[0]].d_in
    return [
        path
        for path in matrices[: matrices.index(down[0])]
        if trace.calls[path].d_in == width and trace.calls[path].d_out in (inner, 2 * inner)
    ]


def _holder(trace: Trace, block: str, paths: list[str]) -> list[str]:
    """The smallest module in the block that ran and holds all the paths; [] if only the block."""
    holder = paths[0] if paths else block
    while holder != block:
        if holder in trace.calls and all(path.startswith(f"{holder}.") for path in paths):
            return [holder]
        holder = holder.rpartition(".")[0]
    return []


def _first(found: Sequence[T]) -> T | None:
    return found[0] if found else None


def _sites(trace: Trace, paths: list[str]) -> tuple[Site, ...]:
    return tuple(
        Site(f"{path}.weight", stored_transposed(trace.modules[path], trace.calls.get(path)))
        for path in paths
    )


def _experts(trace: Trace, plain: list[str], width: int) -> tuple[Site, ...]:
    """Output projections of routed experts that are kept as one (experts, ·, ·) parameter."""
    stacks = {
        f"{path}.{name}": tuple(parameter.shape)
        for path in plain
        for name, parameter in trace.modules[path].named_parameters(recurse=False)
        if parameter.ndim == 3 and width in parameter.shape[1:] and min(parameter.shape) > 1
    }
    if not stacks:
        return ()
    shapes, names = list(stacks.values()), list(stacks)
    # gate and up are fused and hence larger, or two of one shape; else the output comes last
    down = min(names, key=lambda n: (prod(stacks[n]), shapes.count(stacks[n]), -names.index(n)))
    _, rows, columns = stacks[down]
    if rows == columns:  # then the way in, which is stored the same way round, tells
        return (Site(down, any(shape[1] == width != shape[2] for shape in shapes)),)
    return (Site(down, columns == width),)


def _final_norm(trace: Trace, last_block: str) -> str | None:
    """The first leaf after the last block, unless that is a projection already."""
    order = list(trace.calls)
    for path in order[order.index(last_block) + 1 :]:
        module = trace.modules[path]
        if trace.is_leaf(path) and not isinstance(module, nn.Dropout | nn.Identity):
            return None if trace.is_projection(path) else path
    return None


def _path_of(trace: Trace, module: nn.Module | None) -> str | None:
    return next((path for path, other in trace.modules.items() if other is module), None)


def _is_tied(model: PreTrainedModel, head: nn.Module, embedding: nn.Module) -> bool:
    """Whether head and embedding share storage; of offloaded weights only the config knows."""
    ours, theirs = getattr(head, "weight", None), getattr(embedding, "weight", None)
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return False
    if ours is not theirs and ours.is_meta and theirs.is_meta:
        return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return ours is theirs or ours.data_ptr() == theirs.data_ptr() != 0


def _check(
    trace: Trace, chosen: Mapping[str, str], fields: frozenset[str], roots: Sequence[str]
) -> None:
    """Refuse overrides of `fields` with a path that exists below none of the roots."""
    for field in sorted(fields & chosen.keys()):
        for name in chosen[field].split(","):
            if not any(f"{root}{name.strip()}" in trace.modules for root in roots):
                root = roots[-1]
                known = [p.removeprefix(root) for p in trace.modules if p.startswith(root)]
                raise SiteError(
                    f"There is no module '{name.strip()}' for `{field}` of the ArchitectureSpec"
                    f"{' in any block' if fields is OF_BLOCK else ''}. {did_you_mean(name, known)}"
                )


def _seen_lists(trace: Trace) -> str:
    lists = [path for path, module in trace.modules.items() if isinstance(module, nn.ModuleList)]
    seen = [
        f"'{path}' ({len(trace.children(path))} modules, "
        f"{sum(child in trace.calls for child in trace.children(path))} ran)"
        for path in lists[:6]
    ]
    return ", ".join(seen) + ", …" * (len(lists) > 6) if lists else "none"


def _described(block: BlockAnatomy) -> tuple[tuple[str, str], ...]:
    """Names of a block's parts, without the block's own path."""

    def inside(path: str | None) -> str:
        return "none" if path is None else path.removeprefix(f"{block.path}.")

    def site(found: Site | None) -> str:
        return inside(found.parameter) + " (transposed)" * found.transposed if found else "none"

    parts = [
        ("mlp", inside(block.mlp)),
        ("mlp_in", ", ".join(map(site, block.mlp_in)) or "none"),
        ("mlp_out", site(block.mlp_out)),
        ("attention", inside(block.attention)),
        ("attention_out", site(block.attention_out)),
    ]
    return tuple(parts + [("experts", site(expert)) for expert in block.experts])


def _span(paths: Sequence[str]) -> str:
    """`model.layers.0-3, 5` for the paths of blocks in one list."""
    names = [path.rpartition(".")[2] for path in paths]
    if not all(name.isdecimal() for name in names):  # a container that an override named
        return ", ".join(paths)
    numbers = [int(name) for name in names]
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ]
    spans = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"{paths[0].rpartition('.')[0]}.{', '.join(spans)}"
