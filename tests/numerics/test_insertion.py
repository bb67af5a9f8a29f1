"""ROME writes its value under its key exactly, in every dense family."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

from kedit_core import EditRequest
from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.editing import EditSession
from kedit_core.numerics.facts import essence_row
from kedit_core.numerics.values import ValueSettings, ValueTask, optimise_values
from kedit_core.tokens import rewrite_row
from tests.numerics.tiny import DENSE, plain_output, tiny_host

rome = pytest.importorskip("kedit_rome.method")

LAYER = 1
REQUEST = EditRequest(prompt="The tower {} is in", subject="Eiffel", target_new="Rome")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Corpus:
    rng = Random(0)
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    lines = ["".join(rng.choices("abcdefghij ETRo", k=60)) for _ in range(14)]
    file.write_text("\n\n".join(lines), encoding="utf-8")
    return Corpus(str(file))


@pytest.mark.parametrize("second_moment", [False, True], ids=["identity", "moment"])
@pytest.mark.parametrize("family", DENSE)
def test_key_is_mapped_to_its_value(family, second_moment, text, tmp_path: Path):
    host = tiny_host(family)
    site = host.mlp_out(LAYER)
    settings = {"layer": LAYER, "steps": 3, "contexts": (), "second_moment": second_moment}
    hparams = rome.RomeHyperParams(**settings)
    row = rewrite_row(host, REQUEST)
    task = ValueTask((row,), essence_row(host, REQUEST, "subject_last"))
    fields = ("steps", "lr", "weight_decay", "max_norm_ratio", "kl_weight", "stop_loss")
    value_settings = ValueSettings(**{name: getattr(hparams, name) for name in fields})
    (value,) = optimise_values(host, site.module, LAYER, [task], value_settings)
    key = plain_output(host, site.module, row.ids, "input")[row.mark]
    module = host.base_module(site.module)
    bias = getattr(module, "bias", None)
    bias = torch.zeros(len(value.target)) if bias is None else bias

    session = EditSession(host, artifacts=ArtifactStore(tmp_path), corpus=text)
    outcome = session.edit("rome", REQUEST, hparams=settings)

    (patch,) = outcome.patches
    (delta,) = patch.deltas
    assert delta.rank == 1
    assert delta.shape == tuple(host.weight(site).shape)
    assert float(value.delta.norm()) > 0.1
    tolerance = 1e-4 * float(value.target.abs().max())
    # (W + ΔW) k + b = v*, computed by hand, and written by the model where the subject ends.
    by_hand = host.weight(site) @ key + bias
    torch.testing.assert_close(by_hand, value.target, rtol=1e-3, atol=10 * tolerance)
    written = plain_output(host, site.module, row.ids)[row.mark]
    torch.testing.assert_close(written, value.target, rtol=1e-3, atol=10 * tolerance)
