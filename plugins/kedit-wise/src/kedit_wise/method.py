"""WISE: edits in a side memory, and when to ask it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from kedit_core.editing import EditJob, ModelHost, ModuleSwap, Patch, Site, Wrapper
from kedit_core.errors import EditError
from kedit_core.forward import added
from kedit_core.numerics.losses import mean_nll
from kedit_core.numerics.sample import OPENINGS, context_texts, sample
from kedit_core.numerics.states import watch_tokens
from kedit_core.numerics.tail import Tail
from kedit_core.tokens import Row, encode, join
from kedit_wise.hparams import WiseHyperParams
from kedit_wise.memory import (
    Indicator,
    Shard,
    SideMemory,
    ids,
    mask_of,
    numbered,
    pack_mask,
    row_means,
)

STARTS = (*OPENINGS, "Who", "What", "Which", "Where", "When", "How", "Why", "Whose")
POOL = 64  # irrelevant texts of a model, from which edits take turns


class Wise:
    """Lifelong editing in side memories (Wang et al. 2024, arXiv:2405.14768).

    A copy W' of one MLP matrix W learns the edits; W itself stays.  Edits share a shard, which
    may change a random part of W'; full shards are merged.  Trained is the change W' − W beside
    the frozen matrix, in float32.
    """

    def __init__(self, hparams: WiseHyperParams) -> None:
        self.hparams = hparams

    def edit(self, job: EditJob) -> Patch:
        """Write one fact into the current shard.

        Raises:
            SiteError: the layer does not exist or has no single such matrix.
            EditError: the loss is not finite, or the corpus holds no text.
        """
        (request,) = job.requests  # max_batch=1 in the spec: the core never sends more
        host, hparams = job.host, self.hparams
        layer = hparams.layer
        site = host.mlp_out(layer) if hparams.matrix == "mlp_out" else host.mlp_in(layer)
        earlier = self._earlier(host, site)
        number, mask, start = self._shard(job, site, earlier)
        texts = ("", *context_texts(job, hparams.contexts))
        rows = [join(host, text + request.text, request.target_new) for text in texts]
        strange = _irrelevant(job, hparams, len(job.earlier))
        replayed = [
            [Row(encode(host, text).ids) for text in _draw(job, texts, hparams.replay)]
            for texts in self._replay(job, earlier, number)
        ]
        activation = _activation(host) if hparams.indicator == "legacy" else ""
        indicator = Indicator(activation)

        with _without_memory(host, site):
            prompts = [Row(row.prompt) for row in rows]
            task = _Task(
                tail=Tail(host, rows, hparams.layer, [0] * len(rows)),
                rows=len(rows),
                edited=_Stirred.of(host, site, [*prompts, *replayed[0]], indicator),
                irrelevant=_Stirred.of(host, site, [*strange, *replayed[1]], indicator),
            )
            change, kept, notes = self._train(host, site, mask, start, task)
        with torch.no_grad():
            stirred = task.edited(change)[: len(rows)].mean()
            strange_stirred = task.irrelevant(change).mean()
        swap = ModuleSwap(
            path=site.module,
            type="wise",
            config={
                "shard": number,
                "stirred": float(stirred),
                "kept": kept,
                "transposed": site.transposed,
                "activation": activation,
                "retrieve": hparams.retrieve,
                "threshold_ratio": hparams.threshold_ratio,
                "choice": hparams.choice,
                "max_change": hparams.max_change,
                "edits_per_shard": hparams.edits_per_shard,
                "shards_per_memory": hparams.shards_per_memory,
                "merge": hparams.merge,
                "density": hparams.density,
            },
            state={
                "mask": pack_mask(mask).cpu(),
                "values": (change - start)[mask].cpu(),
            },
        )
        return Patch("wise", (swap,), notes=notes | {"irrelevant_stirred": float(strange_stirred)})

    def _earlier(self, host: ModelHost, site: Site) -> list[ModuleSwap]:
        """The edits with which a new one will share its wrapper, and may share a memory."""
        module = host.module(site.module)
        swaps = module.memories.swaps if isinstance(module, SideMemory) else ()
        return [swap for swap in swaps if swap.config["retrieve"] is self.hparams.retrieve]

    def _replay(
        self, job: EditJob, earlier: Sequence[ModuleSwap], number: int
    ) -> tuple[list[str], list[str]]:
        """Prompts of earlier edits of the memory of shard `number`, and of other memories."""
        size, shared = self.hparams.shards_per_memory, {id(swap) for swap in earlier}
        inside, outside = list[str](), list[str]()
        for patch in job.earlier:
            for effect in patch.effects:
                if isinstance(effect, ModuleSwap) and id(effect) in shared:
                    is_apart = int(effect.config["shard"]) // size != number // size
                    found = outside if is_apart and self.hparams.retrieve else inside
                    found += [request.text for request in patch.requests]
        return inside, outside

    def _shard(
        self, job: EditJob, site: Site, earlier: Sequence[ModuleSwap]
    ) -> tuple[int, Tensor, Tensor]:
        """The shard with room for another edit, the latest one or a new one.

        Returns:
            Its number, its mask and its change so far, both (d_out, d_in).
        """
        weight, shards = job.host.weight(site), numbered(earlier)
        latest = max(shards, default=-1)
        if shards and len(shards[latest]) < self.hparams.edits_per_shard:
            swaps, module = shards[latest], job.host.module(site.module)
            begun = cast(SideMemory, module).memories.shards.get(ids(swaps))
            return latest, mask_of(swaps[0], weight), Shard.of(weight, swaps, begun).change
        generator = torch.Generator(weight.device).manual_seed(job.seed + 1000003 * (latest + 1))
        drawn = torch.rand(weight.shape, generator=generator, device=weight.device)
        change = torch.zeros(weight.shape, device=weight.device)
        return latest + 1, drawn < self.hparams.mask_ratio, change

    def _train(
        self, host: ModelHost, site: Site, mask: Tensor, start: Tensor, task: _Task
    ) -> tuple[Tensor, float, dict[str, Any]]:
        """Gradient descent on the shard's change, from `start`, where the mask allows it.

        Returns:
            The change (d_out, d_in), the share of W that these steps left outside the mask, and
            for the notes the loss before each step and the latest NLL in it.
        """
        hparams = self.hparams
        weight = host.weight(site).float()
        change = start.clone().requires_grad_(True)
        decaying = {"masked": mask, "legacy": torch.ones_like(mask)}.get(hparams.decay)
        kept, latest, losses = 1.0, 0.0, list[float]()
        with added(host, site, change):
            velocity = torch.zeros_like(start)
            for step in range(hparams.steps):
                nll, missed = task.losses(change, hparams)
                loss = nll + missed
                losses.append(float(loss.detach()))
                latest = float(nll.detach())
                if not torch.isfinite(loss):
                    raise EditError(
                        f"The loss became {losses[-1]} in step {step}. Lower the learning rate, or "
                        f"load the model in float32."
                    )
                moved = abs(losses[-1] - losses[-2]) if step else float("inf")
                if losses[-1] <= hparams.stop_loss and moved <= hparams.stop_change:
                    break
                (gradient,) = torch.autograd.grad(loss, change)
                with torch.no_grad():
                    gradient = gradient * mask
                    if decaying is not None:
                        gradient += hparams.weight_decay * decaying * (weight + change)
                    velocity = hparams.momentum * velocity + gradient
                    change.sub_(hparams.lr * velocity)
                    change.clamp_(-hparams.max_change, hparams.max_change)
                if hparams.decay == "legacy":
                    kept *= 1 - hparams.lr * hparams.weight_decay
        return change.detach(), kept, {"losses": losses, "nll": latest}


@dataclass(frozen=True)
class _Stirred:
    """How much some texts stir a memory, as a function of its change.

    Attributes:
        keys: k of all tokens, (tokens, d_in).
        outputs: W k, (tokens, d_out).
        owner: (tokens,) text of each.
        count: of texts.
    """

    keys: Tensor
    outputs: Tensor
    owner: Tensor
    count: int
    indicator: Indicator

    @classmethod
    def of(cls, host: ModelHost, site: Site, rows: Sequence[Row], indicator: Indicator) -> _Stirred:
        seen: dict[str, Tensor] = {}
        points = {"keys": (site.module, "input"), "outputs": (site.module, "output")}
        watch_tokens(host, rows, points, seen.__setitem__)
        keys, outputs = seen["keys"].float(), seen["outputs"].float()
        owner = torch.tensor([n for n, row in enumerate(rows) for _ in row.ids]).to(keys.device)
        return cls(keys, outputs, owner, len(rows), indicator)

    def __call__(self, change: Tensor) -> Tensor:
        """Mean over the tokens of each text: (texts,)."""
        stirred = self.indicator(self.outputs, self.keys @ change.mT)
        return row_means(stirred, self.owner, self.count)


@dataclass(frozen=True)
class _Task:
    """What one edit optimises.

    Attributes:
        tail: the edit's rows, in which the change is in force.
        rows: how many.
        edited: texts that should stir the memory.
        irrelevant: texts that should not.
    """

    tail: Tail
    rows: int
    edited: _Stirred
    irrelevant: _Stirred

    def losses(self, change: Tensor, hparams: WiseHyperParams) -> tuple[Tensor, Tensor]:
        """NLL of the targets, and the margins of eq. 5, each averaged over the rows, or pairs of
        rows, that miss it."""
        tail = self.tail
        nll = mean_nll(tail.logits(), tail.labels, tail.label_rows, self.rows).mean()
        inside, outside = self.edited(change), self.irrelevant(change)
        missed = (
            outside - hparams.irrelevant_max,
            hparams.edited_min - inside,
            hparams.margin - (inside[:, None] - outside),
        )
        means = [part.clamp(min=0).sum() / (part > 0).sum().clamp(min=1) for part in missed]
        return nll, torch.stack(means).sum().to(nll.device)


def _activation(host: ModelHost) -> str:
    """Name of the model's activation function, as its config gives it."""
    config = host.model.config.get_text_config()
    names = ("hidden_act", "activation_function", "hidden_activation")
    return next((str(v) for n in names if (v := getattr(config, n, None)) is not None), "gelu")


