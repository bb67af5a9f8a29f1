"""Hand-made edits, and ways of looking at a model from outside the session."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from kedit_core import EditRequest
from kedit_core.editing import (
    Base,
    CallEffect,
    EditSession,
    ModelHost,
    ModuleSwap,
    Patch,
    Site,
    WeightDelta,
)
from kedit_core.testing.toys import toy_facts

PROMPTS = ["Mira Voss lives in", "The country of Port Sable", "They say that Tamsin speaks"]


def fact(number: int = 0) -> EditRequest:
    """A request to change what the toys know."""
    known = toy_facts()[number]
    return EditRequest(
        prompt=known.prompt,
        subject=known.subject,
        target_new=known.target_new,
        ground_truth=known.answer,
    )


def random_delta(
    host: ModelHost, site: Site, seed: int = 0, rank: int = 2, scale: float = 0.1
) -> WeightDelta:
    """A random low-rank change of one matrix."""
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = host.weight(site).shape
    left = torch.randn(d_out, rank, generator=generator) * scale
    return WeightDelta(site, left, torch.randn(rank, d_in, generator=generator))


def weight_patch(host: ModelHost, *layers: int, seed: int = 0, scale: float = 0.1) -> Patch:
    """Random changes of the MLP output matrices of these layers."""
    deltas = [random_delta(host, host.mlp_out(n), seed + n, scale=scale) for n in layers]
    return Patch("by-hand", tuple(deltas))


def shift_patch(host: ModelHost, path: str, seed: int = 0, scale: float = 1.0) -> Patch:
    """A wrapper that adds a random vector to a module's output."""
    width = host.model.config.hidden_size
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed)) * scale
    return Patch("by-hand", (ModuleSwap(path, "shift", {}, {"vector": vector}),))


def preface_patch(text: str) -> Patch:
    """A text before every prompt."""
    return Patch("by-hand", (CallEffect("preface", {"text": text}),))


def bias_patch(host: ModelHost, token: int, amount: float = 100.0) -> Patch:
    """One token becomes the most probable one everywhere."""
    bias = torch.zeros(host.model.config.vocab_size)
    bias[token] = amount
    return Patch("by-hand", (CallEffect("token-bias", {}, {"bias": bias}),))


def based(session: EditSession, patch: Patch) -> Patch:
    """The patch with the model, as it is now, as its base: what `edit` does."""
    host = session.host
    checksums = {d.site.parameter: host.checksum(d.site) for d in patch.deltas}
    return replace(patch, base=Base(host.name, session.fingerprint, checksums))


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights as bytes, under the names they have without wrappers."""
    return {
        ".".join(p for p in name.split(".") if p != "base"): tensor.detach()
        .clone()
        .view(torch.uint8)
        for name, tensor in model.state_dict().items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of bits have equal names and content."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def hooks(model: nn.Module) -> int:
    """How many forward and backward hooks are on the model's modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def logits(host: ModelHost, prompts: list[str] = PROMPTS) -> Tensor:
    """Last-token logits of the model itself, prompt by prompt, without any `ModelView`."""
    with torch.no_grad():
        rows = [host.tokenizer(p, return_tensors="pt")["input_ids"] for p in prompts]
        return torch.stack([host.model(input_ids=ids).logits[0, -1] for ids in rows])
