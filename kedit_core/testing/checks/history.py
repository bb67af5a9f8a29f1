"""Taking edits back: every bit, every module, at any depth."""

from __future__ import annotations

import contextlib

import torch

from kedit_core.errors import KEditError
from kedit_core.request import EditRequest
from kedit_core.session import EditSession
from kedit_core.testing.bench import Bench, Fault, skip
from kedit_core.testing.checks.answers import ATOL, RTOL
from kedit_core.testing.model_state import WEIGHTS, assert_same, model_state, patch_content
from kedit_core.testing.selection import only_for


def check_rollback_restores_every_bit(bench: Bench) -> None:
    """After an edit and its rollback all parameters and buffers have their bits again."""
    session = bench.session()
    before = model_state(session.host)
    bench.edit(session, bench.request())
    session.rollback()
    assert_same(before, model_state(session.host), "After the rollback", *WEIGHTS)


def check_rollback_restores_everything_else(bench: Bench) -> None:
    """After a rollback modules are the same objects, hooks, flags and settings as before."""
    session = bench.session()
    before = model_state(session.host)
    bench.edit(session, bench.request())
    session.rollback()
    assert_same(before, model_state(session.host), "After the rollback")
    assert not session.is_edited, "the session still has a patch in its history."


def check_rollback_restores_bfloat16_bits(bench: Bench) -> None:
    """Rollback is exact for bfloat16 weights too, where subtracting would not be."""
    session = bench.session(bench.host(torch.bfloat16))
    before = model_state(session.host)
    session.apply(bench.patch())
    session.rollback()
    assert_same(before, model_state(session.host), "After the rollback")


def check_rollback_to_a_savepoint_keeps_the_edits_before_it(bench: Bench) -> None:
    """Two edits and a rollback to between them leave the bits of the first."""
    session = _sequence(bench)
    first, mark = model_state(session.host), session.savepoint()
    bench.edit(session, bench.request("subject last"))
    session.rollback(mark)
    assert_same(first, model_state(session.host), "After the rollback of the second edit")


def check_pop_takes_back_the_latest_edit(bench: Bench) -> None:
    """`pop` takes back one edit and returns its patch."""
    session = _sequence(bench)
    first = model_state(session.host)
    second = bench.edit(session, bench.request("subject last"))
    assert session.pop() is second, "pop() returned another patch than the latest."
    assert_same(first, model_state(session.host), "After pop()")


def check_edit_after_rollback_is_the_first_edit_again(bench: Bench) -> None:
    """What was rolled back leaves no memory: the next patch is as if it had never been."""
    session = bench.session()
    bench.edit(session, bench.request("subject last"))
    session.rollback()
    again = bench.edit(session, bench.request())
    assert patch_content(again) == patch_content(bench.patch()), (
        "after a rollback the patch differs from that of a fresh session."
    )


def check_rollback_covers_the_state_of_the_method(bench: Bench) -> None:
    """A second edit, taken back and made again, gives the same patch and state."""
    session = _sequence(bench)
    mark = session.savepoint()
    second = bench.edit(session, bench.request("subject last"))
    session.rollback(mark)
    again = bench.edit(session, bench.request("subject last"))
    assert patch_content(second) == patch_content(again), (
        "made again after a rollback, the second patch differs."
    )


def check_suspended_model_is_the_unedited_one(bench: Bench) -> None:
    """Inside `suspended()` the logits are the unedited model's, bit for bit."""
    session, prompts = bench.edited(), bench.prompts()
    with session.suspended():
        suspended = session.view().logits(prompts)
    assert torch.equal(suspended, bench.unedited().logits(prompts)), (
        "suspended, the model's logits are not those of the unedited one."
    )


def check_model_is_edited_again_after_suspension(bench: Bench) -> None:
    """After `suspended()` the edited model has its bits and logits again."""
    session, prompts = bench.edited(), bench.prompts()
    before, logits = model_state(session.host), session.view().logits(prompts)
    with session.suspended():
        session.view().logits(prompts)
    assert_same(before, model_state(session.host), "After the suspension")
    assert torch.equal(logits, session.view().logits(prompts)), "the logits are other ones."


