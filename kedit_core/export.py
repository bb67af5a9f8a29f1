"""Edited models in other tools' formats: a `transformers` checkpoint, a PEFT LoRA adapter."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kedit_core.effects import CallEffect, Effect, ModuleSwap, WeightDelta, Wrapper
from kedit_core.errors import KEditError, PatchError
from kedit_core.files import new_folder
from kedit_core.host import ModelHost
from kedit_core.patch import Patch
from kedit_core.session import EditSession
from kedit_core.sites import Site


def export_hf(session: EditSession, folder: Path) -> None:
    """Write the edited model as a checkpoint that `transformers` alone loads.

    Matrices that were changed in place are written as they are, bit for bit; overlays and wrapped
    modules are folded into copies.  The session's own model is not changed.

    Raises:
        PatchError: the folder exists, the disk refuses, or an edit is no change of weights; says
            which and why.
    """
    session._refuse_if_suspended()
    with _export_folder(folder) as temporary:
        state = _state(session.model, _folded(session))
        with _own_config(session.model):
            session.model.save_pretrained(temporary, state_dict=state)
        session.host.tokenizer.save_pretrained(temporary)


def export_peft(session: EditSession, folder: Path) -> None:
    """Write the edits as a LoRA adapter that `peft` alone puts onto the unedited model.

    All changes of one module are joined into one pair of factors, with a scaling of 1.

    Raises:
        PatchError: the folder exists, the disk refuses, peft is not installed, no edit is in
            force, or an edit is no low-rank change of a linear layer; says which and why.
    """
    session._refuse_if_suspended()
    with _export_folder(folder) as temporary:
        _write_adapter(session, temporary)


@contextlib.contextmanager
def _export_folder(folder: Path) -> Iterator[Path]:
    folder = Path(folder)
    if folder.exists():
        raise PatchError(f"{folder} exists already. Choose another folder.")
    try:
        with new_folder(folder) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise PatchError(f"The model cannot be exported to {folder}: {error}.") from None


# -- a checkpoint -----------------------------------------------------------------------------


def _folded(session: EditSession) -> dict[str, Tensor]:
    """Copies of the parameters that overlays and wrapped modules change, with the change.

    All changes are added in float32 or wider and cast once, as `EditSession` does in place.
    """
    sums: dict[str, Tensor] = {}
    for number, patch in enumerate(session.stack):
        for effect in patch.effects:
            if isinstance(effect, CallEffect):
                raise PatchError(
                    f"{_named(number, patch)} acts on prompts or logits ('{effect.type}'), which "
                    f"no checkpoint can hold. Save it with the session and load it with kedit."
                )
            if isinstance(effect, ModuleSwap):
                delta = _as_delta(session, number, patch, effect)
            elif session.is_overlay(number):
                delta = effect
            else:
                continue
            _refuse_shared(session.host, number, patch, delta.site)
            name = delta.site.parameter
            if name not in sums:
                sums[name] = session._changes.summed(delta.site)
            matrix = delta.site.view(sums[name])
            matrix += delta.to(matrix.device).dense()
    return {name: _cast(session.host, name, total) for name, total in sums.items()}


def _as_delta(session: EditSession, number: int, patch: Patch, swap: ModuleSwap) -> WeightDelta:
    """What a wrapped module adds to its weight, for a checkpoint."""
    try:
        delta = _fold(session, swap)
        expected = tuple(session.host.weight(delta.site).shape)
    except KEditError as error:
        raise PatchError(
            f"{_named(number, patch)} wraps {swap.path} and cannot be folded into weights: {error}"
        ) from None
    _check_fold(swap, delta, expected)
    return delta


def _fold(session: EditSession, swap: ModuleSwap) -> WeightDelta:
    base = session.host.base_module(swap.path)
    kind = session.catalog.effect(swap.type).load()
    site = Site(f"{swap.path}.weight", transposed=isinstance(base, Conv1D))
    return WeightDelta(site, *kind.fold(base, swap))


def _check_fold(swap: ModuleSwap, delta: WeightDelta, expected: tuple[int, ...]) -> None:
    if delta.shape != expected:
        raise PatchError(
            f"The effect type '{swap.type}' folds {swap.path} to the shape {delta.shape}, but the "
            f"matrix is {expected}."
        )


def _cast(host: ModelHost, name: str, total: Tensor) -> Tensor:
    stored = total.to(host.stored(Site(name)).dtype)
    if not bool(torch.isfinite(stored).all()):
        raise PatchError(
            f"With its edits {name} would overflow {stored.dtype}. Load the model as float32 or "
            f"bfloat16."
        )
    return stored


def _state(model: PreTrainedModel, folded: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's state under the names of the unwrapped model, with the folded parameters."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        canonical = _unwrapped(model, name)
        if canonical is not None:
            state[canonical] = folded.get(canonical, tensor)
    return state


def _unwrapped(model: nn.Module, name: str) -> str | None:
    """The name that a tensor has without wrappers; None for a wrapper's own tensors."""
    current: nn.Module | None = model
    parts = []
    for part in name.split("."):
        if isinstance(current, Wrapper):
            if part != "base":
                return None
        else:
            parts.append(part)
        current = current._modules.get(part) if current is not None else None
    return ".".join(parts)


