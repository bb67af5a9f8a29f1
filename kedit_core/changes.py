"""Patches in force on a model: putting them there, and taking them back bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kedit_core.effects import CallEffect, Effect, Middleware, ModuleSwap, WeightDelta, Wrapper
from kedit_core.errors import EditError, KEditError, PatchError
from kedit_core.host import ModelHost
from kedit_core.patch import Patch
from kedit_core.plugins import Catalog
from kedit_core.sites import Site


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
            self._install(*self._built([patch]))
        except BaseException:
            self._take_off([applied])
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
        if isinstance(self.host.base_module(site.module), nn.Embedding):
            raise PatchError(f"{site.parameter} is a table of embeddings and cannot be overlaid.")
        return self.host.shape(site)

    def _put(self, delta: WeightDelta, applied: Applied) -> None:
        if applied.overlay:
            module = self.host.base_module(delta.site.module)
            applied.hooks.append(module.register_forward_hook(self._overlay_hook(delta)))
        else:
            self._add(delta)

    def _built(self, patches: Sequence[Patch]) -> tuple[dict[str, list[Wrapper]], list[Middleware]]:
        """The wrappers of the modules that the patches touch, and the middleware, anew from the
        stack; none of it is in force yet."""
        wrappers = {path: self._wrapped(path) for path in _wrapped_paths(patches)}
        if not _has_calls(patches):
            return wrappers, self._calls
        calls = [e for a in self.stack for e in a.patch.effects if isinstance(e, CallEffect)]
        kinds = dict.fromkeys(effect.type for effect in calls)
        return wrappers, [self._build([e for e in calls if e.type == kind]) for kind in kinds]

    def _wrapped(self, path: str) -> list[Wrapper]:
        """What the stack says is round a module; effects of one type in a row share a wrapper."""
        effects = [e for a in self.stack for e in a.patch.effects]
        swaps = [e for e in effects if isinstance(e, ModuleSwap) and e.path == path]
        original = self._place(path).original
        former = iter(self._wrappers.get(path, ()))
        wrappers: list[Wrapper] = []
        for _, group in groupby(swaps, key=lambda swap: swap.type):
            base = wrappers[-1] if wrappers else original
            wrapper = self._build(list(group), base, former=next(former, None))
            wrapper.train(original.training)
            wrapper.reading = self.host.reading
            wrappers.append(wrapper)
        return wrappers

    def _install(self, wrappers: Mapping[str, list[Wrapper]], calls: list[Middleware]) -> None:
        """Put wrappers round these modules, in place of those that are there, and middleware."""
        for path, built in wrappers.items():
            place = self._place(path)
            place.parent._modules[place.name] = built[-1] if built else place.original
            self._places.pop(path, None)
            self._wrappers.pop(path, None)
            if built:
                self._places[path], self._wrappers[path] = place, built
        self._calls = calls
        if self._places and self._watch is None:
            reading = self.host.reading
            self._watch = self.host.model.register_forward_pre_hook(
                lambda model, args, kwargs: reading.begin(args, kwargs), with_kwargs=True
            )
        if not self._places and self._watch is not None:
            self._watch.remove()
            self._watch = None

    def _place(self, path: str) -> _Place:
        if path in self._places:
            return self._places[path]
        parent_path, _, name = path.rpartition(".")
        parent = self.host.module(parent_path)
        while name not in parent._modules and isinstance(parent, Wrapper):
            parent = parent.base
        return _Place(parent, name, cast(nn.Module, parent._modules[name]))

    def _build(
        self,
        effects: Sequence[ModuleSwap] | Sequence[CallEffect],
        *base: nn.Module,
        former: Wrapper | None = None,
    ) -> Any:
        """What effects of one type amount to; `former` stood where it will stand."""
        name = effects[0].type
        kind = self.catalog.effect(name).load()
        build: Any = former.rebuilt if former is not None and type(former) is kind else kind.build
        try:
            return build(*base, effects)
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
        total = summed + delta.to(matrix.device).dense().to(wide)
        changed = total.to(matrix.dtype)
        if not bool(torch.isfinite(changed).all()):
            raise EditError(
                f"With this change {delta.site.parameter} would overflow {matrix.dtype}; the "
                f"model is unchanged. Load it as float32 or bfloat16."
            )
        with torch.no_grad():
            summed.copy_(total)
            matrix.copy_(changed)

    def summed(self, site: Site) -> Tensor:
        """A copy of a parameter as it is before the cast to its type, in float32 or wider."""
        parameter = self.host.parameter(site).detach()
        wide = torch.promote_types(parameter.dtype, torch.float32)
        return self._sums.get(self._name(site), parameter).to(wide, copy=True)

    def _name(self, site: Site) -> str:
        """Name under which the original is kept: a tied weight has several, one is enough."""
        stored = self.host.stored(site)
        known = (name for name in self._snapshots if self.host.stored(Site(name)) is stored)
        return next(known, site.parameter)

    def _overlay_hook(self, delta: WeightDelta) -> Any:
        def add_product(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            nonlocal delta
            if self.is_suspended:
                return output
            delta = delta.to(output.device)  # once: it stays there
            return output + delta.product(args[0].to(output.device))

        return add_product

    def take_back(self, removed: Sequence[Applied]) -> None:
        """Take patches off the stack; restore snapshots and replay the patches that stay.

        Subtracting a change would not give the same bits.  Where replaying fails, as memory may
        run out, the error is raised when all of the patches is gone, perhaps with some of the
        effects of those that stay; a rollback still ends at the original.
        """
        patches = [applied.patch for applied in removed]
        wrappers: dict[str, list[Wrapper]] = {path: [] for path in _wrapped_paths(patches)}
        calls = [] if _has_calls(patches) else self._calls
        try:
            self._take_off(removed)
            wrappers, calls = self._built(patches)
        finally:
            self._install(wrappers, calls)

    def _take_off(self, removed: Sequence[Applied]) -> None:
        """Take back all but wrappers and middleware."""
        touched = {
            self._name(d.site): d.site for a in removed if not a.overlay for d in a.patch.deltas
        }
        for applied in removed:
            self.stack.remove(applied)
            for handle in applied.hooks:
                handle.remove()
        found = {name: site for name, site in touched.items() if name in self._snapshots}
        self._write(found, self._snapshots)
        replayed = [d for d in self._in_place() if self._name(d.site) in found]
        still_changed = {self._name(d.site) for d in replayed}
        for name in found:
            self._sums.pop(name, None)
            if name not in still_changed:
                del self._snapshots[name]
        for delta in replayed:
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
        with self.host.restoring([self.host.parameter(site) for site in sites.values()]):
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


def _wrapped_paths(patches: Sequence[Patch]) -> list[str]:
    effects = [effect for patch in patches for effect in patch.effects]
    return list(dict.fromkeys(e.path for e in effects if isinstance(e, ModuleSwap)))


def _has_calls(patches: Sequence[Patch]) -> bool:
    return any(isinstance(effect, CallEffect) for patch in patches for effect in patch.effects)
