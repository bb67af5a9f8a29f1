"""`Patch`: what a method computes, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kedit_core.effects import CallEffect, Effect, ModuleSwap, WeightDelta, is_finite
from kedit_core.errors import PatchError, RequestError
from kedit_core.files import new_folder
from kedit_core.request import EditRequest
from kedit_core.sites import Site

FORMAT = 1
MANIFEST = "patch.json"
TENSORS = "tensors.safetensors"

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Base:
    """The model that a patch was computed on.

    Attributes:
        name: how it was called.
        fingerprint: of the unedited model, see `ModelHost.fingerprint`.
        checksums: of each parameter that the patch touches, as it was just before.
    """

    name: str = ""
    fingerprint: str = ""
    checksums: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Patch:
    """What an edit changes, as plain data.  Applied and taken back by `EditSession` only.

    A method fills `method`, `effects`, `state` and `notes`; the session adds the rest.

    Attributes:
        method: name of the method.
        effects: what changes, in the order in which it is put in force.
        state: tensors that a lifelong method wants back at its next edit.
        notes: JSON values worth keeping: losses, norms, what was sampled.
        requests: the facts that it writes.
        hparams: the settings with which it was computed.
        plugin: name and version of the distribution that computed it.
        seed: of the job's generator.
        base: the model that it belongs to.

    Raises:
        PatchError: an effect, state or note is none.
    """

    method: str
    effects: tuple[Effect, ...]
    state: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    requests: tuple[EditRequest, ...] = ()
    hparams: Mapping[str, Any] = field(default_factory=dict)
    plugin: str = ""
    seed: int = 0
    base: Base = Base()

    def __post_init__(self) -> None:
        for effect in self.effects:
            if not isinstance(effect, Effect):
                raise PatchError(f"{effect!r} in the {self.method} patch is no effect.")
        for name, tensor in self.state.items():
            if not isinstance(tensor, Tensor):
                raise PatchError(f"State '{name}' of the {self.method} patch is no tensor.")
        for name, note in self.notes.items():
            try:
                json.dumps(note, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise PatchError(
                    f"Note '{name}' of the {self.method} patch is no JSON value: {error}."
                ) from None

    def __repr__(self) -> str:
        return f"Patch({self.method!r}, {len(self.effects)} effects, {len(self.requests)} facts)"

    @property
    def deltas(self) -> tuple[WeightDelta, ...]:
        """The weight effects."""
        return tuple(e for e in self.effects if isinstance(e, WeightDelta))

    def check_finite(self) -> None:
        """Refuse a patch with NaN or infinity.

        Raises:
            PatchError: names the effect.
        """
        for number, effect in enumerate(self.effects):
            if not is_finite(effect):
                raise PatchError(f"Effect {number} of the {self.method} patch is not finite.")
        for name, tensor in self.state.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise PatchError(f"State '{name}' of the {self.method} patch is not finite.")

    def save(self, folder: Path) -> None:
        """Write the patch as `patch.json` and `tensors.safetensors`, whole or not at all.

        Raises:
            PatchError: the folder exists already, or the disk refuses.
        """
        folder = Path(folder)
        if folder.exists():
            raise PatchError(f"{folder} exists already. Choose another folder.")
        try:
            with new_folder(folder) as temporary:
                self.write(temporary)
        except (OSError, SafetensorError, TypeError) as error:  # TypeError: config that is no JSON
            raise PatchError(f"The patch cannot be saved in {folder}: {error}.") from None

    def write(self, folder: Path) -> None:
        """Write both files into an existing folder."""
        tensors = {f"state.{name}": t for name, t in self.state.items()}
        for number, effect in enumerate(self.effects):
            tensors |= {f"effect.{number}.{name}": t for name, t in effect.tensors.items()}
        flat = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        save_file(flat, folder / TENSORS)
        text = json.dumps(self._manifest(), indent=2, ensure_ascii=False)
        (folder / MANIFEST).write_text(text + "\n", "utf-8")

    def _manifest(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "method": self.method,
            "plugin": self.plugin,
            "seed": self.seed,
            "hparams": dict(self.hparams),
            "requests": [r.model_dump(mode="json") for r in self.requests],
            "base": {
                "name": self.base.name,
                "fingerprint": self.base.fingerprint,
                "checksums": dict(self.base.checksums),
            },
            "effects": [_describe(effect) for effect in self.effects],
            "state": sorted(self.state),
            "notes": dict(self.notes),
        }

    @classmethod
    def load(cls, folder: Path) -> Patch:
        """Read a patch and check all that can be checked without a model.

        Raises:
            PatchError: a file is missing or malformed, a tensor is missing, spare, not finite or
                of a wrong type or shape, or an effect is of no known kind.
        """
        folder = Path(folder)
        data = read_manifest(folder / MANIFEST)
        tensors = _read_tensors(folder / TENSORS)
        try:
            check_format(folder, data["format"])
            effects = tuple(
                _build(folder, entry, _take(tensors, f"effect.{number}."))
                for number, entry in enumerate(data["effects"])
            )
            state = _take(tensors, "state.")
            if sorted(state) != sorted(data["state"]):
                raise PatchError(f"{folder}: the state's tensors are not those of the manifest.")
            if tensors:
                raise PatchError(f"{folder}: the tensor '{next(iter(tensors))}' has no owner.")
            patch = cls(
                method=str(data["method"]),
                effects=effects,
                state=state,
                notes=dict(data["notes"]),
                requests=tuple(EditRequest(**r) for r in data["requests"]),
                hparams=dict(data["hparams"]),
                plugin=str(data["plugin"]),
                seed=int(data["seed"]),
                base=_base(data["base"]),
            )
        except RequestError as error:
            raise PatchError(f"{folder / MANIFEST} holds a malformed request: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise malformed(folder / MANIFEST, error) from None
        patch.check_finite()
        return patch


def read_manifest(path: Path) -> dict[str, Any]:
    """A JSON mapping.

    Raises:
        PatchError: missing, not JSON, or no mapping.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise PatchError(f"{path} does not exist; {path.parent} is no saved edit.") from None
    except NotADirectoryError:
        raise PatchError(f"{path.parent} is a file, not a folder of saved edits.") from None
    except (OSError, ValueError) as error:
        raise PatchError(f"{path} cannot be read: {error}.") from None
    if not isinstance(data, dict):
        raise PatchError(f"{path} is no JSON mapping.")
    return data