def check_other_models_are_not_touched(bench: Bench) -> None:
    """An edit in one session changes nothing in a model of another one."""
    other = bench.session()
    before = model_state(other.host)
    bench.edit(bench.session(), bench.request())
    assert_same(before, model_state(other.host), "After an edit elsewhere")


def check_trial_ends_with_its_block(bench: Bench) -> None:
    """`trial()` is in force inside its block, and leaves nothing after it or after an error."""
    session = bench.session()
    before = model_state(session.host)
    with (
        contextlib.suppress(Fault),
        session.trial(bench.spec, bench.request(), hparams=bench.hparams),
    ):
        assert session.is_edited, "inside the block no edit is in force."
        raise Fault
    assert_same(before, model_state(session.host), "After the trial")


def check_comparison_shows_both_models(bench: Bench) -> None:
    """`compare` answers as the unedited model before, and as the edited one after."""
    session, prompts = bench.edited(), bench.prompts()[:3]
    shown = session.compare(prompts, max_new_tokens=6)
    assert [c.before for c in shown] == bench.unedited().greedy(prompts, max_new_tokens=6), (
        "the answers 'before' are not those of the unedited model."
    )
    assert [c.after for c in shown] == session.view().greedy(prompts, max_new_tokens=6), (
        "the answers 'after' are not those of the edited model."
    )


@only_for("weights")
def check_overlay_gives_the_same_logits(bench: Bench) -> None:
    """Beside the weights an edit has the effect that it has inside them."""
    prompts = bench.prompts()
    beside = bench.edited(overlay=True).view().logits(prompts)
    inside = bench.edited().view().logits(prompts)
    # The change is summed after the product instead of before it.
    assert torch.allclose(beside, inside, rtol=RTOL, atol=ATOL), (
        f"the logits differ by up to {float((beside - inside).abs().max()):.2g}."
    )


@only_for("weights")
def check_overlay_leaves_weights_and_goes_without_a_trace(bench: Bench) -> None:
    """An overlay changes no weight while it is in force, and nothing after its rollback."""
    session = bench.session()
    before = model_state(session.host)
    session.apply(bench.patch(), overlay=True)
    assert_same(before, model_state(session.host), "With the overlay in force", *WEIGHTS)
    session.rollback()
    assert_same(before, model_state(session.host), "After the overlay's rollback")


@only_for("weights")
def check_edit_after_an_overlay_is_that_after_a_change_in_place(bench: Bench) -> None:
    """A second edit is the same, whether the first lies beside the weights or inside them."""
    bench.needs_sequences()
    patches = []
    for overlay in (False, True):
        session = bench.edited(overlay=overlay)
        patches.append(bench.edit(session, bench.request("subject last"), overlay=overlay))
    for inside, beside in zip(*(patch.deltas for patch in patches), strict=True):
        assert inside.site == beside.site, "other matrices are changed."
        difference = float((beside.dense() - inside.dense()).norm())
        # Rounding, which steps of Adam amplify.
        assert difference <= 1e-2 * float(inside.dense().norm()), (
            f"the change of {inside.site.parameter} is another one, by a norm of {difference:.2g}."
        )


def check_several_requests_are_written_together_or_not_at_all(bench: Bench) -> None:
    """When the second of two requests fails, the first is taken back."""
    session = bench.session()
    before = model_state(session.host)
    bad = EditRequest(
        prompt="The " + "very " * 400 + "old {} is", subject="tree", target_new="tall"
    )
    try:
        bench.edit(session, bench.request(), bad)
    except KEditError:
        assert_same(before, model_state(session.host), "After a failed second request")
        assert not session.is_edited, "a failed edit is in the session's history."
    else:
        skip("the method writes prompts of any length")


def _sequence(bench: Bench) -> EditSession:
    """A session with one edit in force, and the promise that another may follow."""
    bench.needs_sequences()
    session = bench.session()
    bench.edit(session, bench.request())
    return session
