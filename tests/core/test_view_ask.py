"""Questions asked all together get the answers that each gets alone, and no text is too long."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from kedit_core.ask import (
    Continue,
    Converse,
    Diverge,
    Divergence,
    Question,
    Read,
    Sample,
    Score,
    Text,
)
from kedit_core.editing import EditSession, ModelHost, ModelView
from kedit_core.errors import RequestError
from kedit_core.forward import label_logits
from kedit_core.testing.toys import toy_facts
from kedit_core.tokens import Row
from tests.core.edits import bias_patch, bits, hooks, preface_patch, same
from tests.core.families import config_of
from tests.core.test_tokens import sentencepiece
from tests.core.test_view import PROMPTS, QUESTIONS, TARGETS, t5_host

CLOSE = 1e-4  # padding lets float32 sum in another order
LIMIT = 128  # of the two toys; the tiny T5 has none
LONG = "Mira Voss lives in Rome and Edda knows " * 12
CAUSAL = pytest.mark.parametrize("toy", ["gpt2", "llama"])


@pytest.fixture(params=["gpt2", "llama", "t5"])
def host(request, toy_host) -> ModelHost:
    return t5(toy_host) if request.param == "t5" else toy_host(request.param)


def t5(toy_host) -> ModelHost:
    """In float64: its random weights are so large that float32 alone is off by more than CLOSE."""
    host = t5_host(toy_host)
    host.model.double()
    return host


def ids_of(host: ModelHost, text: str) -> list[int]:
    return host.tokenizer(text)["input_ids"]


def prompt_of(host: ModelHost, tokens: int) -> str:
    """A prompt of exactly so many tokens."""
    text = "Edda"
    while len(ids_of(host, text)) < tokens:
        text += " Rome" if len(ids_of(host, text + " Rome")) <= tokens else " a"
    assert len(ids_of(host, text)) == tokens
    return text


@torch.no_grad()
def read_alone(host: ModelHost, given: list[int], tokens: tuple[int, ...]) -> list[float]:
    """Log-probability of each token after the given ones, by one plain call of the model."""
    if host.is_encoder_decoder:
        begin = host.model.config.decoder_start_token_id
        decoder = torch.tensor([[begin, *tokens[:-1]]])
        logits = host.model(input_ids=torch.tensor([given]), decoder_input_ids=decoder).logits[0]
    else:
        whole = torch.tensor([[*given, *tokens[:-1]]])
        logits = host.model(input_ids=whole).logits[0, len(given) - 1 :]
    return logits.log_softmax(-1)[range(len(tokens)), list(tokens)].tolist()


@torch.no_grad()
def written_alone(host: ModelHost, given: list[int], count: int) -> list[int]:
    """The most probable tokens, one plain call of the model for each."""
    new: list[int] = []
    for _ in range(count):
        if host.is_encoder_decoder:
            begin = host.model.config.decoder_start_token_id
            decoder = torch.tensor([[begin, *new]])
            logits = host.model(input_ids=torch.tensor([given]), decoder_input_ids=decoder).logits
        else:
            logits = host.model(input_ids=torch.tensor([[*given, *new]])).logits
        new.append(int(logits[0, -1].argmax()))
    return new


def stops_of(host: ModelHost) -> set[int]:
    return {host.tokenizer.eos_token_id, host.model.generation_config.eos_token_id}


def ask_one(view: ModelView, question: Question) -> Score | Text | Divergence:
    return view.ask([question])[question]


def check_same(found: object, alone: object, question: Question) -> None:
    """Whether two answers are the same but for rounding."""
    if isinstance(alone, Score):
        assert isinstance(found, Score)
        assert found.logprobs == pytest.approx(alone.logprobs, abs=CLOSE), question
        assert abs(found.rank - alone.rank) <= 1, question  # two tokens may be as good as equal
        found = replace(found, logprobs=alone.logprobs, rank=alone.rank)
    assert found == alone, question


def mixed() -> list[Question]:
    """Questions of every kind and length, in no order."""
    long: list[Question] = [
        *(Read(LONG, "Rome"), Read(LONG, "New Haven", stop=True), Diverge(LONG, "Rome")),
        *(Continue(LONG, 3), Continue(LONG, 8), Sample(LONG, 30), Read(LONG, "Rome", "task")),
    ]
    asked: list[Question] = []
    for n, (prompt, target) in enumerate(QUESTIONS[:3]):
        asked += [Read(prompt, target), Continue(prompt, 1 + 3 * n), Sample(prompt, 35, 4, n)]
        asked += [Read(prompt, target, "task"), Continue(prompt, 3, "task")]
        asked += [Read(prompt, target, stop=True), Continue(prompt, 2), Sample(prompt, 35, 4)]
        asked += [Diverge(prompt, target), Read(prompt, "Rome"), long[n]]
    return [*asked, *long]


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_question_of_a_mixed_batch_gets_the_answer_it_gets_alone(host, side):
    host.tokenizer.padding_side = side
    view = ModelView(host)
    questions = mixed()

    together = view.ask(questions)

    assert set(together) == set(questions)
    for question in together:
        check_same(together[question], ask_one(view, question), question)


@pytest.mark.parametrize("pad", ["</s>", "<unk>"], ids=["padded with the end", "padded apart"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_so_does_each_where_words_begin_with_a_mark(kind, side, pad):
    tokenizer = sentencepiece(kind)  # as Llama 2's and T5's
    tokenizer.pad_token, tokenizer.padding_side = pad, side
    assert (tokenizer.pad_token_id == tokenizer.eos_token_id) == (pad == "</s>")
    config = config_of("llama")
    config.vocab_size, config.initializer_range = len(tokenizer), 0.2  # so that it says much
    config.max_position_embeddings = LIMIT
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        view = ModelView(
            ModelHost(AutoModelForCausalLM.from_config(config).eval(), tokenizer, kind)
        )
    questions = mixed()

    together = view.ask(questions)

    for question in questions:
        check_same(together[question], ask_one(view, question), question)
        if isinstance(question, Read) and (question.form, question.stop) == ("bare", False):
            tokens = together[question].tokens
            if tokenizer.unk_token_id not in tokens:
                assert tokenizer.decode(list(tokens)).strip() == question.target
            if not together[question].cut:
                alone = read_alone(view.host, ids_of(view.host, question.prompt), tokens)
                assert together[question].logprobs == pytest.approx(alone, abs=CLOSE)
    said = {a.text for a in together.values() if isinstance(a, Text)}
    assert len(said) > 10


def test_batches_of_any_size_give_the_same(host, monkeypatch):
    expected = ModelView(host).ask(mixed())
    for module in ("view", "writing"):
        monkeypatch.setattr(f"kedit_core.{module}.MAX_TOKENS", 150)
    monkeypatch.setattr("kedit_core.view.MAX_LOGITS", 3 * 528)

    found = ModelView(host).ask(mixed())

    for question, answer in expected.items():
        check_same(found[question], answer, question)


def test_questions_may_come_twice_and_from_an_iterator(host):
    view = ModelView(host)
    questions = [Read(PROMPTS[0], "Rome"), Continue(PROMPTS[0], 2), Read(PROMPTS[0], "Rome")]

    assert set(view.ask(iter(questions))) == set(questions)
    assert view.ask([]) == {}


def test_reading_is_what_score_says(host):
    asked = [Read(prompt, target) for prompt, target in QUESTIONS]
    answers = ModelView(host).ask(asked)

    for question, score in zip(asked, ModelView(host).score(PROMPTS, TARGETS), strict=True):
        check_same(answers[question], score, question)


# -- targets that share a prompt -----------------------------------------------------------------


def test_targets_that_differ_in_the_last_token_get_what_they_get_alone(host, monkeypatch):
    view = ModelView(host)
    targets = [*sorted({fact.answer for fact in toy_facts()})[::4], "Quox", "Quok", "Quot", "Quob"]
    questions = [Read(prompt, target) for target in targets for prompt in PROMPTS[:2]]
    alone = {question: ask_one(view, question) for question in questions}
    read: list[int] = []

    def spy(host, batch):
        read.append(len(batch.offsets))
        return label_logits(host, batch)

    monkeypatch.setattr("kedit_core.view.label_logits", spy)
    together = view.ask(questions)

    for question in questions:
        check_same(together[question], alone[question], question)
    # The last token is only predicted, so all that begin alike are read once.
    beginnings = Counter((q.prompt, a.tokens[:-1]) for q, a in together.items())
    assert sum(read) == len(beginnings) < len(questions)
    assert max(count for (_, tokens), count in beginnings.items() if tokens) >= 3


def test_the_rank_counts_the_tokens_that_are_more_probable(host):
    asked = [Read(PROMPTS[0], target) for target in ("Rome", "New Haven", "lives", "the")]

    for question, score in ModelView(host).ask(asked).items():
        first = score.tokens[0]
        logits = ModelView(host).logits([question.prompt])[0]
        assert score.rank == int((logits > logits[first]).sum())
        assert (score.rank == 0) == (score.predicted[0] == first)


@CAUSAL
def test_a_token_of_a_model_that_says_no_numbers_has_the_last_rank(toy_host, toy):
    host = toy_host(toy)
    with torch.no_grad():
        host.module(host.anatomy.head).weight.fill_(torch.nan)

    score = ask_one(ModelView(host), Read(PROMPTS[0], "Rome"))

    assert score.rank == host.model.config.vocab_size
    assert all(map(math.isnan, score.logprobs))


# -- writing -----------------------------------------------------------------------------------


def test_a_prompt_is_continued_as_far_as_each_question_wants(host):
    expected = {prompt: written_alone(host, ids_of(host, prompt), 20) for prompt in PROMPTS}
    # What the model says fifth ends its texts here, so that some end and some run out of tokens.
    host.model.generation_config.eos_token_id = expected[PROMPTS[0]][4]
    questions = [Continue(prompt, length) for prompt in PROMPTS for length in (7, 1, 20, 3)]

    answers = ModelView(host).ask(questions)

    for question in questions:
        new = expected[question.prompt][: question.new_tokens]
        end = next((n for n, token in enumerate(new) if token in stops_of(host)), len(new))
        answer = answers[question]
        assert answer.tokens == tuple(new[:end])
        assert answer.ended == (end < len(new))
        assert answer.room == question.new_tokens
        assert not answer.cut
        text = host.tokenizer.decode(new[:end], skip_special_tokens=True)
        assert answer.text.strip() == text.strip()
    assert {answer.ended for answer in answers.values()} == {True, False}


@CAUSAL
def test_a_prompt_is_not_cut_for_what_another_question_wants_of_it(toy_host, toy):
    view = ModelView(toy_host(toy))
    prompt = prompt_of(view.host, 120)
    short, long = Continue(prompt, 4), Continue(prompt, 20)

    answers = view.ask([long, short])

    assert (answers[short].cut, answers[long].cut) == (False, True)
    given = ids_of(view.host, prompt)
    assert answers[short].tokens == tuple(written_alone(view.host, given, 4))
    assert answers[short] == ask_one(view, short)
    assert answers[long] == ask_one(view, long)


def test_reading_to_the_end_reads_the_end_token_too(host):
    for prompt, target in QUESTIONS:
        asked = [Read(prompt, target), Read(prompt, target, stop=True)]
        answers = ModelView(host).ask(asked)
        plain, stopped = (answers[question] for question in asked)

        end = host.tokenizer.eos_token_id
        assert stopped.tokens == (*plain.tokens, end)
        assert stopped.logprobs[:-1] == pytest.approx(plain.logprobs, abs=CLOSE)
        alone = read_alone(host, ids_of(host, prompt), stopped.tokens)
        assert stopped.logprobs == pytest.approx(alone, abs=CLOSE)


@CAUSAL
def test_an_exact_answer_follows_as_it_is_written(toy_host, toy):
    host = toy_host(toy)
    given = ids_of(host, "Edda lives in Rome")

    exact = ask_one(ModelView(host), Read("Edda lives in Rome", ", and", exact=True))

    assert [*given, *exact.tokens] == ids_of(host, "Edda lives in Rome, and")
    assert exact.logprobs == pytest.approx(read_alone(host, given, exact.tokens), abs=CLOSE)


@CAUSAL
def test_rows_are_read_as_they_are(toy_host, toy):
    host = toy_host(toy)
    long = ids_of(host, prompt_of(host, 130))
    rows = [Row(tuple(ids[:-4]), tuple(ids[-4:])) for ids in (long[:9], long)]
    session = EditSession(host)
    session.apply(preface_patch("Never. "))  # of prompts, and there is none here

    whole, cut = session.view().read(rows)

    assert whole.logprobs == pytest.approx(read_alone(host, long[:5], long[5:9]), abs=CLOSE)
    head = long[:1] if long[0] in host.tokenizer.all_special_ids else []
    kept = [*head, *long[len(head) - LIMIT - 1 : -4]]  # the last token of all is never read
    assert cut.logprobs == pytest.approx(read_alone(host, kept, long[-4:]), abs=CLOSE)
    assert (whole.cut, cut.cut) == (False, True)


def test_the_end_token_is_the_models_where_the_tokenizer_has_none(toy_host):
    host = toy_host("gpt2")
    host.tokenizer.eos_token = None
    host.model.generation_config.eos_token_id = [9, 7]

    score = ask_one(ModelView(host), Read(PROMPTS[0], "Rome", stop=True))

    assert score.tokens[-1] == 7


def test_without_an_end_token_there_is_none_to_read(toy_host):
    host = toy_host("gpt2")
    host.tokenizer.eos_token = None
    host.model.generation_config.eos_token_id = None

    with pytest.raises(RequestError, match=r"toy-gpt2 has no end-of-text token to read\."):
        ModelView(host).ask([Read(PROMPTS[0], "Rome", stop=True)])


# -- sampling ----------------------------------------------------------------------------------


def test_seeds_and_prompts_decide_what_is_drawn(host):
    view = ModelView(host)
    questions = [Sample(prompt, 40, seed=seed) for prompt in PROMPTS for seed in range(4)]

    answers = view.ask(questions)

    assert view.ask(reversed(questions)) == answers
    for prompt in PROMPTS:
        assert len({answers[q].tokens for q in questions if q.prompt == prompt}) > 2


def test_text_and_prompt_are_as_long_as_wanted_together(host):
    session = EditSession(host)
    for end in stops_of(host):
        session.apply(bias_patch(host, end, amount=-1000.0))  # so that no text ends by itself
    questions = [Sample(prompt, length) for prompt in PROMPTS for length in (35, 50)]

    for question, answer in session.view().ask(questions).items():
        assert len(ids_of(host, question.prompt)) + len(answer.tokens) == question.length
        assert answer.room == len(answer.tokens)
        assert not answer.ended
        assert not answer.cut


def test_a_text_may_end_before(toy_host):
    host = toy_host("gpt2")
    questions = [Sample(prompt, 60, seed=seed) for prompt in PROMPTS for seed in range(3)]

    answers = [a for a in ModelView(host).ask(questions).values() if a.ended]

    assert answers
    for answer in answers:
        assert len(ids_of(host, answer.prompt)) + len(answer.tokens) < 60
        assert len(ids_of(host, answer.prompt)) + answer.room == 60
        assert not set(answer.tokens) & stops_of(host)


def test_one_candidate_is_greedy(host):
    greedy = {prompt: Continue(prompt, 36 - len(ids_of(host, prompt))) for prompt in PROMPTS}
    drawn = {prompt: Sample(prompt, 36, top_k=1) for prompt in PROMPTS}

    answers = ModelView(host).ask([*drawn.values(), *greedy.values()])

    for prompt in PROMPTS:
        assert answers[drawn[prompt]] == answers[greedy[prompt]]


def test_tokens_are_drawn_as_often_as_they_are_probable(toy_host):
    view = ModelView(toy_host("gpt2"))
    prompt, draws, candidates = "The country of", 600, 3
    length = len(ids_of(view.host, prompt)) + 1
    questions = [Sample(prompt, length, candidates, seed) for seed in range(draws)]

    drawn = Counter(answer.tokens for answer in view.ask(questions).values())

    best = view.logits([prompt])[0].topk(candidates)
    shares = dict(zip(best.indices.tolist(), best.values.softmax(0).tolist(), strict=True))
    assert {tokens[0] for tokens in drawn if tokens} <= set(shares)
    for token, share in shares.items():
        spread = 4 * math.sqrt(draws * share * (1 - share))  # one time in 16000 beyond it
        assert drawn[(token,)] == pytest.approx(draws * share, abs=spread + 1)


def test_prompts_as_long_as_the_sample_get_one_token(host):
    prompt = prompt_of(host, 40)
    whole, longer = Sample(prompt, 40, top_k=1), Sample(prompt, 20, top_k=1)

    answers = ModelView(host).ask([whole, longer, Sample("Edda", 20)])

    assert answers[whole].tokens == tuple(written_alone(host, ids_of(host, prompt), 1))
    assert answers[longer] == answers[whole]
    assert not answers[longer].cut


@CAUSAL
@pytest.mark.parametrize("length", [20, 100, LIMIT])
def test_prompts_of_all_lengths_are_sampled_together_within_what_the_model_takes(
    toy_host, toy, length
):
    host = toy_host(toy)
    view = ModelView(host)
    prompts = [prompt_of(host, n) for n in (6, 7, 60, 98, 127, 128)]
    questions = [Sample(prompt, length) for prompt in prompts]
    alone = {question: ask_one(view, question) for question in questions}
    widths: list[int] = []

    def note(module, args, kwargs):
        before = kwargs.get("past_key_values")
        widths.append(kwargs["input_ids"].shape[1] + (before.get_seq_length() if before else 0))

    host.model.register_forward_pre_hook(note, with_kwargs=True)

    assert view.ask(questions) == alone
    assert max(widths) <= LIMIT


@CAUSAL
def test_a_sample_longer_than_the_model_takes_is_refused(toy_host, toy):
    view = ModelView(toy_host(toy))

    with pytest.raises(RequestError, match=r"sample of 129 tokens .* takes at most 128\."):
        view.ask([Sample("Edda", LIMIT + 1)])
    assert isinstance(ask_one(view, Sample("Edda", LIMIT)), Text)


# -- what is too long --------------------------------------------------------------------------


def kept_of(host: ModelHost, prompt: str, room: int) -> list[int]:
    """The prompt's tokens with its beginning left out, but for the special one before it."""
    ids = ids_of(host, prompt)
    head = [token for token in ids[:1] if token == host.tokenizer.bos_token_id]
    return [*head, *ids[len(ids) - (room - len(head)) :]]


