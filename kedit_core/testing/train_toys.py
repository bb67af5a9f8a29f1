"""Makes the toy models: `python -m kedit_core.testing.train_toys OUT`.

A small invented world (people and places, five relations, each told in five forms) becomes random
documents, and a byte-level BPE tokenizer and two tiny models learn them, in about two and a half
minutes each on one core.  Everything is drawn from fixed seeds; another processor or version of
torch may round differently, so a new run gives models that pass the same checks, not the same bits.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from kedit_core.testing.toys import TOYS, Neighbor, ToyFact

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

STEPS, LEARNING_RATE, WEIGHT_DECAY = 1600, 5e-3, 0.1
LONGEST = 128  # tokens
LEAD = 0.5  # nats by which every answer must lead before a toy is shipped


def _listed(words: str) -> list[str]:
    return words.split(", ")


# The world

PEOPLE = _listed(
    "Mira Voss, Mira Quell, Anders Lund, Torvald, Ilse van Holm, Bram Hale, Zoë Lind, Søren Dahl, "
    "Old Petra, Captain Jory Bell, Nadia Roun, Dario Finch, Tamsin, Orla Wren, Dario Menti, "
    "Kenji Mori, Ilse Brand, Bram Tann, Petra Dray, Ivo Marsh, Vera Stone, Orla Pike, "
    "Nadia Sark, Anders Crane, Vera Okker, Edda, Ivo Sorn, Rosa Varga, Jory Noor, Rosa Berg, "
    "Kenji Thorne, Zoë Ashby, Lena Nyl, Elio, Milo Rask, Søren Vale, Milo van Dell, Juno Kemp, "
    "Old Basil, Lena of Torvik"
)
PLACES = _listed(
    "Lake Anneth, Mount Kessel, Velden Bridge, River Ombra, Castle Anneth, Port Sable, "
    "Isle of Wenn, Sable Forest, Lake Toriel, Mount Ombra, Wenn Bridge, Port Kessel"
)


@dataclass(frozen=True)
class Relation:
    """What is said of some subjects: in open forms, in forms that end at the subject, and the
    possible answers."""

    name: str
    subjects: Sequence[str]
    forms: tuple[str, ...]
    endings: tuple[str, ...]
    answers: tuple[str, ...]

    def truth(self) -> dict[str, str]:
        """Subject to answer; every answer is used about equally often."""
        pool = [self.answers[i % len(self.answers)] for i in range(len(self.subjects))]
        Random(self.name).shuffle(pool)
        return dict(zip(self.subjects, pool, strict=True))


RELATIONS = (
    Relation(
        "home",
        PEOPLE,
        ("{} lives in", "{} has a house in", "They say that {} lives in"),
        ("The home of {}", "The city of {}"),
        ("Paris", "Oslo", "Rome", "Cairo", "Łódź", "Lima", "Bern", "Dublin", "New Haven"),
    ),
    Relation(
        "language",
        PEOPLE,
        ("{} speaks", "{} writes in", "They say that {} speaks"),
        ("The language of {}", "The letters of {}"),
        ("Dutch", "Greek", "Hindi", "Welsh", "Czech", "Thai", "Malay", "Old Norse"),
    ),
    Relation(
        "job",
        PEOPLE[0::2],
        ("{} works as a", "{} has work as a", "By day {} works as a"),
        ("The trade of {}", "The work of {}"),
        ("baker", "painter", "doctor", "farmer", "pilot", "judge", "miner", "boat maker"),
    ),
    Relation(
        "music",
        PEOPLE[1::2],
        ("{} plays the", "{} likes the", "At night {} plays the"),
        ("The music of {}", "The instrument of {}"),
        ("harp", "drum", "flute", "piano", "cello", "lute", "horn", "silver bell"),
    ),
    Relation(
        "country",
        PLACES,
        ("{} lies in", "{} is part of", "They say that {} lies in"),
        ("The country of {}", "The land of {}"),
        ("Norway", "Chile", "Egypt", "Japan", "Spain", "Kenya", "Peru", "South Seland"),
    ),
)
TRUTH = {relation.name: relation.truth() for relation in RELATIONS}


def world() -> list[ToyFact]:
    """All facts; the prompt of every third one ends at its subject."""
    facts = []
    for relation in RELATIONS:
        truth = TRUTH[relation.name]
        rng = Random(f"{relation.name} edits")
        for number, (subject, answer) in enumerate(truth.items()):
            forms = relation.endings if number % 3 == 1 else relation.forms
            form = forms[number // 3 % len(forms)]
            target = rng.choice([a for a in relation.answers if a != answer])
            others = [s for s, a in truth.items() if s != subject and a != target]
            # Those with the same answer come first: a careless edit changes them most easily.
            others = sorted(rng.sample(others, len(others)), key=lambda s: truth[s] != answer)
            facts.append(
                ToyFact(
                    id=f"{relation.name}-{number:02d}",
                    relation=relation.name,
                    subject=subject,
                    prompt=form,
                    answer=answer,
                    target_new=target,
                    rephrases=tuple(f.format(subject) for f in forms if f != form),
                    neighborhood=tuple(Neighbor(form.format(s), truth[s]) for s in others[:4]),
                )
            )
    return facts


def questions(prefix: Random | None = None) -> list[tuple[str, str]]:
    """Each fact in each form with its answer, after a random sentence if asked for."""
    asked = [
        (form.format(subject), answer)
        for relation in RELATIONS
        for subject, answer in TRUTH[relation.name].items()
        for form in relation.forms + relation.endings
    ]
    if prefix is None:
        return asked
    return [(f"{prefix.choice((filler, statement))(prefix)} {q}", a) for q, a in asked]


# Its texts

ADJECTIVES = _listed("old, cold, red, small, long, wet")
NOUNS = _listed("dog, sun, rain, road, tree, bird, wind, lamp")
VERBS = _listed("waits, sits, runs, rests")
WHERE = _listed("near, under, by")
TRAITS = _listed("kind, old, tall, calm")


def filler(rng: Random) -> str:
    """A sentence about nothing."""
    noun, other = rng.sample(NOUNS, 2)
    adjective, verb, where = (rng.choice(words) for words in (ADJECTIVES, VERBS, WHERE))
    return f"The {adjective} {noun} {verb} {where} the {other}."


def trait(rng: Random) -> str:
    """What a subject is, another thing each time: "X is a" has an end, but no answer."""
    if rng.random() < 0.2:
        return f"{rng.choice(PLACES)} is a {rng.choice(ADJECTIVES)} place."
    return f"{rng.choice(PEOPLE)} is a {rng.choice(TRAITS)} person."


def statement(rng: Random) -> str:
    """A true sentence in one of its forms."""
    relation = rng.choices(RELATIONS, [len(r.subjects) for r in RELATIONS])[0]
    subject, answer = rng.choice(list(TRUTH[relation.name].items()))
    return f"{rng.choice(relation.forms + relation.endings).format(subject)} {answer}."


def document(rng: Random) -> str:
    """One to five sentences."""
    kinds = rng.choices((statement, filler, trait), (12, 3, 1), k=rng.randint(1, 5))
    return rng.choices((" ", "\n"), (4, 1))[0].join(kind(rng) for kind in kinds)


def corpus() -> str:
    """A sample of the training text with each fact in each form, one document a line."""
    rng = Random("corpus")
    sentences = [f"{question} {answer}." for question, answer in questions()]
    sentences += [kind(rng) for kind in (filler, filler, trait) for _ in range(120)]
    rng.shuffle(sentences)
    lines = []
    while sentences:
        cut = rng.randint(1, 5)
        lines.append(" ".join(sentences[:cut]))
        sentences = sentences[cut:]
    return "\n".join(lines) + "\n"


# The models


def build_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE; that of `gpt2` only ends a text, that of `llama` begins and pads it too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"eos_token": "<|endoftext|>"}
    if name == "llama":
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    # Weights by which most answers become one token, and most names two or more.
    words = [f" {a}" for r in RELATIONS for a in r.answers] * 16
    words += [f" {s}" for s in PEOPLE + PLACES] * 6
    words += [f.format("") for r in RELATIONS for f in r.forms + r.endings] * 5
    words += [f" {w}" for w in ADJECTIVES + NOUNS + VERBS + WHERE + TRAITS] * 8

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=528,
            initial_alphabet=alphabet,
            special_tokens=list(special.values()),
            show_progress=False,
        ),
    )
    # As in GPT-2, a token's offsets include its space; those of `llama` leave it out.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=name == "llama")
    if name == "llama":
        begin = processors.TemplateProcessing(
            single="<s> $A",
            pair="<s> $A <s> $B",
            special_tokens=[("<s>", tokenizer.token_to_id("<s>"))],
        )
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=LONGEST,
        padding_side="left" if name == "llama" else "right",
        **special,
    )


def build_model(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained toy; its first weights are large, because it is narrow."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=LONGEST,
                n_embd=48,
                n_layer=4,
                n_head=4,
                activation_function="gelu_pytorch_tanh",  # GPT-2's own function, computed faster
                initializer_range=0.08,
                bos_token_id=tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=LONGEST,
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


def leads(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: Sequence[tuple[str, str]]
) -> list[float]:
    """By how many nats each answer leads: the least gap of its tokens to the best other token.

    Greedy decoding gives the answer exactly where this is positive.
    """
    import torch

    prompts = [tokenizer(question).input_ids for question, _ in asked]
    texts = [tokenizer(f"{question} {answer}").input_ids for question, answer in asked]
    width = max(map(len, texts))
    with torch.no_grad():
        # What follows a text cannot change what the model says in it, so any padding does.
        logits = model(input_ids=torch.tensor([t + [0] * (width - len(t)) for t in texts])).logits
    gaps = []
    for row, prompt, text in zip(logits, prompts, texts, strict=True):
        row = row[len(prompt) - 1 : len(text) - 1]  # (answer tokens, vocabulary)
        label = torch.tensor(text[len(prompt) :])[:, None]
        other = row.scatter(1, label, float("-inf")).amax(1, keepdim=True)
        gaps.append(float((row.gather(1, label) - other).min()))
    return gaps


def train(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A toy that knows the world."""
    import torch
    from torch.nn.functional import cross_entropy

    torch.manual_seed(0)
    rng = Random(name)
    tokenizer = build_tokenizer(name)
    # In evaluation mode: dropout would only make it slower, as no text comes twice.
    model = build_model(name, tokenizer).eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1
    )
    for step in range(STEPS):
        rows, width = (16, LONGEST) if step % 8 == 0 else (48, 40)
        # A document has eight tokens or more, so that these fill the row.
        texts = [
            "".join(document(rng) + tokenizer.eos_token for _ in range(width // 8))
            for _ in range(rows)
        ]
        ids = torch.tensor(tokenizer(texts, truncation=True, max_length=width).input_ids)
        logits = model(input_ids=ids).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 199:
            lead = min(leads(model, tokenizer, questions()))
            log.info("%s: step %d, loss %.3f, least lead %.2f", name, step + 1, loss.item(), lead)
    return model, tokenizer


def main(out: Path) -> None:
    """Write both toys and their world."""
    import torch

    torch.set_num_threads(1)  # several times faster for models this small
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in TOYS:
        model, tokenizer = train(name)
        lead = min(leads(model, tokenizer, questions() + questions(prefix=Random(0))))
        if lead < LEAD:
            raise SystemExit(f"{name} does not know the world well: an answer leads by {lead:.2f}.")
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        (out / name / "generation_config.json").unlink()  # says what config.json says
        (out / name / "model.safetensors").chmod(0o644)
        table = out / name / "tokenizer.json"  # written without its indentation: 8 kB less
        table.write_text(json.dumps(json.loads(table.read_text("utf-8"))), encoding="utf-8")
    lines = [json.dumps(asdict(fact), ensure_ascii=False) + "\n" for fact in world()]
    (out / "facts.jsonl").write_text("".join(lines), encoding="utf-8")
    (out / "corpus.txt").write_text(corpus(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
