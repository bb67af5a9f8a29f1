"""Patches in force on a model: putting them there, and taking them back bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kedit_core.effects import CallEffect, CallMiddleware, Effect, ModuleSwap, WeightDelta, Wrapper
from kedit_core.errors import EditError, KEditError, PatchError
from kedit_core.host import ModelHost
from kedit_core.patch import Patch
from kedit_core.plugins import Catalog
from kedit_core.sites import Site


@dataclass
class Applied:
    """A patch in force, and what is needed to take its modules, overlays and calls back."""

    patch: Patch
    overlay: bool
    hooks: list[RemovableHandle] = field(default_factory=list)
    swaps: list[tuple[nn.Module, str, nn.Module, Wrapper]] = field(default_factory=list)
    calls: list[CallMiddleware] = field(default_factory=list)


class Changes:
    """The stack of patches in force on a host.

    A weight is changed by adding in float32 and casting.  Its original is kept, and taking a
    patch back restores the original and replays the patches that stay: subtracting would not
    give the same bits.
    """

    def __init__(self, host: ModelHost, catalog: Catalog) -> None:
        self.host = host
        self.catalog = catalog
        self.stack: list[Applied] = []
        self.is_suspended = False
        self._snapshots: dict[str, Tensor] = {}

    def put(self, patch: Patch, overlay: bool) -> None:
        """Put a patch in force, wholly or not at all; raises as `EditSession.apply`."""
        patch.check_finite()
        for effect in patch.effects:
            self._check(effect, overlay)
        applied = Applied(patch, overlay)
        self.stack.append(applied)
        try:
            for effect in patch.effects:
                self._put(effect, applied)
        except BaseException:
            self.take_back(len(self.stack) - 1)
            raise

    def calls(self) -> list[CallMiddleware]:
        """The middleware in force, oldest first."""
        if self.is_suspended:
            return []
        return [call for applied in self.stack for call in applied.calls]

    def _check(self, effect: Effect, overlay: bool) -> None:
        if isinstance(effect, WeightDelta):
            shape = self._shape(effect.site, overlay)
            if shape != effect.shape:
                raise PatchError(
                    f"The change of {effect.site.parameter} is {effect.shape}, but the matrix is "
                    f"{shape}."
                )
            return
        kind = "module" if isinstance(effect, ModuleSwap) else "call"
        spec = self.catalog.effect(effect.type)
        if spec.kind != kind:
            raise PatchError(f"The effect type '{effect.type}' is of kind {spec.kind}, not {kind}.")
        if isinstance(effect, ModuleSwap):
            if not effect.path:
                raise PatchError("The whole model cannot be wrapped; name one of its modules.")
            self.host.module(effect.path)

    def _shape(self, site: Site, overlay: bool) -> tuple[int, int]:
        if not overlay:
            return cast(tuple[int, int], tuple(self.host.weight(site).shape))
        if site.expert is not None:
            raise PatchError("One expert of a stacked parameter cannot be overlaid.")
        module = self.host.base_module(site.module)
        if isinstance(module, nn.Embedding):
            raise PatchError(f"{site.parameter} is a table of embeddings and cannot be overlaid.")
        if isinstance(module, nn.Linear):
            return module.out_features, module.in_features
        return cast(tuple[int, int], tuple(self.host.weight(site).shape))

    def _put(self, effect: Effect, applied: Applied) -> None:
        if isinstance(effect, WeightDelta):
            if applied.overlay:
                module = self.host.base_module(effect.site.module)
                applied.hooks.append(module.register_forward_hook(self._overlay_hook(effect)))
            else:
                self._add(effect)
        elif isinstance(effect, ModuleSwap):
            parent_path, _, name = effect.path.rpartition(".")
            parent = self.host.module(parent_path)
            while name not in parent._modules and isinstance(parent, Wrapper):
                parent = parent.base
            original = cast(nn.Module, parent._modules[name])
            wrapper = self._build(effect, original)
            wrapper.train(original.training)
            applied.swaps.append((parent, name, original, wrapper))
            parent._modules[name] = wrapper
        else:
            applied.calls.append(self._build(effect))

    def _build(self, effect: ModuleSwap | CallEffect, *base: nn.Module) -> Any:
        kind = self.catalog.effect(effect.type).load()
        try:
            return kind.build(*base, effect.config, effect.state)
        except KEditError:
            raise
        except Exception as error:  # config and state may come from a file
            raise PatchError(
                f"The effect type '{effect.type}' cannot be built from what the patch holds "
                f"({error!r})."
            ) from error

    def _add(self, delta: WeightDelta) -> None:
        """Add in float32 (or wider), cast to the weight's type; the original is kept."""
        name = self._name(delta.site)
        if name not in self._snapshots:
            self._snapshots[name] = self.host.parameter(delta.site).detach().clone()
        matrix = self.host.weight(delta.site)
        wide = torch.promote_types(matrix.dtype, torch.float32)
        changed = (matrix.to(wide) + delta.dense().to(matrix.device, wide)).to(matrix.dtype)
        if not bool(torch.isfinite(changed).all()):
            raise EditError(
                f"With this change {delta.site.parameter} would overflow {matrix.dtype}; the "
                f"model is unchanged. Load it as float32 or bfloat16."
            )
        with torch.no_grad():
            matrix.copy_(changed)

    def _name(self, site: Site) -> str:
        """Name under which the original is kept: a tied weight has several, one is enough."""
        stored = self.host.stored(site)
        known = (name for name in self._snapshots if self.host.stored(Site(name)) is stored)
        return next(known, site.parameter)

    def _overlay_hook(self, delta: WeightDelta) -> Any:
        def add_product(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output if self.is_suspended else output + delta.product(args[0])

        return add_product

    def take_back(self, depth: int) -> None:
        """Restore snapshots and replay the patches that stay.

        Subtracting a change would not give the same bits.
        """
        removed = self.stack[depth:]
        del self.stack[depth:]
        for applied in reversed(removed):
            for handle in applied.hooks:
                handle.remove()
            for parent, name, original, _ in reversed(applied.swaps):
                parent._modules[name] = original
        touched = {
            self._name(d.site): d.site for a in removed if not a.overlay for d in a.patch.deltas
        }
        for name, site in touched.items():
            if name not in self._snapshots:
                continue
            with torch.no_grad():
                self.host.parameter(site).copy_(self._snapshots[name])
            kept = [d for d in self._in_place() if self._name(d.site) == name]
            if not kept:
                del self._snapshots[name]
            for delta in kept:
                self._add(delta)

    def _in_place(self) -> list[WeightDelta]:
        return [d for a in self.stack if not a.overlay for d in a.patch.deltas]

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """The unedited model inside the block, the edited one again after it."""
        if self.is_suspended:
            yield
            return
        sites = {self._name(d.site): d.site for d in self._in_place()}
        wrappers = [wrapper for a in self.stack for *_, wrapper in a.swaps]
        edited: dict[str, Tensor] = {}
        self.is_suspended = True
        try:
            for name, site in sites.items():
                edited[name] = self.host.parameter(site).detach().clone()
            self._write(sites, self._snapshots)
            for wrapper in wrappers:
                wrapper.passes_through = True
            yield
        finally:
            self._write({n: s for n, s in sites.items() if n in edited}, edited)
            for wrapper in wrappers:
                wrapper.passes_through = False
            self.is_suspended = False

    def _write(self, sites: Mapping[str, Site], content: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, site in sites.items():
                self.host.parameter(site).copy_(content[name])
