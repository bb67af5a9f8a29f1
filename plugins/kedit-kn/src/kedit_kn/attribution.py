"""Which MLP neurons a model's answer rests on: integrated gradients, and the choice of a few."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kedit_core import RequestError
from kedit_core.editing import ModelHost, Site
from kedit_core.forward import forward_as, streams
from kedit_core.numerics.tail import Tail
from kedit_core.request import EditRequest
from kedit_core.tokens import Row, join

SHARE_STEP = 0.05


@dataclass(frozen=True)
class Attribution:
    """How much each neuron adds to the probability of an answer.

    A neuron is one input of an MLP's output matrix, behind the activation function and, in gated
    MLPs, behind the product with the gate: what weights one column of that matrix.

    Attributes:
        scores: for each layer (prompts, d_in), float32.
        activations: for each layer (prompts, d_in) what the neurons are where the answer's first
            token is predicted, float32.
    """

    scores: Mapping[int, Tensor]
    activations: Mapping[int, Tensor]


@dataclass(frozen=True)
class Neuron:
    """A chosen neuron.

    Attributes:
        layer, index: block, and input of its MLP's output matrix.
        score: mean attribution over the prompts.
        share: in which share of the prompts it passes the threshold.
        activation: mean over the prompts.
    """

    layer: int
    index: int
    score: float
    share: float
    activation: float


def attribute(
    host: ModelHost,
    request: EditRequest,
    contexts: Sequence[str] = ("",),
    layers: Sequence[int] | None = None,
    steps: int = 20,
    max_tokens: int = 4096,
) -> Attribution:
    """Attribute the former answer of a request to the MLP neurons of its prompt.

    Integrated gradients from the zero activation (Dai et al. 2022, arXiv:2104.08696, eq. 5): for
    the neurons w of one layer at the position that predicts a token y,

        Attr(w) = w / m · Σ_{k=1…m} ∂P(y | w replaced by k/m · w) / ∂w

    so that the sum over a layer's neurons goes to P(y) − P(y | w replaced by 0) as m grows.  Each
    token of an answer is attributed given those before it, and the attributions are summed.

    All steps, tokens and prompts are rows of one batch, in which a causal model repeats only the
    last token of each.

    Args:
        host: a causal model, or an encoder-decoder, whose decoder's neurons are looked at.
        request: with its `ground_truth`, of which the first answer counts.
        contexts: texts to put before the prompt; each makes one prompt.
        layers: blocks; all by default.
        steps: m.
        max_tokens: of one padded batch.

    Raises:
        RequestError: the request names no former answer.
        SiteError: a layer does not exist or has no single MLP output matrix.
    """
    if not request.ground_truth:
        raise RequestError(f"The request {request.text!r} has no former answer to attribute.")
    answer = request.ground_truth[0]
    rows = [join(host, context + request.text, answer) for context in contexts]
    return attribute_rows(host, rows, layers, steps, max_tokens)


def attribute_rows(
    host: ModelHost,
    rows: Sequence[Row],
    layers: Sequence[int] | None = None,
    steps: int = 20,
    max_tokens: int = 4096,
) -> Attribution:
    """As `attribute`, of the targets of some rows; each row is one prompt.

    Raises:
        SiteError: a layer does not exist or has no single MLP output matrix.
    """
    chosen = range(len(host.blocks)) if layers is None else sorted(set(layers))
    sites = {layer: host.mlp_out(layer) for layer in chosen}
    points = [point for n, row in enumerate(rows) for point in _points(host, n, row, steps)]
    size = max(1, max_tokens // max(len(point.row.prompt) for point in points))
    widths = {layer: host.weight(site).shape[1] for layer, site in sites.items()}
    scores = {layer: torch.zeros(len(rows), width) for layer, width in widths.items()}
    activations = {layer: torch.zeros_like(empty) for layer, empty in scores.items()}
    for start in range(0, len(points), size):
        chunk = points[start : start + size]
        owner = torch.tensor([point.prompt for point in chunk])
        first = torch.tensor([point.is_first for point in chunk])
        scaled = _Scaled(host, chunk, min(sites))
        for layer, site in sites.items():
            own, gradient = scaled.neurons(layer, site)
            scores[layer].index_add_(0, owner, own * gradient / steps)
            activations[layer][owner[first]] = own[first]
    return Attribution(scores, activations)


def common_neurons(
    attribution: Attribution, threshold: float, share: float
) -> list[tuple[int, int]]:
    """Layer and index of the neurons in the coarse sets of more than a share of the prompts."""
    return [
        (layer, index)
        for layer, in_set in _coarse(attribution, threshold).items()
        for index in (in_set.float().mean(dim=0) > share).nonzero()[:, 0].tolist()
    ]


def select(
    attribution: Attribution,
    threshold: float,
    share: float,
    fewest: int,
    most: int,
    excluded: Iterable[tuple[int, int]] = (),
) -> list[Neuron]:
    """The few neurons that matter in most prompts, the one with the largest mean score first.

    A prompt's coarse set are the neurons above `threshold` times its largest attribution in any
    layer; kept are those in at least a share of the coarse sets.  The share is moved by 0.05 until
    `fewest` to `most` neurons remain.  Where no share does that, mean attributions decide: the
    best of too many are kept, and the best of the others are added to too few.

    Args:
        attribution: of the prompts of one fact.
        threshold, share, fewest, most: as above.
        excluded: layer and index of neurons that are left out from the beginning.
    """
    left = {layer: scores.clone() for layer, scores in attribution.scores.items()}
    for layer, index in excluded:
        if layer in left:
            left[layer][:, index] = 0
    attribution = Attribution(left, attribution.activations)
    layers = sorted(left)
    scores = torch.cat([left[layer] for layer in layers], dim=1)  # (prompts, all neurons)
    coarse = _coarse(attribution, threshold)
    shares = torch.cat([coarse[layer] for layer in layers], dim=1).float().mean(dim=0)

    def kept(at_least: float) -> Tensor:
        return shares >= at_least - 1e-6  # shares are quotients in float32

    while int(kept(share).sum()) > most and share < 1:
        share = min(1.0, share + SHARE_STEP)
    while int(kept(share).sum()) < fewest and share > SHARE_STEP:
        share -= SHARE_STEP
    enough = kept(share)
    mean = scores.mean(dim=0)
    rank = mean + enough * (mean.max() - mean.min() + 1)  # the kept ones before all others
    count = min(max(int(enough.sum()), fewest), most, len(rank))
    activations = torch.cat([attribution.activations[layer] for layer in layers], dim=1).mean(0)
    places = [(n, index) for n in layers for index in range(attribution.scores[n].shape[1])]
    chosen = sorted(rank.topk(count).indices.tolist(), key=lambda at: -float(mean[at]))
    return [
        Neuron(*places[at], float(mean[at]), float(shares[at]), float(activations[at]))
        for at in chosen
    ]


def _coarse(attribution: Attribution, threshold: float) -> dict[int, Tensor]:
    """For each layer (prompts, d_in): whether a neuron is in the prompt's coarse set."""
    found = attribution.scores
    largest = torch.stack([scores.max(dim=1).values for scores in found.values()]).max(dim=0).values
    bar = threshold * largest.clamp(min=0)[:, None]
    return {layer: scores > bar for layer, scores in found.items()}


