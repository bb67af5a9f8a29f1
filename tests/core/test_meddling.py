"""Methods that break their contract: found out, and nothing goes on with a changed model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kedit_core import HyperParams, MethodSpec
from kedit_core.editing import EditJob, EditSession, Patch
from kedit_core.errors import EditError, PluginError
from tests.core.edits import fact, random_delta, weight_patch


class Way(HyperParams):
    way: str
    ends: str = "well"


class Meddler:
    """Writes to an MLP output matrix in one of several ways, and returns a patch or fails."""

    def __init__(self, hparams: Way) -> None:
        self.hparams = hparams

    @torch.no_grad()
    def edit(self, job: EditJob) -> Patch | None:
        site = job.host.mlp_out(1)
        weight = job.host.weight(site)
        if self.hparams.way == "in scratch":
            with job.host.scratch(site), job.unedited():
                weight.add_(1)
        elif self.hparams.way == "before scratch":
            weight.add_(1)
            with job.host.scratch(site):
                weight.add_(1)
        elif self.hparams.way == "after scratch":
            with job.host.scratch(site):
                weight.add_(1)
            weight.add_(1)
        elif self.hparams.way == "beside unedited":
            weight.add_(1)
            with job.unedited():
                pass
        elif self.hparams.way == "exchange":
            module = job.host.module(site.module)
            module.weight = nn.Parameter(module.weight + 1)
        if self.hparams.ends == "fails":
            raise EditError("This fact cannot be written.")
        if self.hparams.ends == "is interrupted":
            raise KeyboardInterrupt
        if self.hparams.ends == "returns nothing":
            return None
        return Patch("?", (random_delta(job.host, site),))


MEDDLER = MethodSpec(
    "meddler", f"{__name__}:Meddler", "Writes itself.", hparams=f"{__name__}:Way", max_batch=1
)


@pytest.mark.parametrize("ends", ["well", "fails", "is interrupted"])
@pytest.mark.parametrize("way", ["before scratch", "after scratch", "beside unedited", "exchange"])
def test_a_method_that_writes_itself_is_found_out(toy_host, way, ends):
    session = EditSession(toy_host("llama"))
    session.apply(weight_patch(session.host, 1))
    stack = session.stack

    with pytest.raises(PluginError, match=r"meddler changed .*down_proj.* Load it again"):
        session.edit(MEDDLER, fact(), hparams={"way": way, "ends": ends})
    assert session.stack == stack
    for use in (
        session.view,
        session.rollback,
        lambda: session.edit(MEDDLER, fact(1), hparams={"way": "none"}),
        lambda: session.apply(weight_patch(session.host, 2)),
    ):
        with pytest.raises(PluginError, match="Load it again"):
            use()


def test_edits_of_before_can_be_saved_and_are_good(toy_host, tmp_path):
    session = EditSession(toy_host("llama"))
    session.apply(weight_patch(session.host, 1))
    with pytest.raises(PluginError):
        session.edit(MEDDLER, fact(), hparams={"way": "exchange"})
    session.save(tmp_path / "edits")

    other = EditSession(toy_host("llama"))
    other.load(tmp_path / "edits")
    loaded, saved = (edits.stack[0].deltas[0].dense() for edits in (other, session))
    assert torch.equal(loaded, saved)


def test_what_scratch_and_the_unedited_model_write_is_no_meddling(toy_host):
    session = EditSession(toy_host("llama"))
    before = {n: p.clone() for n, p in session.model.named_parameters()}
    for n in range(2):
        session.edit(MEDDLER, fact(n), hparams={"way": "in scratch"})
    with pytest.raises(EditError, match="cannot be written"):
        session.edit(MEDDLER, fact(2), hparams={"way": "in scratch", "ends": "fails"})
    session.rollback()

    assert all(torch.equal(p, before[n]) for n, p in session.model.named_parameters())


def test_a_method_that_returns_no_patch_is_told_so(toy_host):
    session = EditSession(toy_host("llama"))
    with pytest.raises(PluginError, match=r"meddler returned None; edit\(\) must return a Patch"):
        session.edit(MEDDLER, fact(), hparams={"way": "none", "ends": "returns nothing"})
    session.edit(MEDDLER, fact(), hparams={"way": "none"})
