"""LoRA, AdaLoRA and QLoRA: each edit is an adapter of its own."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from kedit_core.editing import EditJob, ModelHost, ModuleSwap, Patch
from kedit_core.effects import unwrapped
from kedit_core.errors import EditError, ModelError, SiteError
from kedit_core.forward import forward_as
from kedit_core.numerics.losses import mean_nll
from kedit_core.numerics.tail import Tail
from kedit_core.tokens import join
from kedit_lora.hparams import AdaLoraHyperParams, LoraHyperParams

NAME = "default"  # of the adapter, in peft's layers
FIRST, LAST = 0.1, 0.3  # shares of AdaLoRA's steps before ranks are pruned, and after


class Lora:
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): y = W x + (α/r) B A x.

    peft makes the layers and computes with them.  It is given the target modules, not the model,
    and what it made stands in the model only while it is trained.
    """

    def __init__(self, hparams: LoraHyperParams) -> None:
        self.hparams = hparams

    def edit(self, job: EditJob) -> Patch:
        """Train one adapter on all requests together.

        Raises:
            SiteError: a block does not exist, or no linear layer has one of the names.
            EditError: the loss is not finite.
        """
        host, hparams = job.host, self.hparams
        targets = _targets(host, hparams)
        rows = [join(host, request.text, request.target_new) for request in job.requests]
        size = hparams.batch_size
        batches = [rows[n : n + size] for n in range(0, len(rows), size)]
        first = min(targets.values())
        modules = _Modules(host.base_module(path) for path in targets)
        modules.is_loaded_in_4bit = getattr(host.model, "is_loaded_in_4bit", False)
        modules.is_loaded_in_8bit = getattr(host.model, "is_loaded_in_8bit", False)
        common = {
            "target_modules": [str(n) for n in range(len(modules))],
            "fan_in_fan_out": any(isinstance(module, Conv1D) for module in modules),
            "lora_alpha": hparams.alpha,
            "lora_dropout": hparams.dropout,
        }
        with _random_state_of(job), _differentiable(host, first):
            tails = [Tail(host, batch, first, [0] * len(batch)) for batch in batches]
            tuner = self._tuner(modules, common, hparams.steps * len(tails))
            for parameter in _trained(tuner):
                parameter.data = parameter.data.float()  # peft gives them the type of the weights
            layers = dict(zip(targets, tuner.model, strict=True))
            with _in_place(host, layers):
                history = self._train(tuner, tails)
        swaps = [_swap(path, *self._factors(layer)) for path, layer in layers.items()]
        effects = tuple(swap for swap in swaps if bool(swap.state["B"].any()))
        ranks = {swap.path: len(swap.state["A"]) for swap in effects}
        return Patch("lora", effects, notes={"losses": history, "ranks": ranks})

    def _tuner(self, modules: _Modules, common: Mapping[str, Any], total: int) -> LoraModel:
        """peft's layers round the modules.

        Args:
            modules: they are replaced in there, and nowhere else.
            common: arguments of peft's configurations.
            total: number of gradient steps.
        """
        return LoraModel(modules, LoraConfig(r=self.hparams.rank, **common), NAME)

    def _may_stop(self, step: int, total: int) -> bool:
        """Whether training may end after `step` of `total` gradient steps."""
        return True

    def _after_step(self, tuner: LoraModel, step: int) -> None:
        """What else follows gradient step `step`, counted from 1."""

    def _factors(self, layer: Any) -> tuple[Tensor, Tensor, float]:
        """A (r, d_in), B (d_out, r) and the scale of one of peft's layers."""
        return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, layer.scaling[NAME]

    def _train(self, tuner: LoraModel, tails: Sequence[Tail]) -> list[float]:
        """Adam over the batches until the mean loss is small; its history, in nats per token."""
        hparams, total = self.hparams, self.hparams.steps * len(tails)
        optimiser = torch.optim.Adam(_trained(tuner), lr=hparams.lr)
        history: list[float] = []
        for epoch in range(hparams.steps):
            measured = []
            for number, tail in enumerate(tails):
                step = epoch * len(tails) + number + 1
                optimiser.zero_grad()
                found = tuner(tail)
                if not bool(torch.isfinite(found.loss)):
                    raise EditError(
                        f"The loss became {found.loss.item()} in step {step}. Lower the learning "
                        f"rate, or load the model in float32."
                    )
                measured.append(found.nll)
                if found.nll >= hparams.stop_loss or not self._may_stop(step, total):
                    found.loss.backward()
                    optimiser.step()
                    self._after_step(tuner, step)
            history.append(sum(measured) / len(measured))
            if history[-1] < hparams.stop_loss and self._may_stop(step, total):
                break
        return history


