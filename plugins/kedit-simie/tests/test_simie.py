"""SimIE: its recursion, and sequences of other methods' edits on the toy models."""

from __future__ import annotations

import pytest
import torch
from kedit_simie.method import keys_of, recursion
from torch import Tensor

from kedit_core import EditError, EditRequest, RequestError, SettingError, discover
from kedit_core.editing import EditSession, Patch
from kedit_core.hparams import presets_of, resolve
from kedit_core.testing.toys import TOYS, toy_facts

torch.set_num_threads(1)

D_OUT, D_IN = 6, 15
ROME = {"layer": 1, "steps": 6, "second_moment": False}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("ridge", [0.5, 100.0])
def test_steps_add_up_to_least_squares_over_all_edits(ridge):
    original = draw(D_OUT, D_IN, seed=0)
    weight, rights = original, []
    moment = ridge * torch.eye(D_IN, dtype=torch.float64)
    wanted = ridge * original
    for t in range(6):
        keys, edited = 2 * draw(D_IN, 3 + t, seed=10 + t), original + draw(D_OUT, D_IN, seed=20 + t)

        step = recursion((edited - weight) @ keys, keys, rights, ridge)

        system = torch.eye(3 + t) + keys.mT @ torch.linalg.solve(moment, keys)
        # Earlier factors are kept in float32.
        assert step.condition == pytest.approx(float(torch.linalg.cond(system)), rel=1e-4)
        weight = weight + step.left.double() @ step.right.double()
        rights.append(step.right)
        moment = moment + keys @ keys.mT
        wanted = wanted + edited @ keys @ keys.mT
        expected = torch.linalg.solve(moment, wanted.mT).mT
        # Steps are kept in float32, and each builds on those before it.
        assert float((weight - expected).norm()) < 1e-5 * float(expected.norm())


@pytest.mark.parametrize("length", [10.0, 250.0, 2e3, 1e5])
def test_sequence_with_a_long_key_is_right_or_refused(length):
    """The first token's key is often long, and the same in every edit."""
    original, sink = draw(D_OUT, D_IN, seed=0), draw(D_IN, 1, seed=1)
    weight, rights = original, []
    moment, wanted = torch.eye(D_IN, dtype=torch.float64), original
    for t in range(4):
        keys = torch.cat([length * sink / sink.norm(), draw(D_IN, 3, seed=10 + t)], dim=1)
        edited = original + draw(D_OUT, D_IN, seed=20 + t)
        if length > 1e3:
            with pytest.raises(
                EditError, match=r"`ridge` 1 is too small.*condition of its system \de"
            ):
                recursion((edited - weight) @ keys, keys, rights, 1.0)
            return
        step = recursion((edited - weight) @ keys, keys, rights, 1.0)
        weight = weight + step.left.double() @ step.right.double()
        rights.append(step.right)
        moment, wanted = moment + keys @ keys.mT, wanted + edited @ keys @ keys.mT

    change = torch.linalg.solve(moment, wanted.mT).mT - original
    assert float((weight - original - change).norm()) < 1e-3 * float(change.norm())


@pytest.mark.parametrize("target", ["Rome", "New Haven and Port Sable"])
def test_keys_are_what_the_matrix_reads_at_each_token_of_prompt_and_target_once(target, host):
    site = host.mlp_out(1)
    request = EditRequest(prompt="Mira Voss lives in", target_new=target)
    read = []
    handle = host.module(site.module).register_forward_pre_hook(
        lambda _, args: read.append(args[0])
    )
    with torch.no_grad():
        host.model(**host.tokenizer(f"Mira Voss lives in {target}", return_tensors="pt"))
    handle.remove()

    keys = keys_of(host, [site], request)[site]

    expected = read[0].reshape(-1, read[0].shape[-1]).double().mT
    assert keys.shape == expected.shape
    torch.testing.assert_close(keys, expected)


def requests(count: int) -> list[EditRequest]:
    return [
        EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=fact.target_new)
        for fact in toy_facts()[:count]
    ]


def edit(session: EditSession, wanted: list[EditRequest], **settings) -> list[Patch]:
    given = {"base_settings": ROME, **settings}
    return list(session.edit("simie", wanted, preset="toy", hparams=given).patches)