@CAUSAL
@pytest.mark.parametrize("target", ["Rome", "New Haven, they say"])
def test_a_prompt_that_is_too_long_loses_its_beginning_when_read(toy_host, toy, target):
    host = toy_host(toy)
    question = Read(LONG.strip(), target)

    score = ask_one(ModelView(host), question)

    room = LIMIT - len(score.tokens) + 1  # the last token is never read
    given = kept_of(host, question.prompt, room)
    assert len(given) == room
    assert (given[0] == host.tokenizer.bos_token_id) == (toy == "llama")
    assert score.logprobs == pytest.approx(read_alone(host, given, score.tokens), abs=CLOSE)
    assert score.cut
    assert host.tokenizer.decode(score.tokens).strip() == target


@CAUSAL
def test_a_prompt_that_is_too_long_loses_its_beginning_when_continued(toy_host, toy):
    host = toy_host(toy)
    prompt = LONG.strip()

    answer = ask_one(ModelView(host), Continue(prompt, 9))

    expected = written_alone(host, kept_of(host, prompt, LIMIT - 8), 9)
    end = next((n for n, token in enumerate(expected) if token in stops_of(host)), 9)
    assert answer.tokens == tuple(expected[:end])
    text = host.tokenizer.decode(expected[:end], skip_special_tokens=True)
    assert answer.text.strip() == text.strip()
    assert answer.cut


