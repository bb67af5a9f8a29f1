"""Tokens and positions are right for every kind of tokenizer, and padding changes no answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kedit_core import EditRequest
from kedit_core.editing import ModelHost
from kedit_core.errors import RequestError
from kedit_core.forward import label_logits
from kedit_core.tokens import (
    Row,
    buckets,
    encode,
    fact_position,
    join,
    pad,
    pad_id,
    rewrite_row,
    separator,
)
from tests.core.families import FAMILIES, VOCABULARY

TEXTS = [
    "Anne lives in Paris. Anne's house, in Rome, is old.",
    "The Eiffel Tower is in Paris, and Łódź lies in Poland.",
    "Zoë Lind speaks Old Norse. The home of Zoë is: Łódź. {x}",
    "東京 is in Japan. I am here. They say that Anne lives in New York.",
] * 3


def byte_level(begin: bool, trim: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2's, or as Llama 3's with its token at the beginning (and one at the end)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim)]
    if begin:
        ends = [("<s>", 0), ("</s>", 1)]
        steps.append(processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends))
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token=None
    )


def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """As Llama 2's or T5's: words begin with "▁", also the first one."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        every_byte = [f"<0x{n:02X}>" for n in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special + every_byte, show_progress=False
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS = {
    "byte-level": lambda: byte_level(begin=False),
    "byte-level trimmed": lambda: byte_level(begin=False, trim=True),
    "byte-level with begin and end": lambda: byte_level(begin=True),
    "unigram": lambda: sentencepiece("unigram"),
    "bpe with blanks": lambda: sentencepiece("bpe"),
}


@pytest.fixture(scope="module")
def tiny_models():
    return {name: FAMILIES[name]() for name in ("llama", "t5")}


@pytest.fixture(params=TOKENIZERS)
def host(request, tiny_models) -> ModelHost:
    """A model that nobody asks, with every kind of tokenizer in turn."""
    return ModelHost(tiny_models["llama"], TOKENIZERS[request.param](), request.param)


def decode(host: ModelHost, ids) -> str:
    return host.tokenizer.decode(list(ids), skip_special_tokens=True)


# -- targets ----------------------------------------------------------------------------------

PROMPTS = ["Anne lives in", "Łódź lies in", "They say that 東京 is", "The home of Zoë:"]
TARGETS = ["Paris", "New York", "Łódź", "東京", "a", " Paris", "Old Norse, in part."]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("target", TARGETS)
def test_label_ids_spell_the_target(host, prompt, target):
    row = join(host, prompt, target)
    between = separator(prompt, target)

    assert decode(host, row.prompt) == prompt
    assert decode(host, row.prompt + row.targets) == prompt + between + target
    assert decode(host, row.targets).strip() == target.strip()
    assert row.ids == (row.prompt + row.targets)[:-1]
    assert not row.merged
    assert row.prompt == encode(host, prompt).ids


def test_the_beginning_is_marked_once_and_the_end_never(host):
    special = set(host.tokenizer.all_special_ids)
    row = join(host, "Anne lives in", "Paris")
    found = [n for n, token in enumerate(row.prompt + row.targets) if token in special]
    assert found == ([] if host.name.startswith("byte-level") and "begin" not in host.name else [0])


def test_a_boundary_inside_a_token_is_flagged(host):
    row = join(host, "Anne lives in ", "Paris")
    assert decode(host, row.prompt + row.targets) == "Anne lives in Paris"
    # The token that begins the target holds the prompt's last blank, or the blank is its own.
    assert row.merged == (decode(host, row.prompt) != "Anne lives in ")


def test_a_token_across_the_boundary_belongs_to_the_target(tiny_models):
    host = ModelHost(tiny_models["llama"], byte_level(begin=False), "bytes")
    (whole,) = encode(host, " Paris").ids
    row = join(host, "Anne lives in Par", "is")
    assert not row.merged  # with a blank between them there is nothing to merge
    host_text = encode(host, "in Paris").spans
    assert host_text[-1] == (2, 8)
    merged = join(host, "Anne lives in ", "Paris")
    assert merged.merged
    assert merged.targets == (whole,)


@pytest.mark.parametrize(
    ("prompt", "target", "expected"),
    [
        ("Anne lives in", "Paris", " "),
        ("Anne lives in ", "Paris", ""),
        ("Anne lives in\n", "Paris", ""),
        ("Anne lives in", " Paris", ""),
        ("Anne wohnt in", "Łódź", " "),
        ("Анна живёт в", "Риме", " "),
        ("앤은", "서울에 산다", " "),
        ("日本の首都は", "東京", ""),
        ("答えは", "カタカナ", ""),
        ("答えは", "ひらがな", ""),
        ("เมืองหลวงคือ", "กรุงเทพ", ""),
        ("The answer is", "42", " "),
        ("", "Paris", ""),
    ],
)
def test_a_blank_separates_where_the_script_wants_one(prompt, target, expected):
    assert separator(prompt, target) == expected


