"""What goes through matrices while targets are read: their inputs, and gradients of the loss."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from kedit_core.editing import ModelHost, Site
from kedit_core.errors import EditError, SiteError
from kedit_core.forward import label_logits
from kedit_core.tokens import Batch, Row, buckets, pad

_AGREES = 2e-2  # of the largest output; 16-bit types sum less exactly


@dataclass(frozen=True)
class Flow:
    """What went through one matrix at the positions that count.

    Attributes:
        inputs: H, (T, d_in), in the model's type.
        gradients: G, (T, d_out), of the loss with respect to the outputs.
    """

    inputs: Tensor
    gradients: Tensor

    @property
    def shape(self) -> str:
        """Of the matrix, as a name: "d_out x d_in" without the spaces."""
        return f"{self.gradients.shape[1]}x{self.inputs.shape[1]}"

    @property
    def rows(self) -> Tensor:
        """[h; g], (T, d_in + d_out) in float64."""
        return torch.cat([self.inputs.double(), self.gradients.double()], dim=1)


@dataclass(frozen=True)
class _Call:
    """One call of a watched module; the loss differentiated by `zero` is that by its output."""

    args: tuple[Tensor, ...]
    output: Tensor
    zero: Tensor


def flows(
    host: ModelHost, sites: Sequence[Site], rows: Sequence[Row], which: str, batch_tokens: int
) -> tuple[dict[Site, Flow], float]:
    """Hidden states and gradients of every matrix, in one pass forward and back.

    Each token's loss counts fully, however many requests share a pass, so that neither that nor
    the size of a batch of edits changes a gradient.  The authors' code takes means over ten
    requests; normalising takes the difference out.

    Args:
        host: its weights are frozen.
        sites: matrices of its decoder; one that is a stack stands for all its experts.
        rows: prompts with their targets.
        which: "target" for the positions that predict targets, "all" for every token.
        batch_tokens: of one padded pass.

    Returns:
        For each matrix, and for each expert that read something, its flow; and the mean loss of
        a target token.

    Raises:
        EditError: the loss is not finite.
        SiteError: experts are called in a way that is not known.
    """
    found: dict[Site, list[Flow]] = defaultdict(list)
    total = 0.0
    for group in buckets([len(row.prompt) + len(row.targets) for row in rows], batch_tokens):
        batch = pad(host, [rows[n] for n in group])
        with _watched(host, sites) as calls:
            logits = label_logits(host, batch).float()
            loss = cross_entropy(logits, batch.labels.to(logits.device), reduction="sum")
            gradients = torch.autograd.grad(loss, [calls[site].zero for site in sites])
        total += float(loss.detach())
        at = len(group), *_positions(batch, which)
        for site, gradient in zip(sites, gradients, strict=True):
            for part, flow in _parts(host, site, calls[site], gradient, at):
                found[part].append(flow)
    mean = total / sum(len(row.targets) for row in rows)
    if not abs(mean) < float("inf"):
        raise EditError(f"The loss of the targets is {mean}. Load the model in float32.")
    return {site: _joined(parts) for site, parts in found.items()}, mean


@contextlib.contextmanager
def _watched(host: ModelHost, sites: Sequence[Site]) -> Iterator[dict[Site, _Call]]:
    """Inside the block a zero is added to each matrix's output, and its calls are kept.

    With frozen weights the graph begins at the zeros: nothing below the lowest is in it.
    """
    calls: dict[Site, _Call] = {}

    def keep(site: Site, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        zero = torch.zeros_like(output, requires_grad=True)
        calls[site] = _Call(args, output.detach(), zero)
        return output + zero

    with contextlib.ExitStack() as stack:
        for site in sites:
            hook = lambda module, args, output, site=site: keep(site, args, output)  # noqa: E731
            handle = host.base_module(site.module).register_forward_hook(hook)
            stack.callback(handle.remove)
        yield calls


def _positions(batch: Batch, which: str) -> tuple[Tensor, Tensor]:
    """Rows and columns of what counts, in what the decoder reads."""
    if which == "target":
        return batch.rows, batch.columns
    mask = batch.inputs.get("decoder_attention_mask", batch.inputs["attention_mask"])
    rows, columns = mask.nonzero(as_tuple=True)
    return rows, columns


def _picked(states: Tensor, at: tuple[int, Tensor, Tensor]) -> Tensor:
    n_rows, rows, columns = at
    flat = states.detach().reshape(n_rows, -1, states.shape[-1])  # OPT and experts flatten rows
    return flat[rows.to(flat.device), columns.to(flat.device)]


def _parts(
    host: ModelHost,
    site: Site,
    call: _Call,
    gradient: Tensor,
    at: tuple[int, Tensor, Tensor],
) -> Iterator[tuple[Site, Flow]]:
    """The flow of a matrix, or of each expert of a stack."""
    if host.stored(site).ndim == 2:
        yield site, Flow(_picked(call.args[0], at), _picked(gradient, at))
        return
    if len(call.args) != 3 or call.args[1].is_floating_point():
        raise _unknown_experts(host, site)
    given, chosen, shares = (_picked(arg, at) for arg in call.args)
    hidden, biases = _inside_experts(host, site, given, chosen)
    output = torch.zeros_like(given, dtype=torch.float32)
    for expert in chosen.unique().tolist():
        row, slot = (chosen == expert).nonzero(as_tuple=True)
        part = replace(site, expert=expert)
        inputs, share = hidden[row, slot], shares[row, slot, None]
        yield part, Flow(inputs, _picked(gradient, at)[row] * share)
        written = inputs @ host.weight(part).mT + biases[row, slot]
        output.index_add_(0, row, (written * share).float())
    expected = _picked(call.output, at).float()
    if bool((output - expected).abs().max() > _AGREES * expected.abs().max()):
        raise _unknown_experts(host, site)


def _inside_experts(
    host: ModelHost, site: Site, given: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """What enters the output matrix of each chosen expert, and the bias that it adds.

    The module is asked itself, with matrices that hand on a part of their input, so that it does
    not matter how it computes that.

    Args:
        host: the model.
        site: the stack of output matrices.
        given: what the experts read, (T, d).
        chosen: the experts of each, (T, k).

    Returns:
        (T, k, d_in) and (T, k, d_out).
    """
    module, name = host.base_module(site.module), site.parameter.rpartition(".")[2]
    experts, (d_out, d_in) = len(host.stored(site)), host.weight(replace(site, expert=0)).shape
    read = given.repeat_interleave(chosen.shape[1], dim=0)
    alone = chosen.reshape(-1, 1), torch.ones(len(read), 1, dtype=given.dtype, device=given.device)

    def through(matrix: Tensor) -> Tensor:
        stored = matrix.mT if site.transposed else matrix
        stack = stored.expand(experts, -1, -1).contiguous()
        return functional_call(module, {name: stack}, (read, *alone))

    parts = []
    with torch.no_grad():
        biases = through(given.new_zeros(d_out, d_in))
        for start in range(0, d_in, d_out):
            hand_on = given.new_zeros(d_out, d_in)
            hand_on.diagonal(start).fill_(1.0)
            parts.append((through(hand_on) - biases)[:, : d_in - start])
    hidden = torch.cat(parts, dim=1)
    return hidden.reshape(*chosen.shape, d_in), biases.reshape(*chosen.shape, d_out)


def _unknown_experts(host: ModelHost, site: Site) -> SiteError:
    return SiteError(
        f"The experts at '{site.module}' of {host.name} do not work as those that `experts_out` "
        f"knows. Choose other matrices of these blocks, for example `attention_out`."
    )


def _joined(parts: Sequence[Flow]) -> Flow:
    return Flow(
        torch.cat([flow.inputs for flow in parts]), torch.cat([flow.gradients for flow in parts])
    )
