"""`EditSession`: the only thing that changes a model, and that takes every change back."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from torch import Tensor
from transformers import PreTrainedModel

from kedit_core.artifacts import ArtifactStore
from kedit_core.changes import Applied, Changes
from kedit_core.corpus import Corpus
from kedit_core.effects import CallEffect
from kedit_core.errors import (
    EditError,
    ModelError,
    PatchError,
    PluginError,
    RequestError,
    SettingError,
)
from kedit_core.guard import untouched
from kedit_core.hookspecs import EditFinished
from kedit_core.host import ModelHost
from kedit_core.hparams import HyperParams, Settings, resolve
from kedit_core.job import EditJob
from kedit_core.patch import Base, Patch
from kedit_core.plugins import Catalog, discover
from kedit_core.protocols import EditMethod, Preparable
from kedit_core.request import EditRequest
from kedit_core.spec import MethodSpec
from kedit_core.stack import (
    STACK,
    SavedStack,
    append_saved,
    count_saved,
    read_stack,
    refuse_removal,
    write_stack,
)
from kedit_core.view import Comparison, ModelView


@dataclass(frozen=True)
class Savepoint:
    """A place in a session's history to come back to."""

    depth: int
    top: Applied | None


@dataclass(frozen=True)
class EditOutcome:
    """What an edit did.

    Attributes:
        patches: one per call of the method.
        settings: the hyperparameters and where each value came from.
        seconds: time of computing and applying, without loading the model.
    """

    patches: tuple[Patch, ...]
    settings: Settings
    seconds: float


Params = ParamSpec("Params")
Returned = TypeVar("Returned")


def _alone(
    method: Callable[Concatenate[EditSession, Params], Returned],
) -> Callable[Concatenate[EditSession, Params], Returned]:
    """The method while no other thread runs or changes the model through kedit."""

    @functools.wraps(method)
    def alone(self: EditSession, *args: Params.args, **kwargs: Params.kwargs) -> Returned:
        with self.host.lock:
            return method(self, *args, **kwargs)

    return alone


