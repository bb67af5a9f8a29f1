"""MEMIT, PMET and EMMET on the toy models: identities, many facts, sequences, presets."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kedit_core import EditError, EditRequest, SettingError, SiteError, discover
from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.editing import EditSession, ModelHost
from kedit_core.errors import ArtifactError
from kedit_core.hparams import resolve
from kedit_core.numerics.states import states_at_marks
from kedit_core.testing.toys import TOYS, load_toy, toy_corpus, toy_facts
from kedit_core.tokens import rewrite_row

torch.set_num_threads(1)

SETTINGS = {
    "layers": [1],
    "steps": 8,
    "lr": 0.3,
    "max_norm_ratio": 4.0,
    "contexts": [[4, 2]],
    "moment_tokens": 1000,
    "moment_weight": 1.0,
}


def session_on(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> EditSession:
    model, tokenizer = load_toy(name, dtype)
    host = ModelHost(model, tokenizer, f"toy-{name}")
    corpus = Corpus(str(toy_corpus()))
    return EditSession(host, artifacts=ArtifactStore(folder), corpus=corpus)


def requests(count: int) -> list[EditRequest]:
    return [
        EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=fact.target_new)
        for fact in toy_facts()[:count]
    ]


def changes(
    session: EditSession, method: str, wanted: list[EditRequest], **settings
) -> list[Tensor]:
    with session.trial(method, wanted, hparams={**SETTINGS, **settings}) as outcome:
        (patch,) = outcome.patches
        return [delta.dense() for delta in patch.deltas]


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("name", TOYS)
def test_relaxed_emmet_is_memit_in_one_layer_with_the_product_of_the_weights(name, tmp_path):
    session, wanted = session_on(name, tmp_path), requests(4)

    (emmet,) = changes(session, "emmet", wanted, moment_weight=20.0, ridge=0.1)

    (memit,) = changes(session, "memit", wanted, moment_weight=2.0)
    assert_close(emmet, memit, 1e-5)


@pytest.mark.parametrize("ridge", [1.0, 0.01])
def test_relaxed_emmet_is_memit_in_a_sequence_with_history_too(ridge, tmp_path):
    session, wanted = session_on("llama", tmp_path), requests(6)
    found = {}
    for method, own in [
        ("memit", {"moment_weight": 2.0}),
        ("emmet", {"moment_weight": 2.0 / ridge, "ridge": ridge}),
    ]:
        settings = {**SETTINGS, "history": True, **own}
        for start in (0, 2, 4):
            session.edit(method, wanted[start : start + 2], hparams=settings)
        found[method] = [patch.deltas[0].dense() for patch in session.stack]
        session.rollback()

    # Rounding of the first change reaches the targets of the next, through steps of Adam.
    for emmet, memit in zip(found["emmet"], found["memit"], strict=True):
        assert_close(emmet, memit, 1e-3)


def test_emmet_of_one_fact_is_strict_and_scaled_by_nothing(tmp_path):
    session, (one,) = session_on("llama", tmp_path), requests(1)

    (strict,) = changes(session, "emmet", [one], ridge=0.0)

    for weight in (0.1, 100.0):
        (same,) = changes(session, "emmet", [one], ridge=0.5, moment_weight=weight)
        assert_close(same, strict, 1e-5)


@pytest.mark.parametrize("name", TOYS)
def test_strict_emmet_makes_the_block_write_its_target(name, tmp_path):
    session, (request,) = session_on(name, tmp_path), requests(1)
    host = session.host
    row = rewrite_row(host, request)

    def state() -> Tensor:
        points = {"out": (host.blocks[1].path, "output")}
        return states_at_marks(host, [row], points)["out"][0]

    # Without contexts the key of the update is the one that is read, so it is met exactly.
    settings = {**SETTINGS, "contexts": [], "ridge": 0.0}
    before = state()
    with session.trial("emmet", request, hparams=settings) as outcome:
        (residual,) = outcome.patches[0].notes["residuals"]
        moved = float((state() - before).norm())

    assert moved == pytest.approx(residual, rel=1e-3)


@pytest.mark.parametrize("name", TOYS)
def test_each_layer_takes_its_share_of_what_is_missing(name, tmp_path):
    session, wanted = session_on(name, tmp_path), requests(3)
    settings = {**SETTINGS, "layers": [0, 1, 2], "moment_weight": 1e-3}

    with session.trial("memit", wanted, hparams=settings) as outcome:
        (patch,) = outcome.patches

    assert [delta.site for delta in patch.deltas] == [session.host.mlp_out(n) for n in (0, 1, 2)]
    assert all(delta.rank == len(wanted) for delta in patch.deltas)
    first, _, last = patch.notes["residuals"]
    assert last < first


@pytest.mark.parametrize("name", TOYS)
def test_pmet_writes_the_part_of_the_mlp(name, tmp_path):
    session, (request,) = session_on(name, tmp_path), requests(1)
    host = session.host
    row = rewrite_row(host, request)
    points = {"out": (host.mlp_out(1).module, "output")}
    before = states_at_marks(host, [row], points)["out"][0]

    settings = {**SETTINGS, "contexts": [], "moment_weight": 1e-6}
    with session.trial("pmet", request, hparams=settings) as outcome:
        (residual,) = outcome.patches[0].notes["residuals"]
        moved = states_at_marks(host, [row], points)["out"][0] - before

    assert float(moved.norm()) == pytest.approx(residual, rel=1e-3)


def test_batch_writes_what_its_facts_want_and_leaves_the_bits_when_taken_back(tmp_path):
    session, wanted = session_on("llama", tmp_path), requests(6)
    before = {name: p.detach().clone() for name, p in session.model.named_parameters()}
    view = session.view()

    def likelihoods() -> list[float]:
        scores = view.score([r.text for r in wanted], [r.target_new for r in wanted])
        return [sum(score.logprobs) for score in scores]

    unedited = likelihoods()
    session.edit("memit", wanted, hparams={**SETTINGS, "steps": 15, "layers": [0, 1]})
    edited = likelihoods()
    session.rollback()

    assert sum(a > b for a, b in zip(edited, unedited, strict=True)) >= 5
    for name, parameter in session.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_history_makes_a_second_edit_spare_the_first(tmp_path):
    session, wanted = session_on("gpt2", tmp_path), requests(8)
    kept = []
    for history in (False, True):
        settings = {**SETTINGS, "history": history, "steps": 12}
        session.edit("memit", wanted[:4], hparams=settings)
        row = rewrite_row(session.host, wanted[0])
        points = {"out": (session.host.blocks[1].path, "output")}
        first = states_at_marks(session.host, [row], points)["out"]
        session.edit("memit", wanted[4:], hparams=settings)
        second = states_at_marks(session.host, [row], points)["out"]
        kept.append(float((second - first).norm()))
        states = [sorted(patch.state) for patch in session.stack]
        session.rollback()
        assert all(bool(names) == history for names in states)

    assert kept[1] < kept[0]


def test_history_goes_with_the_edit_that_is_taken_back(tmp_path):
    session, wanted = session_on("llama", tmp_path), requests(6)
    settings = {**SETTINGS, "history": True}

    (fresh,) = session.edit("memit", wanted[:3], hparams=settings).patches
    session.rollback()
    session.edit("memit", wanted[3:], hparams=settings)
    session.rollback()
    (again,) = session.edit("memit", wanted[:3], hparams=settings).patches

    assert torch.equal(fresh.deltas[0].left, again.deltas[0].left)


@pytest.mark.parametrize("method", ["memit", "emmet"])
def test_fact_that_stands_twice_is_told_and_does_no_harm(method, tmp_path, caplog):
    session, wanted = session_on("llama", tmp_path), requests(2)
    other = wanted[0].model_copy(update={"target_new": wanted[1].target_new})

    (once,) = changes(session, method, wanted)
    with caplog.at_level(logging.WARNING):
        (twice,) = changes(session, method, [*wanted, wanted[0]])
        (torn,) = changes(session, method, [*wanted, other])

    assert caplog.text.count("several times in one batch") == 1
    assert caplog.text.count("several targets in one batch") == 1
    for found in (twice, torn):
        assert float(found.norm()) < 3 * float(once.norm())


def test_strict_emmet_refuses_what_cannot_be_written_exactly(tmp_path):
    session, wanted = session_on("llama", tmp_path), requests(1)
    other = wanted[0].model_copy(update={"target_new": "Rome"})

    with pytest.raises(EditError, match="2 keys are not independent"):
        session.edit("emmet", [*wanted, other], hparams={**SETTINGS, "ridge": 0.0})

    assert not session.is_edited


def test_search_over_the_weight_optimises_no_target_again(tmp_path, monkeypatch):
    session, wanted = session_on("llama", tmp_path), requests(2)
    (light,) = changes(session, "memit", wanted, moment_weight=0.1)

    def refuse(*args, **kwargs):
        raise AssertionError("a kept target is optimised again")

    monkeypatch.setattr("kedit_core.numerics.values.optimise_values", refuse)
    (heavy,) = changes(session, "memit", wanted, moment_weight=100.0)

    assert float(heavy.norm()) < float(light.norm())


def test_targets_of_an_edited_model_are_its_own(tmp_path):
    session, wanted = session_on("llama", tmp_path), requests(2)
    (unedited,) = changes(session, "memit", wanted[:1])

    session.edit("memit", wanted[1:], hparams=SETTINGS)
    (edited,) = changes(session, "memit", wanted[:1])

    assert not torch.equal(unedited, edited)


@pytest.mark.parametrize("name", TOYS)
def test_bfloat16_weights_are_written_by_a_change_in_float32(name, tmp_path):
    exact = session_on(name, tmp_path / "a")
    (expected,) = changes(exact, "memit", requests(2))
    session = session_on(name, tmp_path / "b", torch.bfloat16)

    (found,) = changes(session, "memit", requests(2))

    assert found.dtype == torch.float32
    # Eight bits of mantissa in every state and gradient; the direction stays.
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
    assert float(cosine) > 0.9


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("memit", {"layers": [1, 0]}, "ascending"),
        ("memit", {"layers": [1, 1]}, "ascending"),
        ("memit", {"layers": []}, "layers"),
        ("emmet", {"layers": [0, 1]}, "one layer"),
        ("emmet", {"layers": [1], "ridge": 0, "history": True}, "give a ridge above 0"),
        ("pmet", {"layers": [1], "ridge": 0.1}, "ridge"),
    ],
)
def test_settings_that_cannot_be_are_refused(method, settings, message):
    with pytest.raises(SettingError, match=message):
        resolve(discover().method(method), settings=settings)


@pytest.mark.parametrize("method", ["memit", "pmet", "emmet"])
def test_corpus_that_is_too_short_is_told_before_anything_is_optimised(
    method, tmp_path, monkeypatch
):
    (tmp_path / "short.txt").write_text("One two three.")
    host = session_on("llama", tmp_path).host
    session = EditSession(
        host, artifacts=ArtifactStore(tmp_path), corpus=Corpus(str(tmp_path / "short.txt"))
    )
    monkeypatch.setattr("kedit_core.numerics.values.optimise_values", None)

    with pytest.raises(ArtifactError, match="Give a longer text"):
        session.edit(method, requests(1), hparams=SETTINGS)


def test_other_weight_within_a_sequence_is_told_before_anything_is_optimised(tmp_path, monkeypatch):
    session, wanted = session_on("llama", tmp_path), requests(2)
    session.edit("memit", wanted[0], hparams={**SETTINGS, "history": True})
    monkeypatch.setattr("kedit_core.numerics.values.optimise_values", None)

    with pytest.raises(EditError, match="made with another weight"):
        session.edit(
            "memit", wanted[1], hparams={**SETTINGS, "history": True, "moment_weight": 5.0}
        )


def test_layer_that_does_not_exist_is_refused_before_anything_is_optimised(tmp_path):
    session = session_on("llama", tmp_path)

    with pytest.raises(SiteError, match="Layer 99 does not exist"):
        session.edit("memit", requests(1), hparams={**SETTINGS, "layers": [1, 99]})

    assert not list(tmp_path.rglob("*.safetensors"))