@CAUSAL
def test_nothing_is_cut_that_just_fits(toy_host, toy):
    host = toy_host(toy)
    view = ModelView(host)
    room = LIMIT - len(ask_one(view, Read("Edda", "Rome", stop=True)).tokens) + 1
    for tokens, cut in ((room - 1, False), (room, False), (room + 1, True)):
        prompt = prompt_of(host, tokens)
        assert ask_one(view, Read(prompt, "Rome", stop=True)).cut == cut
    for tokens, cut in ((LIMIT - 4, False), (LIMIT - 3, True)):
        assert ask_one(view, Continue(prompt_of(host, tokens), 5)).cut == cut
    for tokens, cut in ((LIMIT, False), (LIMIT + 1, True)):
        assert ask_one(view, Sample(prompt_of(host, tokens), 100)).cut == cut


@CAUSAL
def test_an_answer_that_leaves_no_room_for_a_prompt_is_refused(toy_host, toy):
    view = ModelView(toy_host(toy))
    for question in (
        Read("Edda", "Rome " * 200),
        Diverge("Edda", "Rome " * 200),
        Continue("Edda", LIMIT + 1),
    ):
        with pytest.raises(RequestError, match=r"leaves no room for its prompt: .* at most 128\."):
            view.distributions([question]) if isinstance(question, Diverge) else view.ask(
                [question]
            )