class EditSession:
    """A model and the stack of patches in force on it.

    Args:
        host: the unedited model.
        artifacts: where dear things are kept; by default kedit's cache folder.
        corpus: text for statistics; by default the model writes its own.
        seed: from which methods draw their random numbers.
        catalog: the installed plugins, if they are known already.
    """

    def __init__(
        self,
        host: ModelHost,
        *,
        artifacts: ArtifactStore | None = None,
        corpus: Corpus | None = None,
        seed: int = 0,
        catalog: Catalog | None = None,
    ) -> None:
        self.host = host
        self.artifacts = artifacts or ArtifactStore()
        self.corpus = corpus or Corpus()
        self.seed = seed
        self.catalog = catalog or discover()
        self.fingerprint = host.fingerprint()
        self._changes = Changes(host, self.catalog)
        self._spoilt = ""  # why the unedited model is lost

    # -- looking --------------------------------------------------------------------------

    @property
    def model(self) -> PreTrainedModel:
        """The edited `transformers` model itself."""
        return self.host.model

    @property
    def stack(self) -> tuple[Patch, ...]:
        """The patches in force, oldest first."""
        return tuple(applied.patch for applied in self._changes.stack)

    @property
    def is_edited(self) -> bool:
        """Whether any patch is in force."""
        return bool(self._changes.stack)

    def unseen_effects(self) -> tuple[CallEffect, ...]:
        """What `model` itself does not show, and `view` does: changed prompts and logits."""
        effects = [effect for patch in self.stack for effect in patch.effects]
        return tuple(effect for effect in effects if isinstance(effect, CallEffect))

    def is_overlay(self, index: int) -> bool:
        """Whether the patch at this place of the stack lies over the weights."""
        return self._changes.stack[index].overlay

    def view(self) -> ModelView:
        """The model as it answers with all edits in force; follows later changes."""
        self._refuse_if_spoilt()
        return ModelView(self.host, self._changes.calls)

    @_alone
    def compare(self, prompts: str | Sequence[str], max_new_tokens: int = 12) -> list[Comparison]:
        """Greedy answers without and with the edits, side by side."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        after = self.view().greedy(prompts, max_new_tokens=max_new_tokens)
        with self.suspended():
            before = self.view().greedy(prompts, max_new_tokens=max_new_tokens)
        return [Comparison(p, b, a) for p, b, a in zip(prompts, before, after, strict=True)]

    # -- editing --------------------------------------------------------------------------

    @_alone
    def edit(
        self,
        method: str | MethodSpec,
        requests: EditRequest | Iterable[EditRequest] = (),
        *,
        preset: str | None = None,
        file: Path | None = None,
        hparams: Mapping[str, Any] | HyperParams | None = None,
        overlay: bool = False,
        seed: int | None = None,
    ) -> EditOutcome:
        """Compute the patches for the requests and put them in force: all of them or none.

        Args:
            method: a name from `kedit list-methods`, or a spec.
            requests: what to write; sent to the method in batches of at most its `max_batch`.
                A method that writes no facts needs none.
            preset: name of a preset; by default the one that suits the model.
            file: YAML file of settings.
            hparams: settings by name, or a complete `HyperParams`.
            overlay: lay weight changes beside the weights instead of into them.
            seed: instead of the session's.

        Raises:
            KEditError: anything the user can cause; the model is as it was before the call.
        """
        spec, settings = self._resolve(method, preset, file, hparams)
        wanted = tuple(_several(requests))
        for request in wanted:
            if not isinstance(request, EditRequest):
                raise RequestError(
                    f"{request!r} is no edit request. Give EditRequest(prompt=…, subject=…, "
                    f"target_new=…), or several."
                )
        if spec.writes_facts and not wanted:
            raise RequestError("No request is given, so there is nothing to edit.")
        self._check_model(spec)
        for request in wanted:
            if reason := spec.refusal(request):
                raise RequestError(reason)
        started = time.perf_counter()
        mark = self.savepoint()
        implementation = cast(EditMethod, spec.load()(settings.hparams))
        size = spec.max_batch or max(1, len(wanted))
        again = len(wanted) > size or any(p.method == spec.name for p in self.stack)
        if again and not spec.sequential:
            raise SettingError(
                f"{spec.name} makes one edit in a session and no second one after it. Roll back "
                f"first, or use a method for sequences."
            )
        try:
            for start in range(0, max(1, len(wanted)), size):
                self._edit_batch(
                    spec, implementation, settings, wanted[start : start + size], overlay, seed
                )
        except BaseException:
            self.rollback(mark)
            raise
        patches = self.stack[mark.depth :]
        return EditOutcome(patches, settings, time.perf_counter() - started)

    def stream(
        self,
        method: str | MethodSpec,
        requests: EditRequest | Iterable[EditRequest],
        *,
        batch: int = 1,
        folder: Path | None = None,
        force: bool = False,
        **options: Any,
    ) -> Iterator[EditOutcome]:
        """Edit one batch after the other, as the requests come.

        What is done stays when a later batch fails.  With a folder each batch is on disk before
        the next begins, and the same call in a new session goes on where a stopped one was.

        Args:
            method: a name from `kedit list-methods`, or a spec.
            requests: as many as there are; asked for when they are needed.
            batch: so many at a time.
            folder: new, or what an earlier call wrote; then this session must be unedited.
            force: load the folder also onto other weights, as `load` does.
            options: as for `edit`.

        Raises:
            RequestError: the folder holds other requests than these.
            SettingError: the folder's edits were made with other settings, another seed or another
                `overlay`; `batch` is less than 1.
            EditError: the folder and this session do not hold the same edits.
            KEditError: as `edit` and `load`; the batches before are in force.
        """
        spec = self.catalog.method(method) if isinstance(method, str) else method
        coming = iter(_several(requests))
        folder = None if folder is None else Path(folder)
        if batch < 1:
            raise SettingError(f"Batches of {batch} edits make none. Give a batch of at least 1.")
        if folder is not None and (folder / STACK).is_file():
            if self.is_edited:
                raise EditError(f"{folder} holds edits, and so does this session; roll it back.")
            saved = read_stack(folder)
            done = saved.entries[len(saved.entries) - len(saved.latest_by(spec.name)) :]
            written = [request for patch, _ in done for request in patch.requests]
            if list(islice(coming, len(written))) != written:
                raise RequestError(
                    f"{folder} holds {len(written)} edits by {spec.name}, and they are not the "
                    f"first of these requests. Choose another folder."
                )
            self._check_same_settings(spec, done, folder, options)
            self.load(saved, force=force)
        elif folder is not None:
            self.save(folder)
        while wanted := list(islice(coming, batch)):
            if folder is not None and (there := count_saved(folder)) != len(self.stack):
                raise EditError(
                    f"{folder} holds {there} patches and this session {len(self.stack)}, so that "
                    f"the next one would not fit on those of the folder. Save to another folder."
                )
            depth = len(self.stack)
            outcome = self.edit(spec, wanted, **options)
            for index in range(depth, len(self.stack) if folder else 0):
                append_saved(cast(Path, folder), self.stack[index], self.is_overlay(index))
            yield outcome

    def _check_same_settings(
        self,
        spec: MethodSpec,
        done: Sequence[tuple[Patch, bool]],
        folder: Path,
        options: Mapping[str, Any],
    ) -> None:
        given = (options.get(name) for name in ("preset", "file", "hparams"))
        wanted = self._resolve(spec, *given)[1].hparams.model_dump(mode="json")
        seed = options.get("seed")
        wanted["seed of the run"] = self.seed if seed is None else seed
        wanted["`overlay`"] = options.get("overlay", False)
        for patch, overlay in done:
            made = {**patch.hparams, "seed of the run": patch.seed, "`overlay`": overlay}
            others = [n for n in wanted | made if wanted.get(n) != made.get(n)]
            if others:
                raise SettingError(
                    f"{folder} holds edits by {spec.name} with another {' and '.join(others)} than "
                    f"this call asks for. Give the same, or choose another folder."
                )

    def _check_model(self, spec: MethodSpec) -> None:
        if "causal-model" in spec.needs and self.host.is_encoder_decoder:
            raise ModelError(
                f"{spec.name} edits causal models, and {self.host.name} is an encoder-decoder. Use "
                f"a method that edits both, for example ft-m."
            )

    @contextlib.contextmanager
    def trial(
        self,
        method: str | MethodSpec,
        requests: EditRequest | Iterable[EditRequest] = (),
        **options: Any,
    ) -> Iterator[EditOutcome]:
        """As `edit`, in force inside the block only."""
        with self.host.lock:
            before = list(self._changes.stack)
            outcome = self.edit(method, requests, **options)
            try:
                yield outcome
            finally:
                self._refuse_if_suspended()
                self._changes.take_back([a for a in self._changes.stack if a not in before])

    @_alone
    def prepare(
        self,
        method: str | MethodSpec,
        *,
        preset: str | None = None,
        file: Path | None = None,
        hparams: Mapping[str, Any] | HyperParams | None = None,
    ) -> Settings:
        """Make ahead what the method would otherwise make at its first edit.

        Raises:
            SettingError: the method has nothing to prepare.
        """
        spec, settings = self._resolve(method, preset, file, hparams)
        implementation = spec.load()(settings.hparams)
        if not isinstance(implementation, Preparable):
            raise SettingError(f"{spec.name} has nothing to prepare.")
        with self.suspended(), self._guarded(spec):
            implementation.prepare(self._job(spec, (), self.seed))
        return settings

    def _resolve(
        self,
        method: str | MethodSpec,
        preset: str | None,
        file: Path | None,
        hparams: Mapping[str, Any] | HyperParams | None,
    ) -> tuple[MethodSpec, Settings]:
        spec = self.catalog.method(method) if isinstance(method, str) else method
        if isinstance(hparams, HyperParams):
            if preset or file:
                raise SettingError("Give complete hyperparameters, or a preset and settings.")
            return spec, Settings(hparams, dict.fromkeys(type(hparams).model_fields, "given"))
        return spec, resolve(
            spec, preset=preset, file=file, settings=hparams, config=self.host.config
        )

    def _job(self, spec: MethodSpec, requests: tuple[EditRequest, ...], seed: int) -> EditJob:
        return EditJob(
            host=self.host,
            requests=requests,
            artifacts=self.artifacts,
            fingerprint=self.fingerprint,
            corpus=self.corpus,
            seed=seed,
            unedited=self.suspended,
            earlier=tuple(p for p in self.stack if p.method == spec.name),
            is_edited=self.is_edited,
            overlays=self._changes.overlays,
        )

    def _edit_batch(
        self,
        spec: MethodSpec,
        method: EditMethod,
        settings: Settings,
        requests: tuple[EditRequest, ...],
        overlay: bool,
        seed: int | None,
    ) -> None:
        self._refuse_if_suspended()
        self._refuse_if_spoilt()
        started = time.perf_counter()
        job = self._job(spec, requests, self.seed if seed is None else seed)
        with self._guarded(spec):
            patch = method.edit(job)
        if not isinstance(patch, Patch):
            raise PluginError(f"{spec.name} returned {patch!r}; edit() must return a Patch.")
        try:
            patch.check_finite()
        except PatchError as error:
            raise EditError(
                f"{spec.name} computed numbers that are not finite ({error}) The model is "
                f"unchanged. Lower the learning rate, or use float32 weights."
            ) from None
        patch = replace(
            patch,
            method=spec.name,
            requests=requests,
            hparams=settings.hparams.model_dump(mode="json"),
            plugin=self._plugin_of(spec),
            seed=job.seed,
            base=self._base(patch),
        )
        self.apply(patch, overlay=overlay)
        event = EditFinished(spec.name, requests, patch, time.perf_counter() - started)
        self.catalog.notify("kedit_edit_finished", event)

    def _base(self, patch: Patch) -> Base:
        sites = {delta.site.parameter: delta.site for delta in patch.deltas}
        checksums = {name: self.host.checksum(site) for name, site in sites.items()}
        return Base(self.host.name, self.fingerprint, checksums)

    def _plugin_of(self, spec: MethodSpec) -> str:
        with contextlib.suppress(KeyError, IndexError, StopIteration):
            info = self.catalog.plugin_of(spec)
            return f"{info.distribution} {info.version}".strip()
        return ""

    @_alone
    def apply(self, patch: Patch, *, overlay: bool = False) -> None:
        """Put a patch in force, wholly or not at all; one without a base belongs here from now on.

        Raises:
            PatchError, SiteError: it does not fit this model; nothing has changed.
            EditError: the changed weights would not be finite; nothing has changed.
        """
        self._refuse_if_suspended()
        self._refuse_if_spoilt()
        if not patch.base.fingerprint:
            patch = replace(patch, base=self._base(patch))
        self._changes.put(patch, overlay)

    # -- taking them back -----------------------------------------------------------------

    def savepoint(self) -> Savepoint:
        """The present place in the history."""
        stack = self._changes.stack
        return Savepoint(len(stack), stack[-1] if stack else None)

    @_alone
    def rollback(self, mark: Savepoint | None = None) -> None:
        """Take back every patch since `mark`, or all of them; bit for bit.

        Raises:
            EditError: the savepoint is no longer part of this session's history.
            PluginError: a method changed weights itself, which nothing takes back.
        """
        self._refuse_if_suspended()
        stack, depth = self._changes.stack, 0
        if mark is not None and mark.top is not None:
            if mark.top not in stack:
                raise EditError("This savepoint was rolled back already.")
            depth = stack.index(mark.top) + 1  # less than at the mark where some were taken out
        self._changes.take_back(stack[depth:])
        self._refuse_if_spoilt()

    @_alone
    def pop(self) -> Patch:
        """Take back the latest patch and return it.

        Raises:
            EditError: no patch is in force.
        """
        self._refuse_if_suspended()
        if not self.stack:
            raise EditError("No edit is in force, so there is none to take back.")
        return self.remove(len(self.stack) - 1)

    @_alone
    def remove(self, index: int) -> Patch:
        """Take back one patch, leave those after it in force, and return it.

        Raises:
            EditError: there is no such patch, or its method does not allow it.
        """
        self._refuse_if_suspended()
        refuse_removal(self.stack, index, self.catalog)
        patch = self.stack[index]
        self._changes.take_back([self._changes.stack[index]])
        return patch

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """The unedited model inside the block, the edited one again after it."""
        with self.host.lock, self._changes.suspended():
            yield

    def _refuse_if_suspended(self) -> None:
        if self._changes.is_suspended:
            raise EditError("The session is suspended; edit, save or roll back outside that block.")

    def _refuse_if_spoilt(self) -> None:
        if self._spoilt:
            raise PluginError(self._spoilt)

    @contextlib.contextmanager
    def _guarded(self, spec: MethodSpec) -> Iterator[None]:
        """Where a method's code runs: it leaves the model as it found it, or the session ends.

        Raises:
            PluginError: it wrote to weights outside `ModelHost.scratch`.
        """

        def refuse(written: list[str]) -> None:
            more = f" and {len(written) - 1} more" if len(written) > 1 else ""
            self._spoilt = (
                f"{spec.name} changed {written[0]}{more} itself, so the model is not what it was. "
                f"Load it again; a method writes inside `host.scratch` only."
            )
            self._refuse_if_spoilt()

        with self.host.watched(refuse), untouched(self.model, self.host.tokenizer):
            yield

    # -- files ----------------------------------------------------------------------------

    @_alone
    def save(self, folder: Path, *, instead_of: SavedStack | None = None) -> None:
        """Write the stack as numbered patches and `stack.json`, whole or not at all.

        Args:
            folder: a save that is there is replaced.
            instead_of: what `read_stack` read there; another save since then is not replaced.

        Raises:
            PatchError: the folder holds something else, or the disk refuses.
            EditError: the folder has changed since.
        """
        self._refuse_if_suspended()
        entries = tuple((applied.patch, applied.overlay) for applied in self._changes.stack)
        saved = SavedStack(self.host.name, self.fingerprint, entries)
        write_stack(folder, saved, instead_of)

    @_alone
    def load(
        self, edits: Path | SavedStack, *, force: bool = False, overlay: bool | None = None
    ) -> None:
        """Put saved edits in force: all of them or none.

        Args:
            edits: folder that `save` wrote, or of a single patch; or what `read_stack` read there.
            force: also onto weights other than those that the patches were computed on.  Those
                are told by a checksum where a matrix is first touched; what the saved edits
                themselves make of it is the same on every machine but for rounding.
            overlay: instead of how each patch was in force when it was saved.

        Raises:
            PatchError: malformed, or made for other weights; nothing has changed.
        """
        self._refuse_if_suspended()
        saved = edits if isinstance(edits, SavedStack) else read_stack(edits)
        mark = self.savepoint()
        touched: set[Tensor] = set()  # the saved edits themselves have changed them
        try:
            for patch, was_overlay in saved.entries:
                if not force:
                    self._check_base(patch, touched, others=mark.depth > 0)
                self.apply(patch, overlay=was_overlay if overlay is None else overlay)
                touched |= {self.host.stored(delta.site) for delta in patch.deltas}
        except BaseException:
            self.rollback(mark)
            raise

    def _check_base(self, patch: Patch, touched: Set[Tensor], others: bool) -> None:
        named = f"The {patch.method} patch was computed on other weights ({patch.base.name})"
        anyway = "give --force, in Python force=True, to load it anyway."
        if patch.base.fingerprint != self.fingerprint:
            kind = str(self.host.dtype).removeprefix("torch.")
            raise PatchError(
                f"{named} than those of {self.host.name}, here in {kind}; in another type a model "
                f"has other weights. Load it as it was, or {anyway}"
            )
        for delta in patch.deltas:
            recorded = patch.base.checksums.get(delta.site.parameter)
            is_first = self.host.stored(delta.site) not in touched
            if is_first and recorded != self.host.checksum(delta.site):
                why = " (other edits are in force: roll them back first)" if others else ""
                raise PatchError(
                    f"{named}: {delta.site.parameter} has changed since{why}; {anyway}"
                )


def _several(requests: EditRequest | Iterable[EditRequest]) -> Iterable[EditRequest]:
    """The requests, where one is given or several; what is neither is handed on as one."""
    alone = isinstance(requests, EditRequest | str | Mapping)
    return cast(Iterable[EditRequest], (requests,) if alone else requests)