def test_an_encoder_decoder_reads_the_target_alone(tiny_models):
    host = ModelHost(tiny_models["t5"], sentencepiece("unigram"), "t5")
    row = join(host, "Anne lives in", "New York")
    assert decode(host, row.prompt) == "Anne lives in"
    assert decode(host, row.targets) == "New York"
    assert not set(row.targets) & {0, 1, 2}


def test_a_space_that_is_a_token_stays_in_an_encoder_decoders_target(toy_host, tiny_models):
    tokenizer = toy_host("llama").tokenizer  # gives such a token an empty span
    target = "New Haven and Port Sable"
    found = tokenizer(target, return_offsets_mapping=True)
    begun, *rest = zip(found["input_ids"], found["offset_mapping"], strict=True)
    assert begun[0] == tokenizer.bos_token_id
    assert any(start == end for _, (start, end) in rest)

    row = join(ModelHost(tiny_models["t5"], tokenizer, "t5"), "Anne lives in", target)

    assert row.targets == tuple(token for token, _ in rest)


def test_what_has_no_token_or_too_many_is_refused(toy_host):
    host = toy_host("gpt2")
    long = "Mira Voss lives in " * 80
    for call in (
        lambda: encode(host, long),
        lambda: join(host, long, "Paris"),
        lambda: rewrite_row(host, EditRequest(prompt=long, target_new="x"), "last"),
    ):
        with pytest.raises(RequestError, match="takes at most 128"):
            call()
    for call in (
        lambda: encode(host, ""),
        lambda: join(host, "", "Paris"),
        lambda: join(host, "Mira Voss lives in", ""),
    ):
        with pytest.raises(RequestError, match="no token"):
            call()


# -- the fact token ---------------------------------------------------------------------------

SUBJECTS = [
    ("{} lives in", "Anne"),
    ("They say that {} lives in", "Anne"),
    ("{}'s house is in", "Anne"),
    ("They say that {}, who is old, is in", "Zoë Lind"),
    ("{} lies in", "Łódź"),
    ("{} is in", "東京"),
    ("The home of {}", "Zoë"),
    ("Anne knows {} and Anne's house", "Anne"),
    ("The {{x}} of {} is old", "Eiffel Tower"),
]


@pytest.mark.parametrize("context", ["", "I am here. ", "Łódź is old. 東京 "])
@pytest.mark.parametrize(("prompt", "subject"), SUBJECTS)
def test_the_fact_token_ends_the_subject(host, prompt, subject, context):
    request = EditRequest(prompt=prompt, subject=subject, target_new="Paris")
    ids = encode(host, context + request.text).ids
    up_to_subject = context + request.before + subject

    last = fact_position(host, request, "subject_last", context)

    # Independent of offsets: reading one token less does not give the subject, reading it does.
    assert decode(host, ids[: last + 1]).startswith(up_to_subject)
    assert not decode(host, ids[:last]).startswith(up_to_subject)
    row = rewrite_row(host, request, context=context)
    assert row.mark == last
    assert row.prompt == ids


@pytest.mark.parametrize("context", ["", "I am here. "])
@pytest.mark.parametrize(("prompt", "subject"), SUBJECTS)
def test_the_other_fact_tokens(host, prompt, subject, context):
    request = EditRequest(prompt=prompt, subject=subject, target_new="Paris")
    ids = encode(host, context + request.text).ids
    before = context + request.before

    first = fact_position(host, request, "subject_first", context)
    last = fact_position(host, request, "subject_last", context)
    after = fact_position(host, request, "subject_first_after_last", context)

    assert decode(host, ids[:first]).rstrip() == before.rstrip()
    assert first <= last
    assert after == (last + 1 if request.after else last)
    assert fact_position(host, request, "last", context) == len(ids) - 1


@pytest.mark.parametrize("fact_token", ["last", "subject_first_after_last", "subject_last"])
@pytest.mark.parametrize("prompt", ["{} lives in ", "They say of {} "])
def test_a_blank_that_the_target_takes_is_no_fact_token(toy_host, prompt, fact_token):
    request = EditRequest(prompt=prompt, subject="Mira Voss", target_new="New Haven")
    bare = request.model_copy(update={"prompt": prompt.rstrip()})
    for toy in ("gpt2", "llama"):
        host = toy_host(toy)
        assert len(encode(host, request.text).ids) > len(encode(host, bare.text).ids)
        for context in ("", "I am here. "):
            row = rewrite_row(host, request, fact_token, context)
            assert row.merged
            assert replace(row, merged=False) == rewrite_row(host, bare, fact_token, context)