def test_prompt_and_target_of_an_encoder_decoder_are_too_long_each_by_itself(toy_host):
    host = t5(toy_host)
    host.model.config.max_position_embeddings = 16
    view = ModelView(host)
    prompt, target = prompt_of(host, 30), "Rome Rome Rome Rome"

    score = ask_one(view, Read(prompt, target))
    text = ask_one(view, Continue(prompt, 16))

    given = kept_of(host, prompt, 16)
    assert score.logprobs == pytest.approx(read_alone(host, given, score.tokens), abs=CLOSE)
    assert text.tokens == tuple(written_alone(host, given, 16))[: len(text.tokens)]
    assert score.cut
    assert text.cut
    for question in (Read("Edda", "Rome " * 17), Continue("Edda", 17), Converse(("Edda",), 17)):
        with pytest.raises(RequestError, match=r"leaves no room .* at most 16\."):
            view.ask([question])


@pytest.mark.parametrize("question", [Read("", "Rome"), Read("Edda", ""), Continue("", 3)])
def test_a_text_without_a_token_is_refused(toy_host, question):
    with pytest.raises(RequestError, match="no token"):
        ModelView(toy_host("gpt2")).ask([question])


# -- asking as people do -------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}[{{ turn['role'] }}]\n{{ turn['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def test_without_a_chat_template_a_question_is_put_as_an_instruction(host):
    view = ModelView(host)
    for prompt in (PROMPTS[0], "The set {x} of {} is"):
        text = f"Please answer the question:\n\nQ: {prompt}\nA:"
        score = ask_one(view, Read(prompt, "Rome", "task"))
        written = ask_one(view, Continue(prompt, 6, "task"))

        (expected,) = view.score([text], ["Rome"])
        assert score.logprobs == pytest.approx(expected.logprobs, abs=CLOSE)
        assert score.prompt == written.prompt == prompt
        assert written.text == view.greedy(text, max_new_tokens=6)


