"""NAMET on the toy models, against its formulas written out, and its presets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kedit_namet.method import Namet
from torch import Tensor

from kedit_core import EditRequest, SettingError, discover
from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.editing import EditSession, ModelHost
from kedit_core.hparams import presets_of, resolve
from kedit_core.numerics.facts import essence_row
from kedit_core.numerics.states import states_at_marks
from kedit_core.numerics.values import ValueSettings, ValueTask, optimise_values
from kedit_core.testing.toys import TOYS, load_toy, toy_corpus, toy_facts
from kedit_core.tokens import Row, rewrite_row

SETTINGS = {
    "layers": [0, 1],
    "steps": 6,
    "lr": 0.3,
    "contexts": [[4, 3]],
    "moment_tokens": 1000,
    "moment_weight": 1.0,
}
CONTEXTS = ("The people know it. ", "You have seen the old town. ", "In the morning. ")


def session_on(name: str, folder: Path) -> EditSession:
    model, tokenizer = load_toy(name)
    corpus = Corpus(str(toy_corpus()))
    host = ModelHost(model, tokenizer, f"toy-{name}")
    return EditSession(host, artifacts=ArtifactStore(folder), corpus=corpus)


def requests(count: int) -> list[EditRequest]:
    return [
        EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=fact.target_new)
        for fact in toy_facts()[:count]
    ]


def states(host: ModelHost, rows: list[Row]) -> Tensor:
    """h of the last edited block: (rows, d)."""
    return states_at_marks(host, rows, {"h": (host.blocks[1].path, "output")})["h"].float()


@pytest.mark.parametrize("name", TOYS)
def test_residual_is_the_mean_over_contexts_and_the_change_is_measured_by_all_of_them(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr("kedit_core.numerics.facts.context_texts", lambda job, of: CONTEXTS)
    session, wanted = session_on(name, tmp_path), requests(3)
    host = session.host
    own = {**SETTINGS, "weight_decay": 0.3, "max_norm_ratio": 0.2}

    with session.trial("namet", wanted, hparams=own) as outcome:
        (patch,) = outcome.patches

    settings = ValueSettings(6, 0.3, weight_decay=0.0, max_norm_ratio=1.0, kl_weight=0.0625)
    targets, rows_after = [], []
    for request in wanted:
        rows = [rewrite_row(host, request, "subject_last", text) for text in ("", *CONTEXTS)]
        h = states(host, rows)
        frobenius = float(h.square().sum().sqrt())
        task = ValueTask(
            tuple(rows),
            essence_row(host, request, "subject_last"),
            bound=0.2 * frobenius,
            decay=0.3 / frobenius,
        )
        (value,) = optimise_values(host, host.blocks[1].path, 1, [task], settings)
        targets.append(h[1:].mean(dim=0) + value.delta)
        rows_after.append(rows[1:])
    for layer, delta in enumerate(patch.deltas):
        missing = [
            float((z - states(host, rows).mean(dim=0)).norm())
            for z, rows in zip(targets, rows_after, strict=True)
        ]
        assert patch.notes["residuals"][layer] == pytest.approx(sum(missing) / 3, rel=1e-3)
        host.weight(host.mlp_out(layer)).add_(delta.dense())


def test_decay_holds_the_change_back(tmp_path):
    session, wanted = session_on("llama", tmp_path), requests(2)
    lengths = []
    for decay in (0.0, 50.0):
        own = {**SETTINGS, "weight_decay": decay}
        with session.trial("namet", wanted, hparams=own) as outcome:
            lengths.append(outcome.patches[0].notes["residuals"][0])

    assert lengths[1] < 0.8 * lengths[0]


def test_each_layer_has_a_weight_of_its_own(tmp_path):
    session, wanted = session_on("gpt2", tmp_path), requests(3)

    def changes(weight: object) -> list[Tensor]:
        own = {**SETTINGS, "moment_weight": weight}
        with session.trial("namet", wanted, hparams=own) as outcome:
            return [delta.dense() for delta in outcome.patches[0].deltas]

    one, same, other = changes(2.0), changes([2.0, 2.0]), changes([2.0, 2000.0])

    assert all(map(torch.equal, one, same))
    assert torch.equal(one[0], other[0])
    assert other[1].norm() < 0.5 * one[1].norm()


def test_weights_for_another_number_of_layers_are_refused():
    with pytest.raises(SettingError, match="3 weights for 2 layers"):
        resolve(discover().method("namet"), settings={**SETTINGS, "moment_weight": [1, 2, 3]})


@pytest.mark.parametrize("preset", presets_of(discover().method("namet")), ids=lambda p: p.name)
def test_every_preset_is_valid(preset):
    resolved = resolve(discover().method("namet"), preset=preset.name)

    assert Namet(resolved.hparams)
    assert preset.source
    assert {resolved.origin[key] for key in preset.settings} == {f"preset {preset.name}"}