@pytest.mark.parametrize("toy", TOYS)
def test_sequence_is_the_least_squares_of_edits_made_each_on_the_unedited_model(toy, toy_host):
    """Fault: a matrix that is stored transposed is combined on its other side."""
    session, wanted, ridge = EditSession(toy_host(toy)), requests(3), 0.1
    host = session.host
    site = host.mlp_out(1)
    original = host.weight(site).detach().double().clone()
    moment = ridge * torch.eye(original.shape[1], dtype=torch.float64)
    total = ridge * original
    for request in wanted:
        keys = keys_of(host, [site], request)[site]
        with session.trial("rome", request, preset="toy", hparams=ROME) as outcome:
            edited = original + outcome.patches[0].deltas[0].dense().double()
        moment += keys @ keys.mT
        total += edited @ keys @ keys.mT

    edit(session, wanted, ridge=ridge)

    change = host.weight(site).double() - original
    expected = torch.linalg.solve(moment, total.mT).mT - original
    # The base's own result differs by rounding, and weights are in float32.
    assert float((change - expected).norm()) < 1e-3 * float(expected.norm())
    session.rollback()
    assert torch.equal(host.weight(site).double(), original)


@pytest.mark.parametrize("toy", TOYS)
def test_light_ridge_makes_the_model_do_what_the_base_did(toy, toy_host):
    session, (request,) = EditSession(toy_host(toy)), requests(1)
    site = session.host.mlp_out(1)
    keys = keys_of(session.host, [site], request)[site]
    with session.trial("rome", request, preset="toy", hparams=ROME) as outcome:
        wanted = outcome.patches[0].deltas[0].dense().double() @ keys

    (patch,) = edit(session, [request], ridge=1e-3)

    found = patch.deltas[0].dense().double() @ keys
    assert float((found - wanted).norm()) < 2e-2 * float(wanted.norm())
    assert patch.deltas[0].rank == keys.shape[1]
    gram = torch.eye(keys.shape[1]) + keys.mT @ keys / 1e-3
    assert patch.notes["conditions"] == pytest.approx([float(torch.linalg.cond(gram))])
    assert not patch.state


def test_base_may_edit_the_present_model_and_keep_its_own_state(toy_host):
    session, wanted = EditSession(toy_host("llama")), requests(2)
    base = {"base": "alphaedit", "base_settings": {"layers": [1], "steps": 4}}
    first, second = edit(session, wanted, init_model=False, **base)

    assert any(name.endswith(":keys") for name in second.state)
    assert second.state.keys() == first.state.keys()
    factor = next(t for name, t in second.state.items() if name.endswith(":factor"))
    assert factor.shape == (1, 2)  # the second fact's row, beside the first one's column


def test_patch_of_a_session_is_what_another_session_computes(toy_host):
    first = edit(EditSession(toy_host("gpt2")), requests(2))
    second = edit(EditSession(toy_host("gpt2")), requests(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.deltas[0].dense(), other.deltas[0].dense())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "grace"}, "grace does not edit weights.*rome"),
        ({"base_settings": {"layr": 1}}, "layr"),
    ],
)
def test_base_that_cannot_be_is_refused(settings, message, toy_host):
    session = EditSession(toy_host("llama"))
    with pytest.raises(SettingError, match=message):
        edit(session, requests(1), **settings)
    assert not session.is_edited


def test_needs_of_the_base_are_those_of_the_wrapper(toy_host):
    session = EditSession(toy_host("llama"))
    request = EditRequest(prompt="Mira Voss lives in", target_new="Rome")
    with pytest.raises(RequestError, match="rome needs the subject"):
        edit(session, [request])


def test_another_ridge_within_a_session_is_refused(toy_host):
    session, wanted = EditSession(toy_host("llama")), requests(2)
    edit(session, wanted[:1])
    with pytest.raises(SettingError, match="another `ridge` than 7"):
        edit(session, wanted[1:], ridge=7.0)


def test_every_preset_is_valid_and_names_its_source():
    spec = discover().method("simie")
    for preset in presets_of(spec):
        assert preset.source
        resolve(spec, preset=preset.name)