def test_a_chat_template_is_used_with_one_begin_token(host):
    host.tokenizer.chat_template = TEMPLATE
    begin = host.tokenizer.bos_token or ""
    view = ModelView(host)
    for prompt, target in QUESTIONS[:1] + QUESTIONS[2:]:
        score = ask_one(view, Read(prompt, target, "task"))
        written = ask_one(view, Continue(prompt, 6, "task"))

        text = f"{begin}[user]\n{prompt}\n[assistant]\n"
        given = host.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert given.count(host.tokenizer.bos_token_id) == (1 if begin else 0)
        alone = read_alone(host, given, score.tokens)
        assert score.logprobs == pytest.approx(alone, abs=CLOSE)
        assert host.tokenizer.decode(score.tokens).strip() == target
        assert written.tokens == tuple(written_alone(host, given, 6))[: len(written.tokens)]


@CAUSAL
def test_a_conversation_goes_on_from_the_models_own_replies(toy_host, toy):
    host = toy_host(toy)
    host.tokenizer.chat_template = TEMPLATE
    view = ModelView(host)
    turns = ("Where does Mira Voss live?", "Are you sure?", "Is it Rome?")

    # The longest first: what it rests on is asked before it all the same.
    found = view.ask([Converse(turns[:n], 4) for n in (3, 1, 2)])

    begin = host.tokenizer.bos_token or ""
    text = f"{begin}[user]\n{turns[0]}\n[assistant]\n"
    for n, turn in enumerate(turns, 1):
        given = host.tokenizer(text, add_special_tokens=False)["input_ids"]
        reply = found[Converse(turns[:n], 4)]
        assert reply.tokens == tuple(written_alone(host, given, 4))[: len(reply.tokens)]
        assert reply.prompt == turn
        if n < len(turns):
            text += f"{reply.text}\n[user]\n{turns[n]}\n[assistant]\n"


