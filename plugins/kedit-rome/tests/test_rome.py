"""ROME and its variants on the toy models, and the presets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from kedit_core import EditError, EditRequest, SettingError, SiteError, discover
from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus
from kedit_core.editing import EditSession, ModelHost
from kedit_core.hparams import presets_of, resolve
from kedit_core.models import config_facts
from kedit_core.numerics.states import states_at_marks
from kedit_core.testing.toys import TOYS, ToyFact, load_toy, toy_corpus, toy_facts
from kedit_core.tokens import fact_position, rewrite_row

torch.set_num_threads(1)

LAYER = 1
SETTINGS = {"layer": LAYER, "contexts": [[5, 2], [10, 3]]}
QUICK = {**SETTINGS, "steps": 4, "second_moment": False}


def session_on(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> EditSession:
    model, tokenizer = load_toy(name, dtype)
    host = ModelHost(model, tokenizer, f"toy-{name}")
    corpus = Corpus(str(toy_corpus()))
    return EditSession(host, artifacts=ArtifactStore(folder), corpus=corpus)


def request_of(fact: ToyFact) -> EditRequest:
    return EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=fact.target_new)


def at_start(fact: ToyFact) -> bool:
    return fact.prompt.startswith("{}")


def facts(count: int, *, start: bool = False) -> list[ToyFact]:
    """Some facts whose subject stands first, or after other words."""
    return [fact for fact in toy_facts() if at_start(fact) == start][:count]


def weights(session: EditSession) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in session.model.named_parameters()}


def same_bits(session: EditSession, before: dict[str, Tensor]) -> bool:
    now = dict(session.model.named_parameters())
    return all(torch.equal(now[name], tensor) for name, tensor in before.items())


def answers(session: EditSession, fact: ToyFact) -> str:
    text = session.view().greedy(fact.prompt.replace("{}", fact.subject), max_new_tokens=8)
    return text.strip()


def files(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("method", ["rome", "r-rome"])
@pytest.mark.parametrize("toy", TOYS)
def test_target_becomes_the_greedy_answer_until_it_is_rolled_back(toy, method, tmp_path):
    session = session_on(toy, tmp_path)
    before = weights(session)
    for fact in facts(3):
        assert answers(session, fact).startswith(fact.answer)
        mark = session.savepoint()

        session.edit(method, request_of(fact), hparams=SETTINGS)

        assert answers(session, fact).startswith(fact.target_new)
        changed = [n for n, p in session.model.named_parameters() if not torch.equal(p, before[n])]
        assert changed == [session.host.mlp_out(LAYER).parameter]
        session.rollback(mark)
        assert same_bits(session, before)
        assert answers(session, fact).startswith(fact.answer)


@pytest.mark.parametrize("toy", TOYS)
def test_edit_is_of_rank_one_and_says_what_it_did(toy, tmp_path):
    session = session_on(toy, tmp_path)

    (patch,) = session.edit("rome", request_of(facts(1)[0]), hparams=SETTINGS).patches

    (delta,) = patch.deltas
    notes = patch.notes
    assert delta.rank == 1
    assert torch.linalg.matrix_rank(delta.dense(), rtol=1e-5) == 1
    assert notes["second_moment"] is True
    assert len(notes["losses"]) <= 25
    assert notes["losses"][-1] < notes["losses"][0]
    assert 0 < notes["nll"] <= notes["losses"][-1]
    assert 0 < notes["delta_norm_ratio"] <= 4.0 + 1e-4
    assert notes["change_norm"] == pytest.approx(float(delta.dense().norm()), rel=1e-4)
    assert len(notes["contexts"]) == 6
    assert notes["contexts"][0] == ""
    assert all(text.endswith(". ") for text in notes["contexts"][1:])


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("key", ["rome", "context", "prompt"])
def test_update_moves_the_output_of_the_key_that_the_variant_names(toy, key, tmp_path):
    """ΔW k = r for the variant's own k, and its direction is C⁻¹ of the variant's other key."""
    session = session_on(toy, tmp_path)
    host, request = session.host, request_of(facts(1)[0])
    site = host.mlp_out(LAYER)

    (patch,) = session.edit("rome", request, hparams={**QUICK, "key": key}).patches
    session.rollback()

    rows = [rewrite_row(host, request, context=text) for text in patch.notes["contexts"]]
    keys = states_at_marks(host, rows, {"k": (site.module, "input")})["k"]
    plain, mean = keys[0], keys.mean(0)
    (delta,) = patch.deltas
    direction = {"rome": mean, "context": mean, "prompt": plain}[key]
    mapped = {"rome": plain, "context": mean, "prompt": plain}[key]
    cosine = torch.cosine_similarity(delta.right[0], direction, dim=0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-5)
    moved = delta.dense() @ mapped
    if key == "prompt":  # here r is δ itself, whose norm the notes give
        output = states_at_marks(host, rows[:1], {"v": (site.module, "output")})["v"][0]
        ratio = float(moved.norm() / output.norm())
        assert ratio == pytest.approx(patch.notes["delta_norm_ratio"], rel=1e-3)
    assert float(moved.norm()) > 0


def test_r_rome_is_rome_with_the_mean_key(tmp_path):
    session = session_on("llama", tmp_path)
    request = request_of(facts(1)[0])
    changes = []
    for method, settings in (("r-rome", QUICK), ("rome", {**QUICK, "key": "context"})):
        with session.trial(method, request, hparams=settings) as outcome:
            changes.append(outcome.patches[0].deltas[0].dense())
    with session.trial("rome", request, hparams=QUICK) as outcome:
        other = outcome.patches[0].deltas[0].dense()

    assert torch.equal(*changes)
    assert not torch.allclose(changes[0], other, rtol=1e-2)


def test_all_keys_agree_where_there_are_no_contexts(tmp_path):
    session = session_on("gpt2", tmp_path)
    changes = []
    for key in ("rome", "context", "prompt"):
        settings = {**QUICK, "contexts": [], "key": key}
        with session.trial("rome", request_of(facts(1)[0]), hparams=settings) as outcome:
            changes.append(outcome.patches[0].deltas[0].dense())

    torch.testing.assert_close(changes[1], changes[0])
    torch.testing.assert_close(changes[2], changes[0])


@pytest.mark.parametrize("toy", TOYS)
def test_second_moment_changes_the_direction_and_not_the_value(toy, tmp_path):
    session = session_on(toy, tmp_path)
    found = {}
    for moment in (True, False):
        settings = {**SETTINGS, "contexts": [], "second_moment": moment}
        with session.trial("rome", request_of(facts(1)[0]), hparams=settings) as outcome:
            (patch,) = outcome.patches
            found[moment] = patch
            assert patch.notes["second_moment"] is moment

    with_moment, without = (found[moment].deltas[0] for moment in (True, False))
    assert found[True].notes["losses"] == found[False].notes["losses"]
    cosine = torch.cosine_similarity(with_moment.right[0], without.right[0], dim=0)
    assert float(cosine) < 0.99
    # The identity's update is the smallest one that reaches the value.
    assert float(without.dense().norm()) < float(with_moment.dense().norm())


@pytest.mark.parametrize("toy", TOYS)
def test_second_moment_spares_other_inputs(toy, tmp_path):
    """C weighs what the matrix reads: over all facts the outputs move less than with C = I."""
    session = session_on(toy, tmp_path)
    host, site = session.host, session.host.mlp_out(LAYER)
    fact = facts(1)[0]
    others = [f for f in toy_facts() if f.subject != fact.subject]
    rows = [rewrite_row(host, request_of(f)) for f in others]
    keys = states_at_marks(host, rows, {"k": (site.module, "input")})["k"]
    moved = []
    for moment in (True, False):
        settings = {**SETTINGS, "contexts": [], "second_moment": moment}
        with session.trial("rome", request_of(fact), hparams=settings) as outcome:
            delta = outcome.patches[0].deltas[0]
            moved.append(float(delta.product(keys).norm(dim=1).mean()))

    assert moved[0] < moved[1]


@pytest.mark.parametrize("toy", TOYS)
def test_bfloat16_weights_are_edited_and_restored(toy, tmp_path):
    session = session_on(toy, tmp_path, torch.bfloat16)
    before = weights(session)
    written = 0
    for fact in facts(3):
        with session.trial("rome", request_of(fact), hparams=SETTINGS) as outcome:
            (delta,) = outcome.patches[0].deltas
            assert delta.left.dtype == torch.float32
            assert session.model.dtype == torch.bfloat16
            written += answers(session, fact).startswith(fact.target_new)
        assert same_bits(session, before)

    assert written >= 2  # rounding may cost one


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("method", ["rome", "r-rome"])
def test_subject_may_stand_first(toy, method, tmp_path):
    session = session_on(toy, tmp_path)
    fact = facts(1, start=True)[0]
    request = request_of(fact)
    first = fact_position(session.host, request, "subject_first")
    assert first == len(session.host.tokenizer("")["input_ids"])  # nothing but BOS before it
    before = weights(session)

    session.edit(method, request, hparams={**SETTINGS, "fact_token": "subject_last"})

    assert answers(session, fact).startswith(fact.target_new)
    session.rollback()
    assert same_bits(session, before)


def test_key_at_the_first_token_is_told(tmp_path, caplog):
    (fact,) = facts(1, start=True)
    hparams = {**QUICK, "fact_token": "subject_first"}

    with caplog.at_level("WARNING"):
        session_on("gpt2", tmp_path).edit("rome", request_of(fact), hparams=hparams)

    assert "is read at the first token" in caplog.text


@pytest.mark.parametrize("token", ["subject_first", "subject_first_after_last", "last"])
def test_other_fact_tokens_are_edited_where_they_say(token, tmp_path):
    session = session_on("llama", tmp_path)
    host, request = session.host, request_of(facts(1)[0])
    settings = {**QUICK, "contexts": [], "fact_token": token}

    (patch,) = session.edit("rome", request, hparams=settings).patches
    session.rollback()

    row = rewrite_row(host, request, token)
    key = states_at_marks(host, [row], {"k": (host.mlp_out(LAYER).module, "input")})["k"][0]
    cosine = torch.cosine_similarity(patch.deltas[0].right[0], key, dim=0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("toy", TOYS)
def test_edit_makes_nothing_that_prepare_has_made(toy, tmp_path):
    session = session_on(toy, tmp_path)
    session.prepare("rome", hparams=SETTINGS)
    made = files(tmp_path)
    kinds = {path.relative_to(tmp_path).parts[0] for path in made}
    assert kinds == {"contexts", "second-moment", "second-moment-factor"}

    session.edit("rome", request_of(facts(1)[0]), hparams=SETTINGS)

    new = files(tmp_path).keys() - made.keys()
    assert {path.relative_to(tmp_path).parts[0] for path in new} == {"values"}


def test_second_edit_makes_nothing_again(tmp_path, monkeypatch):
    session = session_on("llama", tmp_path)
    first, second = facts(2)
    (one,) = session.edit("rome", request_of(first), hparams=SETTINGS).patches
    made = files(tmp_path)
    monkeypatch.setattr("kedit_core.numerics.stats.cholesky", None)  # C is factored once
    monkeypatch.setattr("pathlib.Path.read_bytes", None)  # the corpus is read once

    (two,) = session.edit("rome", request_of(second), hparams=SETTINGS).patches

    assert files(tmp_path) == made
    assert one.notes["contexts"] == two.notes["contexts"]


def test_statistics_and_contexts_of_an_edited_model_are_the_unedited_ones(tmp_path):
    """The second edit after a first one with artifacts kept elsewhere gives the same change."""
    first, second = facts(2)
    changes = []
    for folder in ("kept", "other"):
        session = session_on("gpt2", tmp_path / "kept")
        session.edit("rome", request_of(first), hparams=SETTINGS)
        session.artifacts = ArtifactStore(tmp_path / folder)
        (patch,) = session.edit("rome", request_of(second), hparams=SETTINGS).patches
        changes.append(patch.deltas[0].dense())

    assert torch.equal(*changes)


def test_same_seed_gives_the_same_edit(tmp_path):
    request = request_of(facts(1)[0])
    changes = []
    for number, seed in enumerate((0, 0, 1)):
        session = session_on("llama", tmp_path / str(number))
        (patch,) = session.edit("rome", request, hparams=QUICK, seed=seed).patches
        changes.append(patch.deltas[0].dense())

    assert torch.equal(changes[0], changes[1])
    assert not torch.equal(changes[0], changes[2])


def test_layer_that_does_not_exist_is_refused_and_nothing_is_made(tmp_path):
    session = session_on("gpt2", tmp_path)
    before = weights(session)

    with pytest.raises(SiteError, match="Layer 40 does not exist"):
        session.edit("rome", request_of(facts(1)[0]), hparams={**SETTINGS, "layer": 40})

    assert same_bits(session, before)
    assert not files(tmp_path)


def test_weights_that_are_no_numbers_are_reported_and_nothing_is_changed(tmp_path):
    session = session_on("llama", tmp_path)
    session.host.weight(session.host.mlp_out(3))[0, 0] = torch.nan

    with pytest.raises(EditError, match="loss of the target after"):
        session.edit("rome", request_of(facts(1)[0]), hparams={**QUICK, "contexts": []})

    assert not session.is_edited


@pytest.mark.parametrize("contexts", [[[0, 3]], [[5, 0]], [[-1, 2]]])
def test_contexts_without_length_or_number_are_refused(contexts):
    with pytest.raises(SettingError, match="contexts"):
        resolve(discover().method("rome"), settings={"layer": 0, "contexts": contexts})


# -- presets -------------------------------------------------------------------------------------

# The shapes of published models, as their configs give them.
CONFIGS = {
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24}),
    "gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48}),
    "gpt-j-6b": ("gptj", {"n_embd": 4096, "n_layer": 28, "rotary_dim": 64}),
    "gpt-neox-20b": (
        "gpt_neox",
        {"hidden_size": 6144, "num_hidden_layers": 44, "intermediate_size": 24576},
    ),
    "llama-2-7b": (
        "llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008},
    ),
    "llama-3-8b": (
        "llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336},
    ),
    "llama-3.2-3b": (
        "llama",
        {"hidden_size": 3072, "num_hidden_layers": 28, "intermediate_size": 8192},
    ),
    "mistral-7b": (
        "mistral",
        {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336},
    ),
    "qwen2.5-7b": (
        "qwen2",
        {"hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944},
    ),
}
# Layer, steps, weight decay and clamp as the sources give them.
PUBLISHED = {
    "gpt2-medium": (8, 20, 0.5, 3),
    "gpt2-large": (12, 20, 0.5, 4),
    "gpt2-xl": (17, 20, 0.5, 4),
    "gpt-j-6b": (5, 20, 0.5, 4),
    "gpt-neox-20b": (15, 20, 0.5, 4),
    "llama-2-7b": (5, 25, 1e-3, 4),
    "llama-3-8b": (5, 25, 1e-3, 4),
    "llama-3.2-3b": (5, 25, 1e-3, 4),
    "mistral-7b": (5, 25, 1e-3, 4),
    "qwen2.5-7b": (5, 25, 1e-3, 4),
}


@pytest.mark.parametrize("method", ["rome", "r-rome"])
@pytest.mark.parametrize("name", CONFIGS)
def test_preset_is_chosen_by_config_and_gives_the_published_settings(name, method):
    kind, shape = CONFIGS[name]
    config = config_facts(AutoConfig.for_model(kind, **shape).to_dict())

    settings = resolve(discover().method(method), config=config)

    assert settings.origin["layer"] == f"preset {name}"
    hparams = settings.hparams
    found = (hparams.layer, hparams.steps, hparams.weight_decay, hparams.max_norm_ratio)
    assert found == PUBLISHED[name]
    assert (hparams.lr, hparams.kl_weight) == (0.5, 0.0625)
    assert hparams.contexts == ((5, 10), (10, 10))
    assert hparams.second_moment
    assert hparams.key == ("context" if method == "r-rome" else "rome")


@pytest.mark.parametrize("preset", presets_of(discover().method("rome")), ids=lambda p: p.name)
def test_every_preset_is_valid_and_names_its_source(preset):
    settings = {} if "layer" in preset.settings else {"layer": 5}

    resolved = resolve(discover().method("rome"), preset=preset.name, settings=settings)

    assert preset.source
    for key in preset.settings:
        assert resolved.origin[key] == f"preset {preset.name}"


def test_no_two_presets_suit_one_model():
    presets = presets_of(discover().method("rome"))
    for kind, shape in CONFIGS.values():
        config = config_facts(AutoConfig.for_model(kind, **shape).to_dict())
        assert sum(preset.suits(config) for preset in presets) == 1


def test_easyedit_preset_has_no_second_moment_and_asks_for_a_layer():
    spec = discover().method("rome")

    hparams = resolve(spec, preset="easyedit-compat", settings={"layer": 5}).hparams

    assert hparams.second_moment is False
    assert hparams.steps == 25
    with pytest.raises(SettingError, match="needs a value for 'layer'"):
        resolve(spec, preset="easyedit-compat")
