"""A method that fails, or that forgets to clean up, leaves the model as it was."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from kedit_core import HyperParams, MethodSpec
from kedit_core.editing import EditJob, EditSession, Patch, WeightDelta
from kedit_core.errors import EditError
from kedit_core.guard import untouched
from tests.core.edits import bits, fact, hooks, logits, same, weight_patch


class Manners(HyperParams):
    """How badly the method behaves."""

    end: str = "well"


class Messy:
    """Touches all that can be touched, then ends as its settings say."""

    def __init__(self, hparams: Manners) -> None:
        self.hparams = hparams

    def edit(self, job: EditJob) -> Patch:
        host, site = job.host, job.host.mlp_out(1)
        assert not any(p.requires_grad or p.grad is not None for p in host.model.parameters())
        random.random(), np.random.rand(), torch.rand(1)
        host.model.train()
        for parameter in host.model.parameters():
            parameter.requires_grad_(True)
            parameter.grad = torch.ones_like(parameter)
        module = host.module(site.module)
        module.register_forward_hook(lambda m, args, out: out * 0)
        module.register_forward_pre_hook(lambda m, args, kw: None, with_kwargs=True)
        module.register_full_backward_hook(lambda m, given, made: None)
        for hook in list(host.model._forward_hooks):
            del host.model._forward_hooks[hook]
        host.module(host.blocks[2].mlp).forward = lambda x: x * 0
        tokenizer = host.tokenizer
        tokenizer.padding_side = "left" if tokenizer.padding_side == "right" else "right"
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.truncation_side = "left"
        tokenizer.model_max_length = 3
        tokenizer(["x", "y z"], padding="max_length", truncation=True)
        delta = WeightDelta(site, torch.ones_like(host.weight(site)))
        with host.scratch(site), job.unedited():
            host.weight(site).add_(1)
            if self.hparams.end == "keyboard interrupt":
                raise KeyboardInterrupt
            if self.hparams.end == "error":
                raise ZeroDivisionError
            if self.hparams.end == "edit error":
                raise EditError("It cannot be written.")
            if self.hparams.end == "nan":
                delta = WeightDelta(site, delta.left * float("nan"))
        return Patch("messy", (delta,))


MESSY = MethodSpec("messy", f"{__name__}:Messy", "Messy.", hparams=f"{__name__}:Manners")


def surroundings(host) -> dict[str, object]:
    """All but the weights that a method could leave changed, read from the objects themselves."""
    tokenizer = host.tokenizer
    state = np.random.get_state()
    return {
        "hooks": hooks(host.model),
        "forwards": [m for m in host.model.modules() if "forward" in vars(m)],
        "modules": list(map(id, host.model.modules())),
        "training": [m.training for m in host.model.modules()],
        "requires_grad": [p.requires_grad for p in host.model.parameters()],
        "grads": [None if p.grad is None else p.grad.sum().item() for p in host.model.parameters()],
        "tokenizer": (
            tokenizer.padding_side,
            tokenizer.truncation_side,
            tokenizer.pad_token,
            tokenizer.model_max_length,
            len(tokenizer),
            tokenizer.backend_tokenizer.to_str(),
        ),
        "python": random.getstate(),
        "numpy": (state[1].tolist(), state[2]),
        "torch": torch.get_rng_state().tolist(),
    }


@pytest.fixture
def busy_session(host) -> EditSession:
    """A session on a model with a user's own hook, gradient and flags, and with edits in force."""
    model = host.model
    parameters = list(model.parameters())
    parameters[0].grad = torch.full_like(parameters[0], 2.0)
    parameters[1].requires_grad_(False)
    model.register_forward_hook(lambda m, args, out: None)
    host.module(host.anatomy.final_norm).train()  # a flag that leaves the answers as they are
    session = EditSession(host)
    session.apply(weight_patch(host, 1))
    session.apply(weight_patch(host, 1, seed=3), overlay=True)
    return session


@pytest.mark.parametrize(
    ("end", "error"),
    [
        ("keyboard interrupt", KeyboardInterrupt),
        ("error", ZeroDivisionError),
        ("edit error", EditError),
        ("nan", EditError),
    ],
)
def test_a_method_that_fails_leaves_everything_as_it_was(busy_session, end, error):
    session, host = busy_session, busy_session.host
    before, around, answers = bits(host.model), surroundings(host), logits(host)

    with pytest.raises(error):
        session.edit(MESSY, fact(), hparams={"end": end})

    after = surroundings(host)
    assert {name for name in around if after[name] != around[name]} == set()
    assert same(bits(host.model), before)
    assert torch.equal(logits(host), answers)
    assert len(session.stack) == 2
    with session.suspended():
        pass
    session.rollback()


def test_a_method_that_does_not_clean_up_changes_weights_only(busy_session):
    session, host = busy_session, busy_session.host
    before, around = bits(host.model), surroundings(host)

    session.edit(MESSY, fact())

    after = surroundings(host)
    assert {name for name in around if after[name] != around[name]} == set()
    changed = {n for n, t in bits(host.model).items() if not torch.equal(t, before[n])}
    assert changed == {host.mlp_out(1).parameter}
    session.pop()
    assert same(bits(host.model), before)


def test_the_message_of_numbers_that_are_not_finite_says_what_to_do(session):
    with pytest.raises(EditError, match=r"not finite .* unchanged\. Lower the learning rate"):
        session.edit(MESSY, fact(), hparams={"end": "nan"})


def test_weights_are_frozen_inside_and_as_before_after_it(host):
    parameters = list(host.model.parameters())
    flags = [n % 2 == 0 for n in range(len(parameters))]
    for parameter, flag in zip(parameters, flags, strict=True):
        parameter.requires_grad_(flag)
    with untouched(host.model, host.tokenizer):
        assert not any(p.requires_grad for p in parameters)
        assert not host.model.training
    assert [p.requires_grad for p in parameters] == flags


def test_scratch_restores_after_an_error(host):
    sites, before = [host.mlp_out(1), host.mlp_out(2)], bits(host.model)

    def write_and_fail() -> None:
        with host.scratch(*sites):
            for site in sites:
                host.weight(site).zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert same(bits(host.model), before)