def test_a_conversation_without_a_chat_template_keeps_the_first_line_of_a_reply(host, monkeypatch):
    view = ModelView(host)
    lines = iter(["  Rome.\nQ: And", " Yes", " No"])
    asked = []

    def written(host, calls, rows, new_tokens):
        asked.extend(host.tokenizer.decode(r.prompt, skip_special_tokens=True) for r in rows)
        return [(ids_of(host, next(lines)), False) for _ in rows]

    monkeypatch.setattr("kedit_core.view.write_greedily", written)
    view.ask([Converse(("Where?", "Sure?", "Really?"), 9)])

    start = "Please answer the question:\n\nQ: Where?\nA:"
    goes_on = f"{start} Rome.\n\nQ: Sure?\nA:"
    assert asked == [start, goes_on, f"{goes_on} Yes\n\nQ: Really?\nA:"]


def test_a_begin_token_that_only_the_template_puts_is_kept(toy_host):
    host = toy_host("gpt2")
    host.tokenizer.bos_token = "<|endoftext|>"
    assert ids_of(host, "Edda")[0] != host.tokenizer.bos_token_id
    host.tokenizer.chat_template = TEMPLATE

    score = ask_one(ModelView(host), Read("Edda", "Rome", "task"))

    text = "<|endoftext|>[user]\nEdda\n[assistant]\n"
    given = host.tokenizer(text)["input_ids"]
    assert given[0] == host.tokenizer.bos_token_id
    assert score.logprobs == pytest.approx(read_alone(host, given, score.tokens), abs=CLOSE)


