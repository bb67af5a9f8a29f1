"""Leaving a model as it was found, whatever happens in between."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
_TOKENIZER = ("padding_side", "truncation_side", "pad_token", "model_max_length")


@contextlib.contextmanager
def untouched(model: nn.Module, tokenizer: Any) -> Iterator[None]:
    """Run a block with all weights frozen; afterwards everything but weights is as it was.

    Restores hooks, replaced `forward` methods, gradients, `requires_grad`, training flags, the
    tokenizer's settings and the random states, also after an exception or a keyboard interrupt.
    """
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modules = [
        (m, m.training, m.__dict__.get("forward"), {h: dict(getattr(m, h)) for h in _HOOKS})
        for m in model.modules()
    ]
    settings = {name: getattr(tokenizer, name, None) for name in _TOKENIZER}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    padding = (backend.padding, backend.truncation) if backend is not None else (None, None)
    states = _random_states()
    try:
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        model.eval()
        yield
    finally:
        for parameter, wanted, gradient in parameters:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
        for module, training, forward, hooks in modules:
            module.training = training
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward
            for name, content in hooks.items():
                current = getattr(module, name)
                if dict(current) != content:
                    current.clear()
                    current.update(content)
        for name, value in settings.items():
            if getattr(tokenizer, name, None) != value:
                setattr(tokenizer, name, value)
        if backend is not None and padding != (backend.padding, backend.truncation):
            _restore_backend(backend, *padding)
        _set_random_states(states)


def _restore_backend(backend: Any, padding: Any, truncation: Any) -> None:
    backend.no_padding() if padding is None else backend.enable_padding(**padding)
    backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
