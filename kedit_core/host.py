"""`ModelHost`: a model, its tokenizer, and where things are in it."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kedit_core.anatomy import Anatomy, BlockAnatomy, find_anatomy
from kedit_core.digest import bit_sums
from kedit_core.effects import Wrapper, unwrapped
from kedit_core.errors import ModelError, SiteError, reason_of
from kedit_core.models import config_facts, locate
from kedit_core.plugins import Catalog, discover
from kedit_core.reading import Reading
from kedit_core.sites import Site
from kedit_core.spec import ArchitectureSpec

log = logging.getLogger(__name__)

CANNOT_LOAD = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


class ModelHost:
    """A model and its tokenizer, addressed by structure.

    Args:
        model: a `transformers` model, causal or encoder-decoder; it is put into eval mode.
        tokenizer: its fast tokenizer; never changed.
        name: how messages call the model.
        override: templates for `find_anatomy`, where structure alone does not tell.

    Attributes:
        anatomy: where things are.
        reading: the rows of the present forward pass, for wrapped modules; see `Reading`.
        lock: held by whoever runs or changes the model through kedit, one thread at a time.
        agreed: ways of running the model that gave what the whole model gives; see `Tail`.

    Raises:
        ModelError: the tokenizer gives no character offsets, or hidden states have the position
            before the row.
        SiteError: no blocks are found.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "model",
        override: Mapping[str, str] | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"The tokenizer of {name} gives no character offsets. Load its fast version."
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.anatomy: Anatomy = find_anatomy(model, override)
        if self.anatomy.sequence_first:
            raise ModelError(
                f"The hidden states of {name} have the position first and the row of the batch "
                f"second, which methods would mix up. Load a version of it that has rows first."
            )
        self.reading = Reading()
        self.lock = threading.RLock()
        self.agreed: set[Hashable] = set()
        self._versions: dict[int, int] = {}  # of parameters, by id, inside `watched`
        self._accepts = set(inspect.signature(model.forward).parameters)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
        catalog: Catalog | None = None,
    ) -> ModelHost:
        """Load a registered model, a folder or a hub id.

        Args:
            name: a name from `kedit list-models`, a folder, or a hub id.
            device: where to put it; "auto" spreads it with accelerate; by default the
                accelerator if there is one.
            dtype: "auto" keeps the checkpoint's type.
            trust_remote_code: run code that comes with the model.
            catalog: the installed plugins, if they are known already.

        Raises:
            ModelError: it cannot be found or loaded; says what is missing.
        """
        from transformers import AutoConfig, AutoTokenizer

        catalog = catalog or discover()
        folder = locate(name, catalog)
        wanted = _dtype(dtype)
        where = None if device == "auto" else _device(device)
        remote: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **remote)
            config = AutoConfig.from_pretrained(folder, **remote)
            if where is not None:
                _check_arithmetic(where, config.dtype if isinstance(wanted, str) else wanted)
            placement = {"device_map": "auto"} if where is None else {}
            with _bars_on_terminals():
                model = _load_weights(folder, config, {"dtype": wanted, **remote, **placement})
        except CANNOT_LOAD as error:
            raise ModelError(f"The model '{name}' cannot be loaded: {reason_of(error)}") from error
        if where is not None:
            model.to(where)  # type: ignore[arg-type]
        return cls(model, tokenizer, name, _override(catalog, model.config.to_dict()))

    # -- structure ------------------------------------------------------------------------

    @property
    def blocks(self) -> tuple[BlockAnatomy, ...]:
        """The decoder blocks."""
        return self.anatomy.blocks

    @property
    def config(self) -> dict[str, Any]:
        """The model's config as a mapping, to choose presets."""
        return config_facts(self.model.config.to_dict())

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.module(self.anatomy.embedding).weight.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.model.dtype

    @property
    def max_length(self) -> int | None:
        """Longest input in tokens, or None if the config does not say."""
        config = self.model.config.get_text_config()
        for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
            if isinstance(getattr(config, name, None), int):
                return int(getattr(config, name))
        return None

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    def accepts(self, argument: str) -> bool:
        """Whether the model's forward has an argument of this name."""
        return argument in self._accepts

    def block(self, layer: int) -> BlockAnatomy:
        """Anatomy of block `layer`, counted from 0.

        Raises:
            SiteError: there is no such block.
        """
        if not 0 <= layer < len(self.blocks):
            raise SiteError(
                f"Layer {layer} does not exist: {self.name} has {len(self.blocks)} blocks (0 to "
                f"{len(self.blocks) - 1}). Set another layer, or choose a preset made for this "
                f"model with `kedit presets METHOD`."
            )
        return self.blocks[layer]

    def mlp_out(self, layer: int) -> Site:
        """The matrix by which the MLP of block `layer` writes into the residual stream.

        Raises:
            SiteError: no such block, or the block has no single such matrix.
        """
        site = self.block(layer).mlp_out
        if site is None:
            what = "routed experts" if self.blocks[layer].experts else "no MLP"
            raise SiteError(
                f"Block {layer} of {self.name} has {what} and so no single MLP output matrix. "
                f"Choose a layer with an ordinary MLP (see `kedit inspect`)."
            )
        return site

    def mlp_in(self, layer: int) -> Site:
        """The matrix by which the MLP of block `layer` reads.

        Raises:
            SiteError: no such block, or the MLP has no such matrix, or several.
        """
        sites = self.block(layer).mlp_in
        if len(sites) != 1:
            raise SiteError(
                f"The MLP of block {layer} of {self.name} has {len(sites)} input matrices and so "
                f"no single one. Choose its output matrix, mlp_out."
            )
        return sites[0]

    def module(self, path: str) -> nn.Module:
        """The module at `path`; names resolve through wrappers to what they wrap."""
        current: nn.Module = self.model
        for part in path.split(".") if path else ():
            current = _child(current, part, path, self.name)
        return current

    def base_module(self, path: str) -> nn.Module:
        """As `module`, with the wrappers round the module itself taken off."""
        return unwrapped(self.module(path))

    def stored(self, site: Site) -> Tensor:
        """The parameter that holds the matrix, whatever it is stored as.

        Raises:
            SiteError: it does not exist, or is offloaded.
        """
        module = self.base_module(site.module)
        found = getattr(module, site.parameter.rpartition(".")[2], None)
        if not isinstance(found, Tensor):
            raise SiteError(f"{self.name} has no parameter '{site.parameter}'.")
        if found.is_meta:
            raise SiteError(f"'{site.parameter}' is offloaded; load the model without offloading.")
        return found

    def parameter(self, site: Site) -> Tensor:
        """As `stored`, for parameters that can be changed in place.

        Raises:
            SiteError: also where it holds no plain floating-point matrix.
        """
        found = self.stored(site)
        if not found.is_floating_point():
            raise SiteError(
                f"'{site.parameter}' is quantised ({found.dtype}). Compute the edit on float "
                f"weights and load it here as an overlay."
            )
        if found.ndim != (2 if site.expert is None else 3):
            raise SiteError(
                f"'{site.parameter}' is no matrix that can be edited: its shape is "
                f"{tuple(found.shape)}."
            )
        if site.expert is not None and not 0 <= site.expert < len(found):
            raise SiteError(
                f"Expert {site.expert} of '{site.parameter}' does not exist: there are "
                f"{len(found)} experts."
            )
        return found

    def weight(self, site: Site) -> Tensor:
        """The matrix (d_out, d_in) in its own type, sharing memory with the model."""
        return site.view(self.parameter(site).detach())

    def shape(self, site: Site) -> tuple[int, int]:
        """(d_out, d_in) of a matrix, also where the weight is quantised."""
        module = self.base_module(site.module)
        if isinstance(module, nn.Linear) and site.parameter == f"{site.module}.weight":
            return module.out_features, module.in_features
        d_out, d_in = self.weight(site).shape
        return d_out, d_in

    @contextlib.contextmanager
    def scratch(self, *sites: Site) -> Iterator[None]:
        """Let a method write to these matrices; afterwards their bits are as before."""
        parameters = {site.parameter: self.parameter(site) for site in sites}
        saved = {name: p.detach().clone() for name, p in parameters.items()}
        with self.restoring(parameters.values()):
            try:
                yield
            finally:
                with torch.no_grad():
                    for name, parameter in parameters.items():
                        parameter.copy_(saved[name])

    @contextlib.contextmanager
    def restoring(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """What is written inside the block, which ends with the bits of its beginning, is no change
        that `watched` tells."""
        whole = [p for p in parameters if self._versions.get(id(p)) == _version(p)]
        try:
            yield
        finally:
            self._versions |= {id(p): _version(p) for p in whole}

    @contextlib.contextmanager
    def watched(self, told: Callable[[list[str]], object]) -> Iterator[None]:
        """Tell after the block which parameters were written to or exchanged, if any were.

        What autograd does not count is not seen: writes through `.data`, and to offloaded weights.
        """
        before = {n: p for n, p in self.model.named_parameters() if not p.is_meta}
        self._versions = {id(p): _version(p) for p in before.values()}
        try:
            yield
        finally:
            now = dict(self.model.named_parameters())
            written = [
                name
                for name, parameter in before.items()
                if id(now.get(name)) != id(parameter)
                or self._versions[id(parameter)] != _version(parameter)
            ]
            self._versions = {}
            if written:
                told(written)

    # -- identity -------------------------------------------------------------------------

    def checksum(self, site: Site) -> str:
        """SHA-256 of the parameter's bytes, type and shape."""
        parameter = self.stored(site).detach()
        digest = hashlib.sha256(f"{parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(_bytes(parameter))
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Short name for config and weights together: a hash of the config and of every parameter.

        To be taken of the unedited model; `EditSession` does.
        """
        config = _architecture(self.model.config.to_dict())
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, parameter in sorted(self.model.named_parameters()):
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            if not parameter.is_meta:
                digest.update(bit_sums(parameter))
        return digest.hexdigest()[:16]


def _version(parameter: Tensor) -> int:
    """How often it was written to; of what was made in inference mode that is not known."""
    return 0 if parameter.is_inference() else parameter._version


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that says what the model is, and not how it is used."""
    of_use = {*PreTrainedConfig().to_dict(), "use_cache"} - {"model_type", "is_encoder_decoder"}
    return {
        key: _architecture(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in of_use and not key.endswith("_token_id")
    }


def _child(current: nn.Module, part: str, path: str, name: str) -> nn.Module:
    while True:
        found = current._modules.get(part)
        if found is not None:
            return found
        if not isinstance(current, Wrapper):
            raise SiteError(f"{name} has no module '{path}': '{part}' is missing.")
        current = current.base


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def _default_device() -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"'{dtype}' is no type for weights. Use float32, bfloat16 or float16.")
    return found


def _device(name: str | None) -> torch.device:
    try:
        return torch.device(name or _default_device())
    except RuntimeError:
        raise ModelError(f"'{name}' is no device. Use cpu, cuda, cuda:1 or auto.") from None


def _check_arithmetic(device: torch.device, dtype: torch.dtype | None) -> None:
    """Refuse a device or a type that cannot multiply, before any weight is read."""
    dtype = dtype or torch.float32
    try:
        x = torch.ones(2, 2, device=device, dtype=dtype)
        torch.nn.functional.linear(x, x)
    except (RuntimeError, AssertionError, ImportError) as error:
        way_out = "--dtype float32" if device.type == "cpu" else "--device cpu"
        raise ModelError(
            f"This machine cannot compute in {dtype} on {device} ({reason_of(error)}). Use "
            f"{way_out}."
        ) from None


def _load_weights(
    folder: str, config: PreTrainedConfig, options: Mapping[str, Any]
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(folder, config=config, **options)


@contextlib.contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Inside the block the bars of transformers are silent where stderr is no terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled() and not are_progress_bars_disabled()  # it sets both
    silenced = shown and not sys.stderr.isatty()
    if silenced:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if silenced:
            bars.enable_progress_bar()


def _override(catalog: Catalog, config: Mapping[str, Any]) -> Mapping[str, str] | None:
    for spec in catalog.all(ArchitectureSpec):
        if spec.config and all(config.get(k) == v for k, v in spec.config.items()):
            return spec.load()
    return None