def test_a_begin_token_that_only_the_tokenizer_puts_is_kept(toy_host):
    host = toy_host("llama")
    host.tokenizer.chat_template = TEMPLATE.removeprefix("{{ bos_token }}")

    score = ask_one(ModelView(host), Read("Edda", "Rome", "task"))

    given = ids_of(host, "[user]\nEdda\n[assistant]\n")
    assert given[0] == host.tokenizer.bos_token_id
    assert score.logprobs == pytest.approx(read_alone(host, given, score.tokens), abs=CLOSE)


@CAUSAL
@pytest.mark.parametrize("target", ["Rome", "New Haven"])
def test_no_space_stands_between_a_chat_template_and_the_target(toy_host, toy, target):
    host = toy_host(toy)
    host.tokenizer.chat_template = "[INST] {{ messages[0].content }} [/INST]"
    view = ModelView(host)

    score = ask_one(view, Read("Edda", target, "task"))

    assert score == replace(
        ask_one(view, Read("[INST] Edda [/INST]", target, exact=True)), prompt="Edda"
    )
    assert host.tokenizer.decode(score.tokens).endswith(target)
    assert not host.tokenizer.decode(score.tokens).startswith(" ")


def test_a_chat_template_changes_no_bare_question(host):
    plain = ModelView(host).ask([Read(*QUESTIONS[0]), Continue(PROMPTS[0], 4)])
    host.tokenizer.chat_template = TEMPLATE

    found = ModelView(host).ask(list(plain))

    for question, answer in plain.items():
        check_same(found[question], answer, question)


