"""Everything about a model and its surroundings that an edit could change, as comparable data."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from kedit_core.effects import CallEffect, Effect, WeightDelta, Wrapper
from kedit_core.host import ModelHost
from kedit_core.patch import Patch

ModelState = Mapping[str, Mapping[str, object]]

WEIGHTS = ("weights", "buffers")


def tensor_bits(tensor: Tensor) -> tuple[str, bytes]:
    """Type, shape and bytes; unlike `torch.equal` it tells -0 from 0 and takes NaN as it is."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return f"{tensor.dtype} {tuple(tensor.shape)}", flat.view(torch.uint8).numpy().tobytes()


def model_state(host: ModelHost) -> ModelState:
    """What must be as before once an edit was computed, or taken back, aspect by aspect."""
    model, tokenizer = host.model, host.tokenizer
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    return {
        "weights": {name: tensor_bits(p) for name, p in parameters.items()},
        "buffers": {name: tensor_bits(b) for name, b in model.named_buffers()},
        "modules": {name: _identity(module) for name, module in modules.items()},
        "parameters": {name: id(p) for name, p in parameters.items()},
        "hooks": {name: _hooks(vars(module)) for name, module in modules.items()},
        "forwards": {name: vars(module).get("forward") for name, module in modules.items()},
        "training": {name: module.training for name, module in modules.items()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "gradients": {
            name: None if p.grad is None else tensor_bits(p.grad) for name, p in parameters.items()
        },
        "tokenizer": _tokenizer(tokenizer),
        "configuration": {
            "config": _json(model.config.to_dict()),
            "generation": _json(model.generation_config.to_dict()) if model.can_generate() else "",
        },
        "random numbers": {
            "python": random.getstate(),
            "numpy": repr(np.random.get_state()),
            "torch": tensor_bits(torch.get_rng_state()),
        },
        "torch settings": {
            "dtype": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(),
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "hooks of all modules": _hooks(vars(torch.nn.modules.module)),
        },
    }


@contextlib.contextmanager
def torch_settings_kept() -> Iterator[None]:
    """After the block the "torch settings" of `model_state` are as before."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.get_deterministic_debug_mode()
    hooks = [(found, dict(found)) for found in _hook_dicts(vars(torch.nn.modules.module)).values()]
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
            torch.set_deterministic_debug_mode(deterministic)
            for found, before in hooks:
                found.clear()
                found.update(before)


def differences(before: ModelState, after: ModelState, *aspects: str) -> list[str]:
    """What differs, as `aspect: name`; of all aspects unless some are named."""
    found = []
    for aspect in aspects or before:
        old, new = before[aspect], after[aspect]
        changed = [name for name in {**old, **new} if old.get(name, _NONE) != new.get(name, _NONE)]
        found += [f"{aspect}: {name or 'the model'}" for name in changed]
    return found


def assert_same(before: ModelState, after: ModelState, what: str, *aspects: str) -> None:
    """Fail with what differs.

    Args:
        before, after: two states.
        what: when they should be the same, to begin the sentence.
        aspects: only these.
    """
    found = differences(before, after, *aspects)
    shown = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    assert not found, f"{what}, these differ: {shown}."


def patch_content(patch: Patch) -> list[object]:
    """The numbers of a patch, effects and state, to compare bit for bit."""
    state = {name: tensor_bits(t) for name, t in sorted(patch.state.items())}
    return [*map(_effect_content, patch.effects), state]


def _effect_content(effect: Effect) -> object:
    tensors = {name: tensor_bits(t) for name, t in sorted(effect.tensors.items())}
    if isinstance(effect, WeightDelta):
        return ("weights", effect.site, tensors)
    where = "" if isinstance(effect, CallEffect) else effect.path
    return (where, effect.type, _json(dict(effect.config)), tensors)


_NONE = object()


def _identity(module: nn.Module) -> object:
    """The very object, except of a wrapper: one is built anew whenever its edits change."""
    return type(module).__qualname__ if isinstance(module, Wrapper) else id(module)


def _hooks(attributes: Mapping[str, object]) -> dict[str, tuple[object, ...]]:
    """The keys of all hook dictionaries among an object's attributes."""
    return {name: tuple(hooks) for name, hooks in _hook_dicts(attributes).items()}


def _hook_dicts(attributes: Mapping[str, object]) -> dict[str, dict[object, object]]:
    return {n: v for n, v in attributes.items() if "_hooks" in n and isinstance(v, dict)}


def _tokenizer(tokenizer: object) -> dict[str, object]:
    names = ("padding_side", "truncation_side", "model_max_length", "special_tokens_map")
    settings = {name: repr(getattr(tokenizer, name, None)) for name in names}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        settings["backend"] = backend.to_str()
    return dict(settings)


def _json(data: object) -> str:
    return json.dumps(data, sort_keys=True, default=str)