def check_format(folder: Path, found: Any) -> None:
    """Refuse files of another format.

    Raises:
        PatchError: says which; of a newer one, what to do.
    """
    if found != FORMAT:
        newer = " Upgrade kedit." * (isinstance(found, int) and found > FORMAT)
        raise PatchError(f"{folder}: format {found!r}, this kedit reads {FORMAT}.{newer}")


def malformed(path: Path, error: Exception) -> PatchError:
    """What to raise where a manifest lacks a key or holds something of a wrong type."""
    lacks = isinstance(error, KeyError)
    return PatchError(f"{path} lacks {error}." if lacks else f"{path} is malformed: {error!r}.")


def _describe(effect: Effect) -> dict[str, Any]:
    if isinstance(effect, WeightDelta):
        site = effect.site
        return {
            "kind": "weights",
            "parameter": site.parameter,
            "transposed": site.transposed,
            "expert": site.expert,
            "shape": list(effect.shape),
            "rank": effect.rank,
        }
    names = sorted(effect.tensors)
    common = {"type": effect.type, "config": dict(effect.config), "tensors": names}
    if isinstance(effect, ModuleSwap):
        return {"kind": "module", "path": effect.path, **common}
    return {"kind": "call", **common}


def _build(folder: Path, entry: dict[str, Any], tensors: dict[str, Tensor]) -> Effect:
    kind = entry["kind"]
    if kind == "weights":
        site = Site(str(entry["parameter"]), bool(entry["transposed"]), entry["expert"])
        if site.expert is not None and type(site.expert) is not int:
            raise PatchError(f"{folder}: the expert of {site.parameter} is no number.")
        if set(tensors) != ({"left"} if entry["rank"] is None else {"left", "right"}):
            raise PatchError(f"{folder}: the tensors of {site.parameter} are missing.")
        if any(t.dtype not in _FLOATS for t in tensors.values()):
            raise PatchError(f"{folder}: the change of {site.parameter} is not floating point.")
        delta = WeightDelta(site, tensors["left"], tensors.get("right"))
        if list(delta.shape) != entry["shape"] or delta.rank != entry["rank"]:
            raise PatchError(f"{folder}: the change of {site.parameter} has a wrong shape.")
        return delta
    if kind not in ("module", "call"):
        raise PatchError(f"{folder}: an effect is of the unknown kind '{kind}'.")
    if sorted(tensors) != sorted(entry["tensors"]):
        raise PatchError(f"{folder}: the tensors of effect '{entry['type']}' are missing.")
    if kind == "module":
        return ModuleSwap(str(entry["path"]), str(entry["type"]), dict(entry["config"]), tensors)
    return CallEffect(str(entry["type"]), dict(entry["config"]), tensors)


def _base(data: Mapping[str, Any]) -> Base:
    return Base(str(data["name"]), str(data["fingerprint"]), dict(data["checksums"]))


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise PatchError(f"{path} does not exist.") from None
    except (OSError, SafetensorError) as error:
        raise PatchError(f"{path} is no safetensors file: {error}.") from None