# -- edits of calls ------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["instruction", "chat"])
def test_edits_of_prompts_and_logits_count_in_every_question(host, template):
    host.tokenizer.chat_template = template
    session = EditSession(host)
    word = host.tokenizer(" Bern", add_special_tokens=False)["input_ids"][0]

    def asked(before: str) -> list[Question]:
        prompt = before + PROMPTS[0]
        return [
            *(Read(prompt, "Rome"), Read(prompt, "Rome", "task"), Continue(prompt, 3)),
            *(Continue(prompt, 3, "task"), Diverge(prompt, "Rome")),
        ]

    plain = session.view().ask(asked("Lo! "))
    session.apply(preface_patch("Lo! "))
    prefaced = session.view().ask(asked(""))
    for question, same_question in zip(asked(""), asked("Lo! "), strict=True):
        mine, theirs = prefaced[question], plain[same_question]
        if isinstance(mine, Score):
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=CLOSE)
        elif isinstance(mine, Text):
            assert mine.tokens == theirs.tokens

    session.apply(bias_patch(host, word))
    questions = [*asked(""), Sample(PROMPTS[0], 30, 5)]
    for answer in session.view().ask(questions).values():
        if isinstance(answer, Score):
            assert set(answer.predicted) == {word}
        elif isinstance(answer, Text):
            assert set(answer.tokens) == {word}


# -- distributions -------------------------------------------------------------------------------


def test_distributions_sum_to_one_and_are_those_that_score_reads(host):
    view = ModelView(host)
    asked = [Diverge(prompt, target) for prompt, target in QUESTIONS]

    found = view.distributions(asked)

    for question, logprobs in zip(asked, found, strict=True):
        (score,) = view.score([question.prompt], [question.target])
        assert logprobs.shape == (len(score.tokens), host.model.config.vocab_size)
        assert logprobs.dtype == torch.float32
        torch.testing.assert_close(logprobs.exp().sum(1), torch.ones(len(logprobs)))
        read = logprobs[range(len(score.tokens)), list(score.tokens)]
        assert read.tolist() == pytest.approx(score.logprobs, abs=CLOSE)
        assert tuple(logprobs.argmax(1).tolist()) == score.predicted


def test_distributions_after_a_cut_prompt_are_those_that_are_read(host):
    (logprobs,) = ModelView(host).distributions([Diverge(LONG, "New Haven")])

    score = ask_one(ModelView(host), Read(LONG, "New Haven"))
    read = logprobs[range(len(score.tokens)), list(score.tokens)]
    assert read.tolist() == pytest.approx(score.logprobs, abs=CLOSE)


def test_no_question_has_no_distribution(host):
    assert ModelView(host).distributions([]) == []
    assert ModelView(host).logits([]).shape == (0, host.model.config.vocab_size)


def test_the_unedited_model_does_not_diverge_from_itself(host):
    question, view = Diverge(*QUESTIONS[0]), ModelView(host)
    (logprobs,) = view.distributions([question])
    assert ask_one(view, question) == Divergence(0.0, len(logprobs))


# -- nothing is left behind ----------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["instruction", "chat"])
def test_asking_changes_nothing(host, template):
    model, tokenizer = host.model, host.tokenizer
    tokenizer.padding_side, tokenizer.chat_template = "right", template
    model.train()
    generation = model.generation_config.to_dict()
    settings = (tokenizer.pad_token, tokenizer.backend_tokenizer.to_str(), len(tokenizer))
    before, random = bits(model), torch.get_rng_state()

    ModelView(host).ask(mixed())
    ModelView(host).distributions([Diverge(LONG, "Rome")])

    assert (tokenizer.padding_side, tokenizer.chat_template) == ("right", template)
    assert (tokenizer.pad_token, tokenizer.backend_tokenizer.to_str(), len(tokenizer)) == settings
    assert model.generation_config.to_dict() == generation
    assert model.training
    assert same(bits(model), before)
    assert hooks(model) == 0
    assert torch.equal(torch.get_rng_state(), random)
