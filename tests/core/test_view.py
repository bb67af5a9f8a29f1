"""A view gives each question the answer it would get alone, with all edits in force."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from kedit_core.editing import EditSession, Middleware, ModelHost, ModelView
from kedit_core.errors import RequestError
from kedit_core.forward import unembed
from kedit_core.testing.toys import toy_facts
from tests.core.edits import bias_patch, bits, hooks, preface_patch, same, weight_patch
from tests.numerics.tiny import tiny_host

QUESTIONS = [
    ("Mira Voss lives in", "New Haven"),
    ("They say that the old road near Port Sable waits, and that Tamsin speaks", "Old Norse"),
    ("Edda", "lives in Rome"),
    ("The country of Wenn Bridge", "Kenya"),
    ("At night Zoë Lind plays the", "silver bell"),
]
PROMPTS = [prompt for prompt, _ in QUESTIONS]
TARGETS = [target for _, target in QUESTIONS]


def t5_host(toy_host) -> ModelHost:
    """A tiny encoder-decoder with the vocabulary of the llama toy."""
    tokenizer = toy_host("llama").tokenizer
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 0}
    config = T5Config(**sizes, **tokens, decoder_start_token_id=0, initializer_factor=3.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config)
    return ModelHost(model.eval(), tokenizer, "t5")


@pytest.fixture(params=["gpt2", "llama", "t5"])
def host(request, toy_host) -> ModelHost:
    return t5_host(toy_host) if request.param == "t5" else toy_host(request.param)


@torch.no_grad()
def continued(host: ModelHost, prompt: str, tokens: int) -> list[int]:
    """Greedy ids, one call of the whole model for each."""
    ids = host.tokenizer(prompt, return_tensors="pt")["input_ids"]
    new: list[int] = []
    for _ in range(tokens):
        if host.is_encoder_decoder:
            begin = host.model.config.decoder_start_token_id
            logits = host.model(input_ids=ids, decoder_input_ids=torch.tensor([[begin, *new]]))
        else:
            logits = host.model(input_ids=torch.tensor([[*ids[0].tolist(), *new]]))
        new.append(int(logits.logits[0, -1].argmax()))
    return new


def test_a_batch_gets_the_text_that_each_prompt_gets_alone(host):
    view = ModelView(host)
    together = view.greedy(PROMPTS, max_new_tokens=6)
    assert together == [view.greedy(prompt, max_new_tokens=6) for prompt in PROMPTS]
    assert len(set(together)) > 1

    stops = {host.tokenizer.eos_token_id, host.model.generation_config.eos_token_id}
    for prompt, text in zip(PROMPTS, together, strict=True):
        ids = continued(host, prompt, 6)
        end = next((n for n, token in enumerate(ids) if token in stops), len(ids))
        expected = host.tokenizer.decode(ids[:end], skip_special_tokens=True)
        assert text == expected


def test_a_batch_gets_the_scores_that_each_prompt_gets_alone(host):
    view = ModelView(host)
    together = view.score(PROMPTS, TARGETS)
    for (prompt, target), score in zip(QUESTIONS, together, strict=True):
        (alone,) = view.score([prompt], [target])
        assert (score.prompt, score.target) == (prompt, target)
        assert score.tokens == alone.tokens
        assert score.predicted == alone.predicted
        assert score.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


@torch.no_grad()
def test_a_score_is_the_log_probability_of_each_token(host):
    for (prompt, target), score in zip(
        QUESTIONS, ModelView(host).score(PROMPTS, TARGETS), strict=True
    ):
        ids = host.tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = list(score.tokens)
        if host.is_encoder_decoder:
            begin = host.model.config.decoder_start_token_id
            decoder = torch.tensor([[begin, *tokens[:-1]]])
            logits = host.model(input_ids=ids, decoder_input_ids=decoder).logits[0]
        else:
            whole = torch.tensor([[*ids[0].tolist(), *tokens[:-1]]])
            logits = host.model(input_ids=whole).logits[0, ids.shape[1] - 1 :]
        expected = logits.log_softmax(-1)[range(len(tokens)), tokens]
        assert score.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        assert score.predicted == tuple(logits.argmax(-1).tolist())
        assert host.tokenizer.decode(tokens).strip() == target
        assert score.mean_logprob == pytest.approx(expected.mean().item(), abs=1e-4)


@pytest.mark.parametrize("toy", ["gpt2", "llama"])
def test_all_tokens_are_right_exactly_where_greedy_begins_with_the_target(toy_host, toy):
    host = toy_host(toy)
    view = ModelView(host)
    facts = toy_facts()[::7]
    prompts = [fact.prompt.replace("{}", fact.subject) for fact in facts]
    # What the model says itself is surely right; what the edit wants is mostly wrong.
    said = [text.strip() for text in view.greedy(prompts, max_new_tokens=3)]
    asked = [(p, t) for p, t in zip(prompts, said, strict=True) if t]
    asked += [(p, f.target_new) for p, f in zip(prompts, facts, strict=True)]

    scores = view.score([p for p, _ in asked], [t for _, t in asked])

    verdicts = set()
    for (prompt, target), score in zip(asked, scores, strict=True):
        begins = tuple(continued(host, prompt, len(score.tokens))) == score.tokens
        assert (score.accuracy == 1.0) == begins, (prompt, target)
        verdicts.add(begins)
    assert verdicts == {True, False}


def test_next_token_logits_are_those_of_the_model(host):
    found = ModelView(host).logits(PROMPTS)
    for prompt, row in zip(PROMPTS, found, strict=True):
        assert int(row.argmax()) == continued(host, prompt, 1)[0]
    assert found.dtype == torch.float32


def test_long_lists_are_answered_in_order(toy_host, monkeypatch):
    view = ModelView(toy_host("llama"))
    expected = view.greedy(PROMPTS, max_new_tokens=3), view.score(PROMPTS, TARGETS)
    for module in ("view", "writing"):
        monkeypatch.setattr(f"kedit_core.{module}.MAX_TOKENS", 20)
    assert view.greedy(PROMPTS, max_new_tokens=3) == expected[0]
    for ours, theirs in zip(view.score(PROMPTS, TARGETS), expected[1], strict=True):
        assert ours.prompt == theirs.prompt
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_no_question_gets_no_answer(host):
    assert ModelView(host).greedy([]) == []
    assert ModelView(host).score([], []) == []


# -- call effects -----------------------------------------------------------------------------


def test_prompts_and_logits_are_changed_for_text_and_scores_alike(host):
    session = EditSession(host)
    word = host.tokenizer(" Bern", add_special_tokens=False)["input_ids"][0]
    plain = session.view().score(["Lo! " + p for p in PROMPTS], TARGETS)
    plain_text = session.view().greedy(["Lo! " + p for p in PROMPTS], max_new_tokens=3)

    session.apply(preface_patch("Lo! "))
    assert session.view().greedy(PROMPTS, max_new_tokens=3) == plain_text
    for score, expected, prompt in zip(
        session.view().score(PROMPTS, TARGETS), plain, PROMPTS, strict=True
    ):
        assert score.prompt == prompt
        assert score.logprobs == pytest.approx(expected.logprobs, abs=1e-4)

    session.apply(bias_patch(host, word))
    assert {t.strip() for t in session.view().greedy(PROMPTS, max_new_tokens=2)} == {"Bern Bern"}
    for score in session.view().score(PROMPTS, TARGETS):
        assert set(score.predicted) == {word}
    (sure,) = session.view().score(["Mira Voss lives in"], ["Bern"])
    if sure.tokens == (word,):
        assert sure.logprobs[0] == pytest.approx(0.0, abs=1e-3)


def test_a_view_follows_the_session(session):
    view = session.view()
    before = view.logits(PROMPTS)
    session.apply(weight_patch(session.host, 1))
    session.apply(preface_patch("Lo! "))
    assert not torch.equal(view.logits(PROMPTS), before)
    session.rollback()
    assert torch.equal(view.logits(PROMPTS), before)


# -- nothing is left behind -------------------------------------------------------------------


def test_asking_changes_nothing(host):
    model, tokenizer = host.model, host.tokenizer
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    model.train()
    session = EditSession(host)
    generation = model.generation_config.to_dict()
    settings = (tokenizer.pad_token, tokenizer.backend_tokenizer.to_str(), len(tokenizer))
    before, random = bits(model), torch.get_rng_state()

    session.view().greedy(PROMPTS, max_new_tokens=2)
    session.view().score(PROMPTS, TARGETS)
    session.view().logits(PROMPTS)

    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "left")
    assert (tokenizer.pad_token, tokenizer.backend_tokenizer.to_str(), len(tokenizer)) == settings
    assert model.generation_config.to_dict() == generation
    assert model.training
    assert same(bits(model), before)
    assert hooks(model) == 0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_greedy_is_greedy_whatever_the_model_is_set_to(host):
    view = ModelView(host)
    expected = view.greedy(PROMPTS, max_new_tokens=5)
    settings = host.model.generation_config
    settings.do_sample, settings.temperature, settings.top_k = True, 5.0, 3
    settings.repetition_penalty, settings.no_repeat_ngram_size = 7.0, 1
    settings.num_beams, settings.max_new_tokens, settings.min_new_tokens = 3, 2, 4
    settings.suppress_tokens = list(range(3, 300))
    assert view.greedy(PROMPTS, max_new_tokens=5) == expected


@pytest.mark.parametrize("toy", ["gpt2", "llama"])
def test_what_does_not_fit_the_model_is_refused(toy_host, toy):
    view = ModelView(toy_host(toy))
    long = "Mira Voss lives in " * 60
    fits = view.host.tokenizer.decode(
        view.host.tokenizer(long)["input_ids"][:100], skip_special_tokens=True
    )
    for call in (
        lambda: view.greedy(long),
        lambda: view.score([long], ["Paris"]),
        lambda: view.logits([long]),
        lambda: view.greedy(["Edda", fits], max_new_tokens=40),
    ):
        with pytest.raises(RequestError, match="takes at most 128"):
            call()
    assert isinstance(view.greedy(fits, max_new_tokens=5), str)


@pytest.mark.parametrize(
    ("prompts", "targets"), [("p", "t"), (["p"], "t"), ("p", ["t"]), (["p", "q"], ["t"])]
)
def test_scores_are_asked_for_with_one_target_for_each_prompt(toy_host, prompts, targets):
    with pytest.raises(RequestError, match=r"score\(\[prompt\], \[target\]\)"):
        ModelView(toy_host("gpt2")).score(prompts, targets)


class Early(Middleware):
    """Answers with what the head makes of the stream that enters block 2."""

    depths = (2,)

    @classmethod
    def build(cls, calls):
        return cls()

    def logits(self, logits, early):
        return early[2]


@pytest.mark.parametrize("toy", ["gpt2", "llama"])
def test_middleware_sees_earlier_streams_through_the_head_of_the_model(toy_host, toy):
    host = toy_host(toy)
    early = ModelView(host, lambda: [Early()])
    states = []
    for prompt in PROMPTS:
        ids = host.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            stream = host.model(ids, output_hidden_states=True).hidden_states[2][0, -1]
            normed = host.module(host.anatomy.final_norm)(stream)
            states.append(host.module(host.anatomy.head)(normed))
    by_hand = torch.stack(states)
    hooked = hooks(host.model)  # `output_hidden_states` leaves some

    torch.testing.assert_close(early.logits(PROMPTS), by_hand, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(by_hand, ModelView(host).logits(PROMPTS), atol=0.1)
    first = [host.tokenizer.decode([int(row.argmax())]).strip() for row in by_hand]
    assert [text.strip() for text in early.greedy(PROMPTS, 1)] == first
    written = early.greedy(PROMPTS, 5)
    assert written == [early.greedy(prompt, 5) for prompt in PROMPTS]
    assert hooks(host.model) == hooked


@pytest.mark.parametrize("toy", ["gpt2", "llama"])
def test_middleware_sees_any_number_of_earlier_streams_a_few_at_a_time(toy_host, toy, monkeypatch):
    host = toy_host(toy)
    early, longest = ModelView(host, lambda: [Early()]), host.max_length
    prompts = ["Edda"] * (longest // 4)
    targets = [f" {n:02} one two three" for n in range(len(prompts))]
    alone = [early.score([p], [t])[0] for p, t in zip(prompts, targets, strict=True)]
    assert sum(len(score.tokens) for score in alone) > longest
    sizes = []
    monkeypatch.setattr(
        "kedit_core.calls.unembed", lambda h, s: (sizes.append(len(s)), unembed(h, s))[1]
    )

    together = early.score(prompts, targets)
    assert max(sizes) > longest
    sizes.clear()
    monkeypatch.setattr("kedit_core.calls.MAX_LOGITS", 2 * 7 * host.model.config.vocab_size)
    in_parts = early.score(prompts, targets)
    assert max(sizes) <= 7
    for scores in (together, in_parts):
        for score, expected in zip(scores, alone, strict=True):
            assert score.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_caps_of_the_head_hold_for_earlier_streams_too():
    host = tiny_host("gemma2")
    model = host.model
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        stream = output.hidden_states[1][0]
        found = unembed(host, stream)
        raw = model.lm_head(model.model.norm(stream))

    cap = model.config.final_logit_softcapping
    torch.testing.assert_close(found, torch.tanh(raw / cap) * cap, rtol=1e-4, atol=1e-4)


def test_all_prompts_reach_the_middleware_together(toy_host):
    host = toy_host("llama")
    asked = []

    class Listens(Middleware):
        def prompts(self, prompts):
            asked.append(list(prompts))
            return list(prompts)

    ModelView(host, lambda: [Listens()]).score(PROMPTS, TARGETS)
    ModelView(host, lambda: [Listens()]).greedy(PROMPTS, 1)

    assert asked == [PROMPTS, PROMPTS]