@dataclass(frozen=True)
class _Point:
    """One step on the way from zero to the neurons as they are.

    Attributes:
        prompt: number of the prompt.
        row: its last position predicts its last target.
        scale: k / m.
        is_first: whether it is the first step of an answer's first token.
    """

    prompt: int
    row: Row
    scale: float
    is_first: bool


def _points(host: ModelHost, number: int, whole: Row, steps: int) -> Iterator[_Point]:
    """All steps of all targets of one prompt."""
    for n, token in enumerate(whole.targets):
        row = Row(whole.prompt + whole.targets[:n], (token,))
        if host.is_encoder_decoder:
            row = Row(whole.prompt, whole.targets[: n + 1])
        for k in range(1, steps + 1):
            yield _Point(number, row, k / steps, is_first=n == 0 and k == 1)


class _Scaled:
    """The model over some points, with one layer's neurons scaled at each row's last position.

    Args:
        host: the model.
        points: one row of the batch each.
        start: the first block that is looked at.
    """

    def __init__(self, host: ModelHost, points: Sequence[_Point], start: int) -> None:
        rows = [point.row for point in points]
        last = [len(row.prompt) - 1 for row in rows]
        self._host = host
        self._tail = Tail(host, rows, start, last)
        self._scales = torch.tensor([point.scale for point in points], device=host.device)
        lengths = torch.tensor([len(row.targets) for row in rows], device=host.device)
        self._labels = lengths.cumsum(0) - 1  # the last label of each row
        if host.is_encoder_decoder:
            at = torch.arange(len(rows), device=host.device) * int(lengths.max())
            self._places = at + lengths - 1
        else:
            self._places = self._tail.places(last)
        self._entering = self._streams() if self._tail.is_fast else {}

    def _streams(self) -> dict[int, Tensor]:
        """What enters each block; nothing where the blocks cannot be left out."""
        with torch.no_grad():
            with streams(self._host, range(len(self._host.blocks))) as found:
                expected = self._tail.logits()
            with self._only_from(max(found), found):
                repeated = self._tail.logits()
        near = (repeated - expected).abs().max() <= 1e-2 * expected.abs().max()
        return found if bool(near) else {}

    @contextlib.contextmanager
    def _only_from(self, layer: int, entering: Mapping[int, Tensor]) -> Iterator[None]:
        """Inside the context the blocks below hand on what is known to enter this one."""
        with contextlib.ExitStack() as stack:
            for block in self._host.blocks[:layer] if layer in entering else ():
                kept: Any = entering[layer]
                output = kept if self._host.anatomy.layer_output == "tensor" else (kept,)
                module = self._host.module(block.path)
                stack.enter_context(forward_as(module, lambda *a, out=output, **k: out))
            yield

    def neurons(self, layer: int, site: Site) -> tuple[Tensor, Tensor]:
        """The neurons that a layer's output projection reads, and their gradients when scaled.

        Returns:
            Twice (points, d_in), float32, on the CPU.
        """
        seen: dict[str, Tensor] = {}

        def scale(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            states = args[0].reshape(-1, args[0].shape[-1])
            # The last block's MLP may be run at the label positions alone.
            alone = len(states) == len(self._scales)
            at = (torch.arange(len(states)) if alone else self._places).to(states.device)
            own = states[at].detach()
            seen["own"] = own
            seen["scaled"] = (own * self._scales.to(own)[:, None]).requires_grad_()
            changed = states.index_put((at,), seen["scaled"])
            return (changed.reshape(args[0].shape), *args[1:])

        handle = self._host.module(site.module).register_forward_pre_hook(scale)
        try:
            with torch.enable_grad(), self._only_from(layer, self._entering):
                logits = self._tail.logits()[self._labels].float()
                labels = self._tail.labels[self._labels]
                answer = logits.softmax(dim=-1).gather(1, labels[:, None]).sum()
        finally:
            handle.remove()
        (gradient,) = torch.autograd.grad(answer, [seen["scaled"]])
        return seen["own"].float().cpu(), gradient.float().cpu()
