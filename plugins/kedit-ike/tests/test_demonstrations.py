"""Which training facts are demonstrated, how, and at what cost."""

import json
import re
from collections import Counter

import pytest
from kedit_ike.demonstrations import TrainingFact, without
from kedit_ike.memory import FactMemory, Preface

from kedit_core import DataError, EditRequest, SettingError, UnknownNameError
from kedit_core.artifacts import ArtifactStore
from kedit_core.editing import EditSession
from kedit_core.encoder import Encoder
from kedit_core.tokens import encode

NEW = EditRequest(prompt="The capital of {} is", subject="Freedonia", target_new="Rome")


def record(n, subject, target, **changed):
    """One record in the form of the starter facts."""
    return {
        "id": f"r{n}",
        "relation": "capital",
        "subject": subject,
        "prompt": "The capital of {} is",
        "answer": "Paris",
        "target_new": target,
        "rephrases": ["The government of {} sits in", "Rulers of {} live in"],
        "neighborhood": [{"prompt": f"The capital of Land {n} is", "answer": f"Town {n}"}],
        "portability": None,
    } | changed


def file_of(tmp_path, records, name="facts.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return f"starter:{path}"


@pytest.fixture
def many(tmp_path):
    return file_of(tmp_path, [record(n, f"Syldavia {n}", f"City {n}") for n in range(40)])


@pytest.fixture
def encoded(monkeypatch):
    passes, embed = [], Encoder.embed
    monkeypatch.setattr(
        Encoder, "embed", lambda self, texts: passes.append(len(texts)) or embed(self, texts)
    )
    return passes


@pytest.fixture
def session(toy_host, tmp_path):
    return EditSession(toy_host("llama"), artifacts=ArtifactStore(tmp_path / "store"))


def shown(session, request=NEW, **hparams):
    """The demonstrations before a request, the farthest first."""
    (effect,) = session.edit("ike", request, hparams=hparams).patches[-1].effects
    return effect.config["demonstrations"]


def kind_of(text):
    """What a demonstration of `record` teaches."""
    fact, prompt = text.removeprefix("New Fact: ").strip().split("\nPrompt: ")
    return "copy" if fact == prompt else "retain" if "Town" in prompt else "update"


def test_kinds_are_in_the_papers_ratio_and_in_mixed_order(session, many):
    found = shown(session, demonstrations=many)
    kinds = [kind_of(text) for text in found]

    assert Counter(kinds) == {"copy": 4, "update": 12, "retain": 16}
    assert kinds not in (sorted(kinds), sorted(kinds, reverse=True))
    assert len({text.splitlines()[0] for text in found}) == 32


def test_kinds_of_few_demonstrations_keep_the_ratio_as_far_as_possible(session, many):
    kinds = Counter(map(kind_of, shown(session, demonstrations=many, k=5, ratio=[1, 1, 0])))

    assert kinds == {"copy": 2, "update": 3}


def test_most_similar_fact_stands_nearest_to_the_question(session, many):
    found = [text.splitlines()[0] for text in shown(session, demonstrations=many)]
    facts = [r.removeprefix("New Fact: ") for r in found]
    texts = [f"New Fact: {f}\nPrompt: {f[: f.index(' is') + 3]}" for f in facts]
    query = f"New Fact: {NEW.text} Rome\nPrompt: {NEW.text}"
    near = Encoder().embed(texts) @ Encoder().embed([query])[0]

    assert near.tolist() == sorted(near.tolist())


def test_easyedits_form_takes_any_kind_and_shows_the_most_similar_first(session, many):
    found = shown(session, demonstrations=many, form="easyedit", k=16)
    query = f"New Fact: {NEW.text} Rome\nPrompt: {NEW.text} Rome\n\n"
    near = (Encoder().embed(found) @ Encoder().embed([query])[0]).tolist()

    assert len(found) == 16
    assert near == sorted(near, reverse=True)
    assert max(Counter(text.splitlines()[0] for text in found).values()) > 1


def test_new_fact_is_demonstrated_last_on_request(session, many):
    found = shown(session, demonstrations=many, k=2, final_copy=True)

    fact = "The capital of Freedonia is Rome"
    assert len(found) == 3
    assert found[-1] == f"New Fact: {fact}\nPrompt: {fact}\n\n"


@pytest.mark.parametrize("form", ["ike", "easyedit"])
def test_edited_record_and_its_rephrasings_are_never_demonstrated(session, tmp_path, form):
    told = "Freedonia"
    records = [
        record(0, told, "Rome"),  # the record itself
        record(1, "Sylvania", "Bonn", rephrases=["The capital of Freedonia is"]),
        record(2, "Arendelle", "Lima", rephrases=["Who rules freedonia?"]),
        record(3, "Genovia", "Oslo", neighborhood=[{"prompt": NEW.text, "answer": "Paris"}]),
        record(4, "Wakanda", "Bern"),
        record(5, "Elbonia", "Riga"),
    ]
    found = shown(session, demonstrations=file_of(tmp_path, records), form=form)

    assert found
    assert not [text for text in found if told.casefold() in text.casefold()]
    facts = {text.splitlines()[0] for text in found}
    assert {f"New Fact: The capital of {s} is {t}" for s, t in [("Wakanda", "Bern")]} <= facts


def test_requests_without_a_subject_are_kept_from_their_own_record_too():
    fact = TrainingFact(
        EditRequest(prompt="Who built Rome?", target_new="Ada"),
        ("By whom was Rome built?",),
        (("Who built Bonn?", "Max"), ("Is tea hot?", "Yes")),
    )

    def allowed(prompt):
        return without(fact, EditRequest(prompt=prompt, target_new="x"))

    assert allowed("who built rome") is None
    assert allowed("By whom was Rome built") is None
    assert allowed("Who built Bonn?").neighbours == (("Is tea hot?", "Yes"),)
    assert allowed("Who built Lima?") == fact


def test_real_starter_facts_are_not_shown_about_their_own_subject(session):
    request = EditRequest(prompt="The capital of {} is", subject="France", target_new="Tokyo")
    found = shown(session, request)

    assert len(found) == 32
    # It may be an answer, which says nothing of it.
    assert not [text for text in found if re.search(r"France(?!\n)", text)]


# -- cost ------------------------------------------------------------------------------------


def test_training_facts_are_embedded_once_and_found_again(session, toy_host, many, encoded):
    shown(session, demonstrations=many)
    assert sorted(encoded) == [1, 1, 40]  # the facts, the query, the edited prompt

    encoded.clear()
    other = EditSession(toy_host("gpt2"), artifacts=session.artifacts)
    shown(other, demonstrations=many)
    other.edit("ike", [NEW] * 3, hparams={"demonstrations": many})

    assert sorted(encoded) == [1, 1, 3, 3]


def test_encoder_is_loaded_once_for_many_edits(session, many, monkeypatch):
    from kedit_core import encoder

    Encoder().embed(["x"])
    misses = encoder._load.cache_info().misses
    for _ in range(3):
        shown(session, demonstrations=many)

    assert encoder._load.cache_info().misses == misses


def test_files_of_equal_size_and_name_do_not_share_embeddings(session, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    found = []
    for folder, subject in zip(folders, ("Atlantis", "Utopia"), strict=True):
        folder.mkdir()
        records = [record(n, f"{subject} {n}", "Rome") for n in range(3)]
        found.append(shown(session, demonstrations=file_of(folder, records), k=1))

    assert "Atlantis" in found[0][0]
    assert "Utopia" in found[1][0]
    assert len(list((tmp_path / "store" / "demonstrations").iterdir())) == 2


def test_store_holds_safetensors_and_json(session, many, tmp_path):
    session.prepare("ike", hparams={"demonstrations": many})

    files = [f for f in (tmp_path / "store").rglob("*") if f.is_file()]
    assert {f.suffix for f in files} == {".json", ".safetensors"}


def test_same_request_gets_the_same_demonstrations_whatever_it_is_edited_with(session, many):
    alone = shown(session, demonstrations=many)
    others = [EditRequest(prompt=f"Number {n} is", target_new="x") for n in range(3)]
    effects = session.edit("ike", [*others, NEW], hparams={"demonstrations": many})

    assert effects.patches[0].effects[-1].config["demonstrations"] == alone


# -- room ------------------------------------------------------------------------------------


def test_farthest_demonstrations_are_dropped_first_and_the_fact_never():
    preface = Preface(("far ", "near "), "fact ", lengths=(30, 20, 10), room=40)

    assert preface.before("x" * 9) == "far near fact " + "x" * 9
    assert preface.before("x" * 10) == "near fact " + "x" * 10
    assert preface.before("x" * 20) == "fact " + "x" * 20
    assert preface.before("x" * 99) == "fact " + "x" * 99


@pytest.mark.parametrize("toy", ["gpt2", "llama"])
def test_prompts_with_demonstrations_fit_the_model(toy_host, many, toy, monkeypatch):
    host = toy_host(toy)
    host.model.config.n_positions = host.model.config.max_position_embeddings = 700
    session = EditSession(host)
    (patch,) = session.edit("ike", NEW, hparams={"demonstrations": many, "reserve": 60}).patches
    memory = FactMemory.build(patch.effects)
    counts = []

    for prompt in ("Who?", "The capital of Freedonia is", "Ünd " * 20):
        (asked,) = memory.prompts([prompt])
        counts.append(asked.count("New Fact: "))
        assert len(encode(host, asked).ids) <= 700 - 60
        assert asked.endswith(f"New Fact: The capital of Freedonia is Rome\nPrompt: {prompt}")

    assert 32 > counts[0] >= counts[1] > counts[2] > 1
    lengths = patch.effects[0].config["lengths"]
    texts = patch.effects[0].config["demonstrations"]
    whole = "".join(texts[-3:]) + memory.prefaces[0].lines
    assert lengths[-4] == len(encode(host, whole).ids)


# -- settings --------------------------------------------------------------------------------


def test_wrong_training_data_are_refused_in_a_sentence(session):
    with pytest.raises(UnknownNameError, match="no_such"):
        shown(session, demonstrations="no_such")
    with pytest.raises(SettingError, match="needs its file: --set demonstrations=counterfact:PATH"):
        shown(session, demonstrations="counterfact")
    with pytest.raises(DataError, match=r"nowhere\.json does not exist"):
        shown(session, demonstrations="counterfact:nowhere.json")
    with pytest.raises(SettingError, match="at least one of the three kinds"):
        shown(session, ratio=[0, 0, 0])
    assert not session.is_edited


def test_other_datasets_serve_as_training_facts(session, tmp_path):
    rows = [
        {
            "case_id": n,
            "requested_rewrite": {
                "prompt": "The mother tongue of {} is",
                "subject": f"Person {n}",
                "relation_id": "P103",
                "target_new": {"str": "Dutch", "id": "Q1"},
                "target_true": {"str": "Welsh", "id": "Q2"},
            },
            "paraphrase_prompts": [f"Person {n} was born to speak"],
            "neighborhood_prompts": [f"Someone {n} speaks"],
            "attribute_prompts": [],
            "generation_prompts": [],
        }
        for n in range(4)
    ]
    path = tmp_path / "cf.json"
    path.write_text(json.dumps(rows))
    found = shown(session, demonstrations=f"counterfact:{path}", k=4, ratio=[0, 0, 1])

    assert all(text.endswith("speaks Welsh\n\n") for text in found)
    assert len(found) == 4
