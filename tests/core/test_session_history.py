"""Whatever is done in whatever order, a session's model is what its stack says."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from kedit_core.editing import EditSession, ModelHost, ModuleSwap, Patch, WeightDelta, Wrapper
from kedit_core.errors import EditError, PatchError
from kedit_core.plugins import discover
from kedit_core.testing.toys import TOYS, load_toy
from tests.core.edits import (
    based,
    bits,
    hooks,
    preface_patch,
    random_delta,
    same,
    shift_patch,
    weight_patch,
)

LAYERS = (1, 2)
layers = st.sampled_from(LAYERS)
seeds = st.integers(0, 9)


@dataclass(frozen=True)
class Entry:
    """What the oracle remembers of a patch in force."""

    patch: Patch
    overlay: bool


def recomputed(pristine: dict[str, Tensor], stack: list[Entry]) -> dict[str, Tensor]:
    """The weights after the in-place patches: sums in float32, oldest first, cast at the end."""
    weights = {name: tensor.float() for name, tensor in pristine.items()}
    for entry in stack:
        for delta in entry.patch.deltas if not entry.overlay else ():
            name, site = delta.site.parameter, delta.site
            change = delta.left @ delta.right
            change = change.T if site.transposed else change
            weights[name] = weights[name] + change
    cast = {name: tensor.to(pristine[name].dtype) for name, tensor in weights.items()}
    return {name: tensor.view(torch.uint8) for name, tensor in cast.items()}


class History(RuleBasedStateMachine):
    """A session beside a list of what should be in force; the list is the oracle."""

    originals: dict  # toys by name and type, as they come from disk

    @initialize(toy=st.sampled_from(TOYS), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def begin(self, toy, dtype):
        model, tokenizer = copy.deepcopy(self.originals[toy])
        model.to(dtype)
        self.host = ModelHost(model, tokenizer, toy)
        self.session = EditSession(self.host, catalog=self.originals["catalog"])
        self.pristine = {name: t.detach().clone() for name, t in model.state_dict().items()}
        self.modules = {p: self.host.module(p) for n in LAYERS for p in self.paths(n)}
        self.stack: list[Entry] = []
        self.marks: list[tuple[object, list[Entry]]] = []

    def paths(self, layer: int) -> tuple[str, str]:
        return self.host.mlp_out(layer).module, self.host.blocks[layer].mlp

    def apply(self, patch: Patch, overlay: bool = False) -> None:
        patch = based(self.session, patch)
        self.session.apply(patch, overlay=overlay)
        self.stack.append(Entry(patch, overlay))

    @rule(layer=layers, seed=seeds)
    def change_weights(self, layer, seed):
        self.apply(weight_patch(self.host, layer, seed=seed))

    @rule(seed=seeds)
    def change_one_matrix_twice(self, seed):
        deltas = [random_delta(self.host, self.host.mlp_out(n), seed + n) for n in (1, 2, 1)]
        self.apply(Patch("by-hand", tuple(deltas)))

    @rule(layer=layers, seed=seeds)
    def lay_over(self, layer, seed):
        self.apply(weight_patch(self.host, layer, seed=seed), overlay=True)

    @rule(layer=layers, which=st.integers(0, 1), seed=seeds)
    def wrap(self, layer, which, seed):
        self.apply(shift_patch(self.host, self.paths(layer)[which], seed))

    @rule(text=st.sampled_from(["Lo! ", "Ö. "]))
    def preface(self, text):
        self.apply(preface_patch(text))

    @rule()
    def mark(self):
        self.marks.append((self.session.savepoint(), list(self.stack)))

    @precondition(lambda self: self.marks)
    @rule(data=st.data())
    def roll_back(self, data):
        mark, stack = data.draw(st.sampled_from(self.marks))
        is_known = len(stack) <= len(self.stack) and (
            not stack or self.stack[len(stack) - 1].patch is stack[-1].patch
        )
        if is_known:
            self.session.rollback(mark)
            self.stack = list(stack)
        else:
            with pytest.raises(EditError):
                self.session.rollback(mark)

    @precondition(lambda self: self.stack)
    @rule()
    def pop(self):
        assert self.session.pop() is self.stack.pop().patch

    @rule()
    def look_at_the_unedited_model(self):
        with self.session.suspended():
            assert same(bits(self.host.model), recomputed(self.pristine, []))

    @rule(layer=layers, overlay=st.booleans(), seed=seeds)
    def fail_half_way(self, layer, overlay, seed):
        good = random_delta(self.host, self.host.mlp_out(layer), seed)
        wrap = shift_patch(self.host, self.paths(layer)[0]).effects[0]
        broken = ModuleSwap(self.paths(layer)[0], "shift")  # lacks its vector
        with pytest.raises(PatchError):
            self.session.apply(Patch("by-hand", (good, wrap, broken, good)), overlay=overlay)

    @rule(layer=layers)
    def overflow(self, layer):
        site = self.host.mlp_out(layer)
        d_out, d_in = self.host.weight(site).shape
        huge = WeightDelta(site, torch.full((d_out, 1), 1e30), torch.full((1, d_in), 1e30))
        good = random_delta(self.host, site)
        with pytest.raises(EditError):
            self.session.apply(Patch("by-hand", (good, huge)))

    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            self.session.save(Path(folder) / "edits")
            self.session.rollback()
            assert same(bits(self.host.model), recomputed(self.pristine, []))
            self.session.load(Path(folder) / "edits")
        loaded = self.session.stack
        self.stack = [
            Entry(patch, entry.overlay) for patch, entry in zip(loaded, self.stack, strict=True)
        ]
        # Marks name patches by identity, and these are other objects now.
        self.marks = [(mark, stack) for mark, stack in self.marks if not stack]

    @invariant()
    def the_stack_is_as_expected(self):
        assert list(self.session.stack) == [entry.patch for entry in self.stack]
        overlays = [self.session.is_overlay(n) for n in range(len(self.stack))]
        assert overlays == [entry.overlay for entry in self.stack]

    @invariant()
    def the_weights_are_as_expected(self):
        assert same(bits(self.host.model), recomputed(self.pristine, self.stack))

    @invariant()
    def hooks_and_wrappers_are_as_expected(self):
        overlaid = [d for e in self.stack if e.overlay for d in e.patch.deltas]
        swaps = [s.path for e in self.stack for s in e.patch.effects if isinstance(s, ModuleSwap)]
        assert hooks(self.host.model) == len(overlaid) + bool(swaps)
        for path, original in self.modules.items():
            found, depth = self.host.module(path), 0
            while isinstance(found, Wrapper):
                assert not found.passes_through
                found, depth = found.base, depth + 1
            assert found is original
            assert depth == (path in swaps)

    def teardown(self):
        if hasattr(self, "session"):
            self.session.rollback()
            assert same(bits(self.host.model), recomputed(self.pristine, []))
            assert hooks(self.host.model) == 0
            assert not any(isinstance(module, Wrapper) for module in self.host.model.modules())


@pytest.fixture(scope="class")
def originals():
    History.originals = {name: load_toy(name) for name in TOYS} | {"catalog": discover()}


@pytest.mark.usefixtures("originals")
class TestHistory(History.TestCase):
    settings = settings(
        max_examples=25,
        stateful_step_count=20,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
