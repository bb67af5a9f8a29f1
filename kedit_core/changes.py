"""Patches in force on a model: putting them there, and taking them back bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kedit_core.effects import CallEffect, Effect, Middleware, ModuleSwap, WeightDelta, Wrapper
from kedit_core.errors import EditError, KEditError, PatchError
from kedit_core.host import ModelHost
from kedit_core.patch import Patch
from kedit_core.plugins import Catalog
from kedit_core.sites import Site

_Typed = TypeVar("_Typed", ModuleSwap, CallEffect)


@dataclass(eq=False)
class Applied:
    """A patch in force, and what takes its overlays back."""

    patch: Patch
    overlay: bool
    hooks: list[RemovableHandle] = field(default_factory=list)


@dataclass(frozen=True)
class _Place:
    """Where a wrapped module belongs, and the module itself."""

    parent: nn.Module
    name: str
    original: nn.Module


class Changes:
    """The stack of patches in force on a host.

    A weight is changed by adding in float32 and casting.  Its original is kept, and taking a
    patch back restores the original and replays the patches that stay: subtracting would not
    give the same bits.  Of 16-bit weights the sum is kept in float32 too, so that changes that
    are each below their precision still add up over a sequence of edits.
    """

    def __init__(self, host: ModelHost, catalog: Catalog) -> None:
        self.host = host
        self.catalog = catalog
        self.stack: list[Applied] = []
        self.is_suspended = False
        self._snapshots: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}  # originals and all changes, of 16-bit weights
        self._places: dict[str, _Place] = {}
        self._wrappers: dict[str, list[Wrapper]] = {}
        self._calls: list[Middleware] = []
        self._watch: RemovableHandle | None = None

    def put(self, patch: Patch, overlay: bool) -> None:
        """Put a patch in force, wholly or not at all; raises as `EditSession.apply`."""
        patch.check_finite()
        for effect in patch.effects:
            self._check(effect, overlay)
        applied = Applied(patch, overlay)
        self.stack.append(applied)
        try:
            for effect in patch.effects:
                if isinstance(effect, WeightDelta):
                    self._put(effect, applied)
            self._rebuild(patch)
        except BaseException:
            self.take_back([applied])
            raise

    def calls(self) -> list[Middleware]:
        """The middleware in force, oldest first."""
        return [] if self.is_suspended else self._calls

    def overlays(self) -> list[WeightDelta]:
        """The changes that lie over the weights, oldest first."""
        stack = [] if self.is_suspended else self.stack
        return [delta for applied in stack if applied.overlay for delta in applied.patch.deltas]

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

    def _put(self, delta: WeightDelta, applied: Applied) -> None:
        if applied.overlay:
            module = self.host.base_module(delta.site.module)
            applied.hooks.append(module.register_forward_hook(self._overlay_hook(delta)))
        else:
            self._add(delta)

    def _rebuild(self, *patches: Patch) -> None:
        """Build anew, from the stack, the wrappers and the middleware that the patches touch."""
        effects = [effect for patch in patches for effect in patch.effects]
        for path in dict.fromkeys(e.path for e in effects if isinstance(e, ModuleSwap)):
            self._wrap(path)
        if any(isinstance(effect, CallEffect) for effect in effects):
            calls = [e for a in self.stack for e in a.patch.effects if isinstance(e, CallEffect)]
            self._calls = [self._build(group) for group in _alike(calls)]
        if self._places and self._watch is None:
            reading = self.host.reading
            self._watch = self.host.model.register_forward_pre_hook(
                lambda model, args, kwargs: reading.begin(args, kwargs), with_kwargs=True
            )
        if not self._places and self._watch is not None:
            self._watch.remove()
            self._watch = None

    def _wrap(self, path: str) -> None:
        """Wrap a module in what the stack says; effects of one type in a row share a wrapper."""
        effects = [e for a in self.stack for e in a.patch.effects]
        swaps = [e for e in effects if isinstance(e, ModuleSwap) and e.path == path]
        place = self._places.get(path) or self._place(path)
        wrappers: list[Wrapper] = []
        for group in _alike(swaps):
            wrapper = self._build(group, wrappers[-1] if wrappers else place.original)
            wrapper.train(place.original.training)
            wrapper.reading = self.host.reading
            wrappers.append(wrapper)
        place.parent._modules[place.name] = wrappers[-1] if wrappers else place.original
        if wrappers:
            self._places[path], self._wrappers[path] = place, wrappers
        else:
            self._places.pop(path, None)
            self._wrappers.pop(path, None)

    def _place(self, path: str) -> _Place:
        parent_path, _, name = path.rpartition(".")
        parent = self.host.module(parent_path)
        while name not in parent._modules and isinstance(parent, Wrapper):
            parent = parent.base
        return _Place(parent, name, cast(nn.Module, parent._modules[name]))

    def _build(self, effects: Sequence[ModuleSwap] | Sequence[CallEffect], *base: nn.Module) -> Any:
        name = effects[0].type
        kind = self.catalog.effect(name).load()
        try:
            return kind.build(*base, effects)
        except KEditError:
            raise
        except Exception as error:  # config and state may come from a file
            raise PatchError(
                f"The effect type '{name}' cannot be built from what the patch holds ({error!r})."
            ) from error

    def _add(self, delta: WeightDelta) -> None:
        """Add in float32 (or wider), cast to the weight's type; the original is kept."""
        name = self._name(delta.site)
        if name not in self._snapshots:
            self._snapshots[name] = self.host.parameter(delta.site).detach().clone()
        matrix = self.host.weight(delta.site)
        wide = torch.promote_types(matrix.dtype, torch.float32)
        if matrix.dtype != wide and name not in self._sums:
            self._sums[name] = self._snapshots[name].to(wide)
        summed = delta.site.view(self._sums[name]) if name in self._sums else matrix
        total = summed + delta.dense().to(matrix.device, wide)
        changed = total.to(matrix.dtype)
        if not bool(torch.isfinite(changed).all()):
            raise EditError(
                f"With this change {delta.site.parameter} would overflow {matrix.dtype}; the "
                f"model is unchanged. Load it as float32 or bfloat16."
            )
        with torch.no_grad():
            summed.copy_(total)
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

    def take_back(self, removed: Sequence[Applied]) -> None:
        """Take patches off the stack; restore snapshots and replay the patches that stay.

        Subtracting a change would not give the same bits.
        """
        for applied in removed:
            self.stack.remove(applied)
            for handle in applied.hooks:
                handle.remove()
        self._rebuild(*(applied.patch for applied in removed))
        touched = {
            self._name(d.site): d.site for a in removed if not a.overlay for d in a.patch.deltas
        }
        for name, site in touched.items():
            if name not in self._snapshots:
                continue
            with torch.no_grad():
                self.host.parameter(site).copy_(self._snapshots[name])
            self._sums.pop(name, None)
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
        wrappers = [wrapper for built in self._wrappers.values() for wrapper in built]
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


def _alike(effects: Sequence[_Typed]) -> list[list[_Typed]]:
    """Effects of one type that follow each other, together."""
    return [list(group) for _, group in groupby(effects, key=lambda effect: effect.type)]
