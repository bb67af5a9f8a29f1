"""One tiny recorded forward of a model, and what can be read off it about single modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kedit_core.errors import ModelError

BATCH, LENGTH = 2, 3  # they differ, so that a shape tells which dimension is the position


def hidden_of(output: object) -> Tensor:
    """The hidden state in what a module returned: the tensor itself, or the first of a tuple.

    Raises:
        ModelError: there is none.
    """
    first = _first_of(output)
    if not isinstance(first, Tensor):
        raise ModelError(
            f"A module returned a {type(output).__name__} in which no hidden state can be found: "
            f"expected a tensor, or a tuple that starts with one."
        )
    return first


def with_hidden(output: object, hidden: Tensor) -> object:
    """`output` with `hidden` as its hidden state, in the form in which it came.

    Raises:
        ModelError: there is no hidden state to replace.
    """
    hidden_of(output)
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@dataclass(frozen=True)
class Call:
    """What a module was given and returned.

    Attributes:
        args: positional arguments; tensors are copies, since some models add in place.
        kwargs: keyword arguments, likewise.
        given: the hidden state that came in: the first floating-point tensor.
        returned: the hidden state that went out.
        as_tuple: whether it went out as the first of a tuple.
    """

    args: Sequence[object]
    kwargs: Mapping[str, object]
    given: Tensor | None
    returned: Tensor | None
    as_tuple: bool

    @property
    def d_in(self) -> int:
        """Last dimension of what came in, 0 if nothing did."""
        return self.given.shape[-1] if self.given is not None and self.given.ndim else 0

    @property
    def d_out(self) -> int:
        """Last dimension of what went out, 0 if nothing did."""
        return self.returned.shape[-1] if self.returned is not None and self.returned.ndim else 0

    @property
    def keeps_shape(self) -> bool:
        """Whether a (…, position, feature) tensor came in and one of its shape went out."""
        if self.given is None or self.returned is None or self.given.ndim < 3:
            return False
        return self.given.shape == self.returned.shape and self.returned.is_floating_point()


@dataclass(frozen=True)
class Trace:
    """A model's modules by path, and their calls in the order in which they ended."""

    modules: Mapping[str, nn.Module]
    calls: Mapping[str, Call]

    def children(self, path: str) -> list[str]:
        """Direct children, whether they ran or not; shared modules count where they come first."""
        names = (name for name, _ in self.modules[path].named_children())
        paths = (f"{path}.{name}".removeprefix(".") for name in names)
        return [child for child in paths if child in self.modules]

    def parts(self, path: str) -> list[str]:
        """Direct children that ran; a module list does not run, so its children stand for it."""
        nested = [[c] if c in self.calls else self.parts(c) for c in self.children(path)]
        return [part for parts in nested for part in parts]

    def below(self, path: str) -> list[str]:
        """Everything inside the module that ran, in order."""
        return [inner for inner in self.calls if inner.startswith(f"{path}.")]

    def projections(self, path: str) -> list[str]:
        """The projections inside the module, in order."""
        return [inner for inner in self.below(path) if self.is_projection(inner)]

    def is_leaf(self, path: str) -> bool:
        """Whether the module has no children."""
        return next(self.modules[path].children(), None) is None

    def is_projection(self, path: str) -> bool:
        """Whether the module is a leaf that applies one matrix, maybe packed, to every token."""
        module, given = self.modules[path], self.calls[path].given
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        sees_all = given is not None and given.numel() == BATCH * LENGTH * given.shape[-1]
        return sees_all and self.is_leaf(path) and max((t.ndim for t in tensors), default=0) == 2


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every training flag as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def record(model: PreTrainedModel) -> Trace:
    """Run the model once on two sequences of three tokens and note every call.

    Raises:
        ModelError: the model does not run on token ids alone.
    """
    modules = dict(model.named_modules())
    calls: dict[str, Call] = {}
    handles = [handle for path in modules for handle in _watch(path, modules[path], calls)]
    try:
        inputs = _tiny_inputs(model)
        with _ShapesOnly() if inputs["input_ids"].is_meta else nullcontext():
            model(**inputs, use_cache=False)
    except Exception as error:  # somebody else's code: anything can go wrong in it
        raise ModelError(
            f"{type(model).__name__} does not run on token ids alone, so its structure cannot be "
            f"found: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return Trace(modules, calls)


def mixes_positions(module: nn.Module, call: Call) -> bool:
    """Whether the first position reaches the last one, as in attention and its replacements.

    The call is repeated with NaN at the first position, which needs no threshold.  Where there
    are no numbers (meta device), a module that makes tensors of rank four mixes: it splits heads
    or states, which nothing position-wise does.
    """
    if call.returned is None or call.returned.ndim != 3:
        return False
    if call.returned.is_meta or not call.returned.isfinite().all():
        with _ShapesOnly() as seen:
            module(*call.args, **call.kwargs)
        return seen.rank >= 4
    args = [_spoiled(value) for value in call.args]
    kwargs = {name: _spoiled(value) for name, value in call.kwargs.items()}
    output = hidden_of(module(*args, **kwargs))
    return bool(output.select(_position_dim(output), -1).isnan().any())


def stored_transposed(module: nn.Module, call: Call | None) -> bool:
    """Whether the module's weight is stored (d_in, d_out): by shape, by numbers, or by type."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not call or call.given is None or call.returned is None:
        return isinstance(module, Conv1D)
    shape = tuple(weight.shape)
    straight, turned = shape == (call.d_out, call.d_in), shape == (call.d_in, call.d_out)
    if straight != turned:
        return turned
    is_packed = not straight or not weight.is_floating_point() or weight.itemsize < 2
    if is_packed or weight.is_meta or call.given.is_meta:
        return isinstance(module, Conv1D)
    x, y = call.given.to(weight), call.returned.to(weight)
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        y = y - bias
    return bool((x @ weight - y).float().norm() < (x @ weight.mT - y).float().norm())


def _watch(path: str, module: nn.Module, calls: dict[str, Call]) -> Iterator[RemovableHandle]:
    """Hooks that put the module's latest call at the end of `calls`."""
    given: list[tuple[list[object], dict[str, object]]] = []

    def before(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given.append(([_copy(v) for v in args], {name: _copy(v) for name, v in kwargs.items()}))

    def after(_: nn.Module, __: object, output: object) -> None:
        args, kwargs = given.pop()
        values = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        first = _first_of(output)
        calls.pop(path, None)
        calls[path] = Call(
            args=args,
            kwargs=kwargs,
            given=next((v for v in values if v.is_floating_point()), None),
            returned=first.clone() if isinstance(first, Tensor) else None,
            as_tuple=isinstance(output, tuple | list),
        )

    yield module.register_forward_pre_hook(before, with_kwargs=True)
    yield module.register_forward_hook(after)


def _tiny_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Token ids (BATCH, LENGTH), all different and none of them padding."""
    embedding = model.get_input_embeddings()
    offload = getattr(embedding, "_hf_hook", None)  # accelerate may keep the weight elsewhere
    device = getattr(offload, "execution_device", None)
    if device is None:
        device = next(embedding.parameters()).device
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    tokens = [token for token in range(BATCH * LENGTH + 1) if token != padding]
    ids = torch.tensor(tokens[: BATCH * LENGTH], device=device).view(BATCH, LENGTH)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}


class _ShapesOnly(TorchFunctionMode):
    """Lets code run without numbers, and notes the highest rank of the tensors it makes."""

    # what models ask: is the mask full, is nothing packed?  Is padding among the tokens?
    ANSWERS: ClassVar = {Tensor.__bool__: True, Tensor.__contains__: False}
    rank = 0

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func in self.ANSWERS and isinstance(args[0], Tensor) and args[0].is_meta:
            return self.ANSWERS[func]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.rank = max(self.rank, result.ndim)
        return result


def _first_of(output: object) -> object:
    return output[0] if isinstance(output, tuple | list) and output else output


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


def _position_dim(hidden: Tensor) -> int:
    """1, or 0 in models that put the sequence first."""
    return 0 if hidden.shape[0] == LENGTH else 1


def _spoiled(value: object) -> object:
    """A hidden state with NaN at its first position; anything else as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != 3:
        return value
    if set(value.shape[:2]) != {BATCH, LENGTH}:
        return value
    value = value.clone()
    value.select(_position_dim(value), 0).fill_(torch.nan)
    return value
