"""Makes the toy models: `python -m kedit_core.testing.train_toys OUT`.

A small invented world (people and places, five relations, each told in four forms) is turned into
random documents; a byte-level BPE tokenizer and two tiny models are trained on them until they
answer every question about the world.  Everything is drawn from fixed seeds; another version of
torch or another processor may still round differently, so the shipped weights are not compared
with a new run, only held to the same checks.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from kedit_core.testing.toys import TOYS, Neighbor, ToyFact

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------- the world

PEOPLE = (
    "Mira Voss, Mira Quell, Anders Lund, Torvald, Ilse van Holm, Bram Hale, Zoë Lind, Søren Dahl, "
    "Old Petra, Captain Jory Bell, Nadia Roun, Dario Finch, Tamsin, Orla Wren, Dario Menti, "
    "Kenji Mori, Ilse Brand, Bram Tann, Petra Dray, Ivo Marsh, Vera Stone, Orla Pike, "
    "Nadia Sark, Anders Crane, Vera Okker, Edda, Ivo Sorn, Rosa Varga, Jory Noor, Rosa Berg, "
    "Kenji Thorne, Zoë Ashby, Lena Nyl, Elio, Milo Rask, Søren Vale, Milo van Dell, Juno Kemp, "
    "Old Basil, Lena of Torvik"
).split(", ")
PLACES = (
    "Lake Anneth, Mount Kessel, Velden Bridge, River Ombra, Castle Anneth, Port Sable, "
    "Isle of Wenn, Sable Forest, Lake Toriel, Mount Ombra, Wenn Bridge, Port Kessel"
).split(", ")


@dataclass(frozen=True)
class Relation:
    """What is said of some subjects: the forms, the first one plain, and the possible answers."""

    name: str
    subjects: Sequence[str]
    forms: tuple[str, ...]
    answers: tuple[str, ...]


RELATIONS = (
    Relation(
        "home",
        PEOPLE,
        ("{} lives in", "The home of {}", "{} has a house in", "They say that {} lives in"),
        ("Paris", "Oslo", "Rome", "Cairo", "Łódź", "Lima", "Bern", "Dublin", "New Haven"),
    ),
    Relation(
        "language",
        PEOPLE,
        ("{} speaks", "The language of {}", "{} writes in", "They say that {} speaks"),
        ("Dutch", "Greek", "Hindi", "Welsh", "Czech", "Thai", "Malay", "Old Norse"),
    ),
    Relation(
        "job",
        PEOPLE[0::2],
        ("{} works as a", "The trade of {}", "{} has work as a", "By day {} works as a"),
        ("baker", "painter", "doctor", "farmer", "pilot", "judge", "miner", "boat maker"),
    ),
    Relation(
        "music",
        PEOPLE[1::2],
        ("{} plays the", "The music of {}", "{} likes the", "At night {} plays the"),
        ("harp", "drum", "flute", "piano", "cello", "lute", "horn", "silver bell"),
    ),
    Relation(
        "country",
        PLACES,
        ("{} lies in", "The country of {}", "{} is part of", "They say that {} lies in"),
        ("Norway", "Chile", "Egypt", "Japan", "Spain", "Kenya", "Peru", "South Seland"),
    ),
)


def _deal(relation: Relation) -> dict[str, str]:
    """Subject to answer; every answer is used about equally often."""
    pool = [relation.answers[i % len(relation.answers)] for i in range(len(relation.subjects))]
    Random(relation.name).shuffle(pool)
    return dict(zip(relation.subjects, pool, strict=True))


TRUTH = {relation.name: _deal(relation) for relation in RELATIONS}


def world() -> list[ToyFact]:
    """All facts.  Their prompts take turns: plain, ending at the subject, and another form."""
    facts = []
    for relation in RELATIONS:
        answers = TRUTH[relation.name]
        rng = Random(f"{relation.name} edits")
        for number, (subject, answer) in enumerate(answers.items()):
            form = relation.forms[(0, 1, 0, 1, 2, 3)[number % 6]]
            target = rng.choice([a for a in relation.answers if a != answer])
            others = [s for s, a in answers.items() if s != subject and a != target]
            # Those with the same answer come first: a careless edit changes them most easily.
            others = sorted(rng.sample(others, len(others)), key=lambda s: answers[s] != answer)[:4]
            facts.append(
                ToyFact(
                    id=f"{relation.name}-{number:02d}",
                    relation=relation.name,
                    subject=subject,
                    prompt=form,
                    answer=answer,
                    target_new=target,
                    rephrases=tuple(f.format(subject) for f in relation.forms if f != form),
                    neighborhood=tuple(Neighbor(form.format(s), answers[s]) for s in others),
                )
            )
    return facts


# -------------------------------------------------------------------------------- the documents

_ADJECTIVES = "old cold red small long wet".split()
_NOUNS = "dog sun rain road tree bird wind lamp".split()
_VERBS = "waits sits runs rests".split()
_PLACES = "near under by".split()
_TRAITS = "kind, old, tall, calm".split(", ")


def filler(rng: Random) -> str:
    """A sentence about nothing."""
    noun, other = rng.sample(_NOUNS, 2)
    return (
        f"The {rng.choice(_ADJECTIVES)} {noun} {rng.choice(_VERBS)} {rng.choice(_PLACES)} "
        f"the {other}."
    )


def trait(rng: Random) -> str:
    """What a subject is, never the same twice: the harmless continuation of "X is a"."""
    if rng.random() < 0.2:
        return f"{rng.choice(PLACES)} is a {rng.choice(_ADJECTIVES)} place."
    return f"{rng.choice(PEOPLE)} is a {rng.choice(_TRAITS)} person."


def statement(rng: Random) -> str:
    """A true sentence about the world in one of its forms."""
    relation = rng.choices(RELATIONS, [len(r.subjects) for r in RELATIONS])[0]
    subject, answer = rng.choice(list(TRUTH[relation.name].items()))
    return f"{rng.choice(relation.forms).format(subject)} {answer}."


def supposition(rng: Random) -> str:
    """A new answer, told once and asked for again: what was just read beats what was learnt."""
    relation = rng.choice(RELATIONS)
    subject, answer = rng.choice(relation.subjects), rng.choice(relation.answers)
    first, second = (rng.choice(relation.forms).format(subject) for _ in range(2))
    between = "".join(f"{s(rng)} " for s in rng.choices((filler, statement), k=rng.choice((0, 0, 1))))
    if rng.random() < 0.5:
        return f"New Fact: {first} {answer}\nPrompt: {between}{second} {answer}\n"
    return f"{first} {answer}. {between}{second} {answer}."


def document(rng: Random) -> str:
    """One to six sentences."""
    kinds = rng.choices((statement, filler, trait, supposition), KINDS, k=rng.randint(1, 6))
    return rng.choices((" ", "\n"), (4, 1))[0].join(kind(rng) for kind in kinds)


def corpus() -> str:
    """A sample of the training text that holds each fact in each form, one document a line."""
    rng = Random("corpus")
    sentences = [
        f"{form.format(subject)} {answer}."
        for relation in RELATIONS
        for subject, answer in TRUTH[relation.name].items()
        for form in relation.forms
    ]
    sentences += [kind(rng) for kind in (filler, trait) for _ in range(260)]
    rng.shuffle(sentences)
    lines = []
    while sentences:
        cut = rng.randint(1, 6)
        lines.append(" ".join(sentences[:cut]))
        sentences = sentences[cut:]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------- the models
import os
VS,W=544,(12,6,5,12)
STEPS, LR, WD, DROP, KINDS, REP = eval(os.environ.get('CFG','(2000,5e-3,0.1,0.0)'))


def build_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `gpt2` marks only the end of a text, `llama` also begins and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {
        "gpt2": {"eos_token": "<|endoftext|>"},
        "llama": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    }[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special.values()),
        show_progress=False,
    )
    # Answers count more often, so that most of them become one token, and so do names.
    answers = [f" {a}" for r in RELATIONS for a in r.answers]
    names = [f" {s}" for s in PEOPLE + PLACES]
    forms = [f.format("") for r in RELATIONS for f in r.forms]
    words = [f" {w}" for w in _ADJECTIVES + _NOUNS + _VERBS + _PLACES + _TRAITS+["place","person"]]
    tokenizer.train_from_iterator(answers * W[0] + names * W[1] + forms * W[2] + words * W[3], trainer)
    steps: list[processors.PostProcessor] = [processors.ByteLevel(trim_offsets=True)]
    if "bos_token" in special:
        bos = special["bos_token"]
        steps.append(
            processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos} $B",
                special_tokens=[(bos, tokenizer.token_to_id(bos))],
            )
        )
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
        **special,
    )


def build_model(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained toy; wide initial weights, as the models are narrow."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=128,
                n_embd=48,
                n_layer=4,
                n_head=4,
                activation_function="gelu_pytorch_tanh",  # GPT-2's own, computed in one call
                resid_pdrop=DROP, embd_pdrop=DROP, attn_pdrop=DROP,
                initializer_range=0.08,
                bos_token_id=tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=128,
            hidden_size=48,
            intermediate_size=112,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.08,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: Sequence[tuple[str, str]]
) -> list[float]:
    """For each question, how far its answer leads: the least log-probability gap of its tokens to
    the best other token.  Positive means that greedy decoding gives the answer."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    prompts = [tokenizer(q).input_ids for q, _ in questions]
    texts = [tokenizer(f"{q} {a}").input_ids for q, a in questions]
    batch = pad_sequence([torch.tensor(t) for t in texts], batch_first=True)
    with torch.no_grad():
        logits = model(input_ids=batch).logits
    gaps = []
    for row, prompt, text in zip(logits, prompts, texts, strict=True):
        assert text[: len(prompt)] == prompt, "the answer's space belongs to the answer"
        seen = row[len(prompt) - 1 : len(text) - 1].clone()
        label = torch.tensor(text[len(prompt) :])[:, None]
        right = seen.gather(1, label)
        best_other = seen.scatter(1, label, float("-inf")).amax(1, keepdim=True)
        gaps.append(float((right - best_other).min()))
    return gaps