@contextlib.contextmanager
def _own_config(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model has a copy of its config: saving writes into it."""
    config = model.config
    model.config = copy.deepcopy(config)
    try:
        yield
    finally:
        model.config = config


# -- an adapter -------------------------------------------------------------------------------


def _write_adapter(session: EditSession, folder: Path) -> None:
    try:
        from peft import LoraConfig
    except ImportError:
        raise PatchError(
            "An adapter is written with the package 'peft': pip install peft."
        ) from None
    host = session.host
    factors = _factors(session)
    ranks = {module: left.shape[1] for module, (left, _) in factors.items()}
    LoraConfig(
        task_type="SEQ_2_SEQ_LM" if host.is_encoder_decoder else "CAUSAL_LM",
        base_model_name_or_path=_public_name(host.name),
        target_modules=sorted(ranks),
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(isinstance(host.base_module(m), Conv1D) for m in ranks),
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors = {}
    for module, (left, right) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = right
        tensors[f"base_model.model.{module}.lora_B.weight"] = left
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _factors(session: EditSession) -> dict[str, tuple[Tensor, Tensor]]:
    """For each changed module the joined factors of all edits, (d_out, rank) and (rank, d_in)."""
    parts: dict[str, list[WeightDelta]] = {}
    for number, patch in enumerate(session.stack):
        for effect in patch.effects:
            delta = _low_rank(session, number, patch, effect)
            parts.setdefault(delta.site.module, []).append(delta)
    if not parts:
        raise PatchError("No edit is in force, so there is nothing to write into an adapter.")
    return {
        module: (
            torch.cat([d.left.detach().cpu().float() for d in deltas], dim=1).contiguous(),
            torch.cat([_right(d).detach().cpu().float() for d in deltas], dim=0).contiguous(),
        )
        for module, deltas in parts.items()
    }


def _low_rank(session: EditSession, number: int, patch: Patch, effect: Effect) -> WeightDelta:
    """The effect, if an adapter can hold it."""
    host, named = session.host, _named(number, patch)
    if isinstance(effect, CallEffect):
        raise PatchError(
            f"{named} acts on prompts or logits ('{effect.type}'), which no adapter can hold. Save "
            f"it with the session and load it with kedit."
        )
    if isinstance(effect, ModuleSwap):
        try:
            delta = _fold(session, effect)
        except KEditError as error:
            raise PatchError(
                f"{named} wraps {effect.path}, which no LoRA adapter can hold: {error}"
            ) from None
    else:
        delta = effect
    other = "Export a checkpoint instead (`--to hf`)."
    site = delta.site
    if delta.right is None:
        raise PatchError(
            f"{named} changes {site.parameter} by a dense matrix, and a LoRA adapter holds "
            f"low-rank factors only. {other}"
        )
    if site.expert is not None:
        raise PatchError(
            f"{named} changes one expert of {site.parameter}, which a LoRA adapter cannot. {other}"
        )
    module = host.base_module(site.module)
    is_weight = site.parameter == f"{site.module}.weight"
    if not is_weight or not isinstance(module, nn.Linear | Conv1D):
        raise PatchError(f"{named} changes {site.parameter}, which is no linear layer. {other}")
    if isinstance(effect, ModuleSwap):
        _check_fold(effect, delta, host.shape(site))
    _refuse_shared(host, number, patch, site)
    return delta


def _right(delta: WeightDelta) -> Tensor:
    assert delta.right is not None
    return delta.right


# -- both -------------------------------------------------------------------------------------


def _refuse_shared(host: ModelHost, number: int, patch: Patch, site: Site) -> None:
    """Refuse where the change of one layer would reach another one that shares its matrix."""
    parameter = host.stored(site)
    names = [
        name
        for name, other in host.model.named_parameters(remove_duplicate=False)
        if other is parameter
    ]
    if len(names) > 1:
        raise PatchError(
            f"{_named(number, patch)} changes {site.parameter}, which is shared by "
            f"{' and '.join(names)}. Such an edit can only be exported if it is in place, with "
            f"`--to hf`."
        )


def _named(number: int, patch: Patch) -> str:
    return f"Edit {number} ({patch.method})"


def _public_name(name: str) -> str:
    """The model's name, or the last part of a path: paths of this machine are nobody's business."""
    return Path(name).name if Path(name).is_absolute() else name


__all__ = ["export_hf", "export_peft"]
