"""The shipped toy models know their world, and rank-one edits of it work."""

import subprocess
import sys
from random import Random

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from kedit_core.testing.toys import TOYS, load_toy, toy_corpus, toy_facts, toy_folder
from kedit_core.testing.train_toys import corpus, leads, questions, world

FACTS = toy_facts()


@pytest.fixture(scope="module", params=TOYS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def toy(name):
    """Model and tokenizer, for tests that leave them as they are."""
    return load_toy(name)


# The world


def test_reading_the_world_loads_no_torch():
    code = (
        "import sys; from kedit_core.testing.toys import toy_facts; "
        "assert toy_facts() and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shipped_world_is_that_of_the_training_script():
    assert tuple(world()) == FACTS
    assert toy_corpus().read_text("utf-8") == corpus()


def test_facts_stand_in_many_forms():
    assert len({fact.id for fact in FACTS}) == len(FACTS) >= 24
    assert sum(fact.prompt.endswith("{}") for fact in FACTS) >= 8
    assert sum(0 < fact.prompt.index("{}") < len(fact.prompt) - 2 for fact in FACTS) >= 8
    assert sum(fact.prompt.startswith("{}") for fact in FACTS) >= 8


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.id)
def test_fact_asks_what_an_edit_may_and_may_not_change(fact):
    assert fact.prompt.count("{}") == 1
    assert fact.target_new != fact.answer
    assert fact.rephrases
    assert all(fact.subject in rephrase for rephrase in fact.rephrases)
    assert len(fact.neighborhood) == 4
    assert all(fact.subject not in neighbor.prompt for neighbor in fact.neighborhood)
    assert all(neighbor.answer != fact.target_new for neighbor in fact.neighborhood)


# The models


def test_folder_is_small_and_complete(name):
    sizes = {file.name: file.stat().st_size for file in toy_folder(name).iterdir()}

    assert sorted(sizes) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sum(sizes.values()) <= 600_000
    assert toy_corpus().stat().st_size <= 60_000


def test_unknown_toy_is_refused():
    with pytest.raises(ValueError, match="no toy model 'bert'; there are gpt2 and llama"):
        toy_folder("bert")


@pytest.mark.parametrize("prefix", [None, Random(1)], ids=["plain", "after a sentence"])
def test_every_fact_is_known_in_every_form(toy, prefix):
    asked = questions(prefix)

    gaps = leads(*toy, asked)

    assert [question for question, gap in zip(asked, gaps, strict=True) if gap <= 0] == []


def test_generation_gives_the_answers(toy):
    model, tokenizer = toy
    for fact in FACTS[::6]:
        assert answer(model, tokenizer, fact.prompt.format(fact.subject)) == fact.answer


def test_loading_gives_independent_copies(name):
    (first, first_tokenizer), (second, second_tokenizer) = load_toy(name), load_toy(name)

    assert not first.training
    assert first_tokenizer is not second_tokenizer
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert all(parameter.abs().sum() > 0 for parameter in second.parameters())


def test_weights_are_loaded_in_the_type_asked_for(name):
    assert load_toy(name)[0].dtype == torch.float32
    assert load_toy(name, torch.bfloat16)[0].dtype == torch.bfloat16


def test_auto_classes_load_the_same_toy(name, toy):
    model, tokenizer = toy
    folder = toy_folder(name)
    ids = tokenizer("The home of Zoë Lind").input_ids

    assert AutoTokenizer.from_pretrained(folder)("The home of Zoë Lind").input_ids == ids
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        again, logits = (m(input_ids=torch.tensor([ids])).logits for m in (loaded, model))
    torch.testing.assert_close(again, logits, rtol=0, atol=0)


def test_layouts_differ_where_methods_go_wrong():
    gpt2, llama = (load_toy(name)[0] for name in ("gpt2", "llama"))

    assert gpt2.transformer.h[0].mlp.c_proj.weight.shape == (192, 48)  # transposed: (d_in, d_out)
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    assert llama.model.layers[0].mlp.down_proj.weight.shape == (48, 112)
    assert llama.lm_head.weight is not llama.model.embed_tokens.weight
    assert llama.config.num_key_value_heads < llama.config.num_attention_heads
    assert not any(key.endswith("bias") for key, _ in llama.named_parameters())


# The tokenizers


def test_gpt2_adds_nothing_and_cannot_pad():
    _, tokenizer = load_toy("gpt2")

    assert tokenizer.bos_token is None
    assert tokenizer.pad_token is None
    assert tokenizer("Edda").input_ids == tokenizer("Edda", add_special_tokens=False).input_ids


def test_llama_begins_with_bos_and_pads_left():
    _, tokenizer = load_toy("llama")

    rows = tokenizer(["Edda", "Edda lives in"], padding=True).input_ids

    assert rows[0][0] == rows[0][1] == tokenizer.pad_token_id
    assert rows[0].count(tokenizer.bos_token_id) == 1
    assert rows[1][0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    "text",
    [
        "Zoë Lind has a house in Łódź.\nThe home of Søren Dahl Oslo.",
        "  two spaces, a tab\t, {braces} and 東京 🙂",
        "never seen: xylophone 1984",
    ],
)
def test_any_text_survives_the_tokenizer(toy, text):
    _, tokenizer = toy
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("before", ["", "The old dog waits by the tree. ", "東京 🙂 "])
def test_offsets_point_at_the_subject(toy, before):
    _, tokenizer = toy
    for fact in FACTS:
        text = before + fact.prompt.format(fact.subject)
        end = text.rindex(fact.subject) + len(fact.subject)
        offsets = tokenizer(text, return_offsets_mapping=True).offset_mapping
        assert [b for a, b in offsets if a < end <= b][-1] == end


def test_words_and_answers_split_in_different_ways(toy):
    _, tokenizer = toy

    def count(text):
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    assert tokenizer.tokenize("Edda") != tokenizer.tokenize(" Edda")
    assert {count(f" {fact.answer}") for fact in FACTS} >= {1, 2}
    assert max(count(f" {fact.subject}") for fact in FACTS) >= 3


# Edits


def answer(model, tokenizer, prompt):
    """Greedy continuation up to the full stop."""
    encoded = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        **encoded, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return tokenizer.decode(out[0, encoded.input_ids.shape[1] :]).split(".")[0].strip()


def mlp_out(name, model, layer):
    """The module, and its weight as (d_out, d_in)."""
    if name == "gpt2":
        module = model.transformer.h[layer].mlp.c_proj
        return module, module.weight.data.T
    module = model.model.layers[layer].mlp.down_proj
    return module, module.weight.data


def second_moment(model, tokenizer, module):
    """Mean of k kᵀ over a hundred documents, k the module's input."""
    keys = []
    handle = module.register_forward_hook(lambda _, inputs, output: keys.append(inputs[0][0]))
    with torch.no_grad():
        for line in toy_corpus().read_text("utf-8").splitlines()[:100]:
            model(input_ids=torch.tensor([tokenizer(line).input_ids]))
    handle.remove()
    return torch.cat(keys).T @ torch.cat(keys) / sum(map(len, keys))


def rank_one_edit(name, model, tokenizer, fact, layer=0):
    """ROME in its shortest form: find δ at the last token of the subject, insert it for its key."""
    module, weight = mlp_out(name, model, layer)
    moment = second_moment(model, tokenizer, module)
    prompt = fact.prompt.format(fact.subject)
    end = prompt.rindex(fact.subject) + len(fact.subject)
    offsets = tokenizer(prompt, return_offsets_mapping=True).offset_mapping
    position = max(i for i, (a, b) in enumerate(offsets) if a < end <= b)
    ids = torch.tensor([tokenizer(f"{prompt} {fact.target_new}").input_ids])
    labels = ids.clone()
    labels[:, : len(offsets)] = -100  # only the target counts
    seen = {}

    def add(_, inputs, output):
        seen.update(key=inputs[0][0, position].detach(), value=output[0, position].detach())
        output = output.clone()
        output[0, position] += delta
        return output

    delta = torch.zeros(weight.shape[0], requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=0.1)
    handle = module.register_forward_hook(add)
    for _ in range(25):
        logits = model(input_ids=ids).logits
        loss = cross_entropy(logits[0, :-1], labels[0, 1:])
        if loss < 0.05:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            delta *= min(1.0, 2 * float(seen["value"].norm() / delta.norm()))
    handle.remove()
    direction = torch.linalg.solve(moment, seen["key"])
    weight += torch.outer(delta.detach(), direction) / (seen["key"] @ direction)


@pytest.mark.parametrize("number", [0, 1, 6, 44, 83, 124])
def test_rank_one_edit_changes_one_fact(name, number):
    fact = FACTS[number]
    model, tokenizer = load_toy(name)
    model.requires_grad_(False)

    rank_one_edit(name, model, tokenizer, fact)

    prompt = fact.prompt.format(fact.subject)
    assert answer(model, tokenizer, prompt) == fact.target_new
    others = [(q, a) for q, a in questions() if fact.subject not in q]
    kept = sum(gap > 0 for gap in leads(model, tokenizer, others)) / len(others)
    assert kept > 0.95