class AdaLora(Lora):
    """Adaptive budgets (Zhang et al. 2023, arXiv:2303.10512): ΔW = (α/r) P Λ Q, Λ pruned.

    peft adds the penalty of orthogonality to the loss and gives the budget to the triples of
    P, Λ and Q that matter most, over all layers.  Training ends no sooner than the pruning.
    """

    hparams: AdaLoraHyperParams

    def _tuner(self, modules: _Modules, common: Mapping[str, Any], total: int) -> LoraModel:
        config = AdaLoraConfig(
            init_r=self.hparams.initial_rank,
            target_r=self.hparams.rank,
            total_step=total,
            tinit=int(FIRST * total),
            tfinal=int(LAST * total),
            deltaT=max(1, total // 100),
            orth_reg_weight=self.hparams.orthogonality,
            **common,
        )
        return AdaLoraModel(modules, config, NAME)

    def _may_stop(self, step: int, total: int) -> bool:
        return step > total - int(LAST * total)

    def _after_step(self, tuner: LoraModel, step: int) -> None:
        tuner.update_and_allocate(step)

    def _factors(self, layer: Any) -> tuple[Tensor, Tensor, float]:
        kept = layer.lora_E[NAME][:, 0] != 0
        right = (layer.lora_A[NAME] * layer.lora_E[NAME])[kept]
        scale = layer.scaling[NAME] / (layer.ranknum[NAME].item() + 1e-5)  # as peft's forward
        return right, layer.lora_B[NAME][:, kept], scale


class QLora(Lora):
    """LoRA beside 4-bit weights (Dettmers et al. 2023, arXiv:2305.14314)."""

    def edit(self, job: EditJob) -> Patch:
        """As `Lora.edit`.

        Raises:
            ModelError: bitsandbytes is missing, or it did not quantise the model.
        """
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ModelError(
                "qlora works on 4-bit weights of bitsandbytes, which is not installed: pip "
                "install bitsandbytes."
            )
        if not getattr(job.host.model, "is_loaded_in_4bit", False):
            raise ModelError(
                f"qlora works on 4-bit weights of bitsandbytes, and {job.host.name} has none. "
                f"Load a 4-bit checkpoint of the model, or use lora."
            )
        return super().edit(job)


class _Modules(nn.ModuleList):
    """What peft is given in place of a model: the target modules, with the loss as forward."""

    is_loaded_in_4bit: bool
    is_loaded_in_8bit: bool

    def forward(self, tail: Tail) -> SimpleNamespace:
        """The mean loss of the tail's rows, to which peft may add, and its number."""
        n_rows = int(tail.label_rows.max()) + 1
        nll = mean_nll(tail.logits(), tail.labels, tail.label_rows, n_rows).mean()
        return SimpleNamespace(loss=nll, nll=float(nll.detach()))


def _targets(host: ModelHost, hparams: LoraHyperParams) -> dict[str, int]:
    """Paths of the linear layers that get an adapter, and the block of each."""
    chosen = sorted(set(hparams.layers)) or range(len(host.blocks))
    found = {
        path: layer
        for layer in chosen
        for path in _linear_layers(host.module(host.block(layer).path), host.block(layer).path)
    }
    names = hparams.target_modules
    for name in names:
        if not any(_is_named(path, name) for path in found):
            known = sorted({path.rpartition(".")[2] for path in found})
            raise SiteError(
                f"No linear layer in these blocks of {host.name} is named '{name}'; there are "
                f"{', '.join(known)}. Set `target_modules`."
            )
    if not found:
        raise SiteError(f"The blocks of {host.name} have no linear layers to adapt.")
    return {
        path: layer
        for path, layer in found.items()
        if not names or any(_is_named(path, name) for name in names)
    }


def _is_named(path: str, name: str) -> bool:
    return f".{path}".endswith(f".{name}")


def _linear_layers(module: nn.Module, path: str) -> Iterator[str]:
    """Paths, without wrappers, of the linear layers inside a module."""
    module = unwrapped(module)
    if isinstance(module, nn.Linear | Conv1D):
        yield path
    for name, child in module.named_children():
        yield from _linear_layers(child, f"{path}.{name}")


def _trained(tuner: LoraModel) -> list[nn.Parameter]:
    """The adapters' parameters, and none of the model's."""
    named = tuner.named_parameters()
    return [p for name, p in named if p.requires_grad and ".lora_" in name]


def _swap(path: str, right: Tensor, left: Tensor, scale: float) -> ModuleSwap:
    state = {
        "A": right.detach().float().cpu().contiguous(),
        "B": left.detach().float().cpu().contiguous(),
        "scale": torch.tensor(float(scale)),
    }
    return ModuleSwap(path, "lora", {}, state)


@contextlib.contextmanager
def _in_place(host: ModelHost, layers: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block peft's layers stand in the model, outside all wrappers of earlier edits."""
    places: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for path, layer in layers.items():
            parent_path, _, name = path.rpartition(".")
            parent = host.base_module(parent_path)
            places.append((parent, name, parent._modules[name]))
            layer.base_layer = parent._modules[name]
            parent._modules[name] = layer
        yield
    finally:
        for parent, name, module in places:
            parent._modules[name] = module


@contextlib.contextmanager
def _differentiable(host: ModelHost, first: int) -> Iterator[None]:
    """Inside the block gradients pass through 4-bit layers from block `first` up.

    On some CPUs bitsandbytes (0.50) turns a layer, when it is first used, into an order of bits
    that only inference understands: a backward pass through it silently gives no gradient.  Its
    own way back does not restore the bits, so such layers compute with a dense copy meanwhile.
    """
    below = {m for block in host.blocks[:first] for m in host.module(block.path).modules()}
    with contextlib.ExitStack() as stack:
        for module in host.model.modules():
            if isinstance(module, nn.Linear) and module not in below and _is_for_inference(module):
                stack.enter_context(forward_as(module, _dense_copy(module, host.dtype)))
        yield


@torch.no_grad()
def _dense_copy(module: nn.Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What the layer computes, by its answers to unit vectors."""
    bias = module(torch.zeros(1, module.in_features, dtype=dtype))
    weight = (module(torch.eye(module.in_features, dtype=dtype)) - bias).mT.contiguous()
    return lambda x: linear(x, weight, bias[0])


def _is_for_inference(module: nn.Linear) -> bool:
    state = getattr(module.weight, "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


@contextlib.contextmanager
def _random_state_of(job: EditJob) -> Iterator[None]:
    """Inside the block global random numbers, which peft's layers draw, are the job's.

    Some kinds of device have no random state that can be set; dropout is not repeatable there.
    """
    kind = job.host.device.type
    module = torch.get_device_module(kind)
    can_be_set = hasattr(module, "set_rng_state_all")
    devices = list(range(module.device_count())) if can_be_set else []
    with torch.random.fork_rng(devices, device_type=kind):
        torch.set_rng_state(job.generator().get_state())
        for number in devices:
            own = torch.Generator(f"{kind}:{number}").manual_seed(job.seed)
            module.set_rng_state(own.get_state(), number)
        yield