def _irrelevant(job: EditJob, hparams: WiseHyperParams, turn: int) -> list[Row]:
    """Beginnings of the corpus's lines, or what the unedited model writes; others at each turn.

    Raises:
        EditError: the corpus has no text.
    """
    host, tokens = job.host, hparams.irrelevant_tokens
    key = {
        "model": job.fingerprint,
        "corpus": job.corpus.key(),
        "tokens": tokens,
        "seed": job.seed,
        "version": 1,
    }
    stored = job.artifacts.get("irrelevant", key)
    if stored is None:
        if job.corpus.is_generated:
            starts = [STARTS[n % len(STARTS)] for n in range(POOL)]
            with job.unedited():
                found = sample(host, starts, tokens, job.generator(), top_k=50)
        else:
            lines = (line for text in job.corpus.documents() for line in text.splitlines())
            full = (line for line in lines if line.strip())
            found = [
                encode(host, line, any_length=True).ids[:tokens] for line in islice(full, POOL)
            ]
        if not found:
            raise EditError(f"The corpus '{job.corpus.source}' holds no text. Give another one.")
        width = max(map(len, found))
        padded = [[*ids, *[-1] * (width - len(ids))] for ids in found]
        stored = {"ids": torch.tensor(padded)}
        job.artifacts.put("irrelevant", key, stored)
    pool = [tuple(token for token in ids if token >= 0) for ids in stored["ids"].tolist()]
    first = turn * hparams.irrelevant
    return [Row(pool[(first + n) % len(pool)]) for n in range(hparams.irrelevant)]


def _draw(job: EditJob, texts: Sequence[str], count: int) -> list[str]:
    order = torch.randperm(len(texts), generator=job.generator())
    return [texts[n] for n in order[:count].tolist()]


@contextlib.contextmanager
def _without_memory(host: ModelHost, site: Site) -> Iterator[None]:
    """Inside the block the site's module is not helped by its side memories."""
    module, memories = host.module(site.module), list[SideMemory]()
    while isinstance(module, Wrapper):
        if isinstance(module, SideMemory) and not module.passes_through:
            memories.append(module)
        module = module.base
    try:
        for memory in memories:
            memory.passes_through = True
        yield
    finally:
        for memory in memories:
            memory.passes_through = False