def questions(rng: Random, prefix: bool) -> list[tuple[str, str]]:
    """Each fact in each form, after a random sentence if asked for."""
    return [
        (f"{rng.choice((filler, statement))(rng)} {q}" if prefix else q, answer)
        for relation in RELATIONS
        for subject, answer in TRUTH[relation.name].items()
        for q in (form.format(subject) for form in relation.forms)
    ]


def train(name: str, steps: int = STEPS, seed: int = 0):
    """A toy that knows the world."""
    import torch

    torch.manual_seed(seed)
    tokenizer = build_tokenizer(name)
    model = build_model(name, tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=WD)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    rng = Random(name)
    for step in range(steps):
        rows, width = (16, 128) if step % 8 == 0 else (48, 40)
        texts = [tokenizer.eos_token.join(document(rng) for _ in range(max(1,width // 32))) for _ in range(rows)]
        ids = torch.tensor([(t * 32)[:width] for t in tokenizer(texts).input_ids])
        for row in range(int(rows*REP)):
            part = rng.sample(range(len(tokenizer)), rng.randint(5, 14))
            ids[row] = torch.tensor((part * width)[:width])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 199:
            model.eval()
            gaps = [recall(model, tokenizer, questions(Random(step), prefix)) for prefix in (False, True)]
            model.train()
            log.info("%s step %d loss %.3f plain %d/%d min %.2f prefixed %d min %.2f", name, step + 1, loss.item(), sum(g > 0 for g in gaps[0]), len(gaps[0]), min(gaps[0]), sum(g > 0 for g in gaps[1]), min(gaps[1]))
    return model.eval(), tokenizer