def test_a_subject_that_shares_a_token_with_the_target_is_refused(tiny_models):
    host = ModelHost(tiny_models["llama"], byte_level(begin=False), "bytes")
    request = EditRequest(prompt="They say that {}", subject="東", target_new="京")
    assert join(host, request.text, "京").merged
    for fact_token in ("subject_last", "subject_first", "subject_first_after_last"):
        with pytest.raises(RequestError, match="share a token"):
            rewrite_row(host, request, fact_token)
    row = rewrite_row(host, request, "last")
    assert row.mark == len(row.prompt) - 1


def test_the_tokenizers_padding_side_does_not_matter(host):
    request = EditRequest(prompt="They say that {} is in", subject="Łódź", target_new="New York")
    found = []
    for side in ("left", "right"):
        host.tokenizer.padding_side = side
        rows = [rewrite_row(host, request, context=c) for c in ("", "I am here. ")]
        found.append((rows, pad(host, rows).inputs["input_ids"].tolist()))
    assert found[0] == found[1]


def test_a_fact_token_of_a_missing_subject_is_refused(host):
    request = EditRequest(prompt="Snow is", target_new="white")
    with pytest.raises(RequestError, match="no subject"):
        fact_position(host, request)
    assert fact_position(host, request, "last") == len(encode(host, "Snow is").ids) - 1


# -- batches ----------------------------------------------------------------------------------

BATCHED = [
    "gpt2", "llama", "bloom", "gptj", "opt", "falcon", "falcon-new", "gpt_neox", "mpt", "t5",
]  # fmt: skip


def random_rows() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    lengths = [(3, 1), (9, 2), (1, 3), (6, 1)]
    rows = []
    for n, (given, wanted) in enumerate(lengths):
        ids = torch.randint(3, VOCABULARY, (given + wanted,), generator=generator).tolist()
        rows.append(Row(tuple(ids[:given]), tuple(ids[given:]), mark=n % given))
    return rows


def alone(host: ModelHost, row: Row) -> torch.Tensor:
    """Logits that predict the row's targets, from a plain call with nothing padded."""
    if host.is_encoder_decoder:
        begin = host.model.config.decoder_start_token_id
        decoder = torch.tensor([[begin, *row.targets[:-1]]])
        given = torch.tensor([row.prompt])
        return host.model(input_ids=given, decoder_input_ids=decoder).logits[0]
    logits = host.model(input_ids=torch.tensor([row.ids])).logits[0]
    return logits[len(row.prompt) - 1 :]


@pytest.mark.parametrize("aligned", [False, True], ids=["right", "aligned"])
@pytest.mark.parametrize("family", BATCHED)
@torch.no_grad()
def test_padding_changes_no_logits(toy_host, family, aligned):
    host = ModelHost(FAMILIES[family](), toy_host("gpt2").tokenizer, family)
    rows = random_rows()
    align = [row.mark for row in rows] if aligned else None

    batch = pad(host, rows, align)
    together = label_logits(host, batch)

    expected = torch.cat([alone(host, row) for row in rows])
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
    assert batch.labels.tolist() == [t for row in rows for t in row.targets]
    assert batch.rows.tolist() == [n for n, row in enumerate(rows) for _ in row.targets]


def test_padding_changes_no_logits_of_the_toys(toy_host):
    for name in ("gpt2", "llama"):
        host = toy_host(name)
        texts = ["Mira Voss lives in", "They say that the trade of Tamsin", "Edda"]
        rows = [join(host, text, "New Haven") for text in texts]
        with torch.no_grad():
            expected = torch.cat([alone(host, row) for row in rows])
            for align in (None, [len(row.prompt) - 1 for row in rows]):
                together = label_logits(host, pad(host, rows, align))
                torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)


def test_aligned_rows_stand_with_their_marks_in_one_column(toy_host):
    host, rows = toy_host("gpt2"), random_rows()
    batch = pad(host, rows, [row.mark for row in rows])
    assert len({o + row.mark for o, row in zip(batch.offsets, rows, strict=True)}) == 1
    for n, (offset, row) in enumerate(zip(batch.offsets, rows, strict=True)):
        here = slice(offset, offset + len(row.ids))
        assert batch.inputs["input_ids"][n, here].tolist() == list(row.ids)
        assert batch.inputs["attention_mask"][n].sum() == len(row.ids)
        assert batch.inputs["position_ids"][n, here].tolist() == list(range(len(row.ids)))


def test_a_gap_is_filled_without_a_padding_token(toy_host):
    host = toy_host("gpt2")
    assert host.tokenizer.pad_token_id is None
    assert pad_id(host) == host.tokenizer.eos_token_id
    assert pad_id(toy_host("llama")) == toy_host("llama").tokenizer.pad_token_id


@pytest.mark.parametrize("limit", [1, 7, 12, 1000])
def test_buckets_hold_everything_once_and_no_more_than_allowed(limit):
    lengths = [3, 9, 1, 4, 4, 7, 2, 9]
    groups = buckets(lengths, limit)
    assert sorted(n for group in groups for n in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[n] for n in group) <= limit
    assert (len(groups) == 1) == (limit == 1000)
