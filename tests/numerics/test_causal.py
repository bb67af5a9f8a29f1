"""Causal tracing: closed cases, and the fast way against one run per state."""

from __future__ import annotations

import math

import pytest
import torch

from kedit_core.errors import ModelError, RequestError
from kedit_core.numerics import restore
from kedit_core.numerics.causal import (
    KINDS,
    PLACES,
    TraceResult,
    average,
    noise_level,
    trace,
    windows,
)
from kedit_core.numerics.restore import Corruption
from kedit_core.numerics.states import embedding_scale, embeddings
from kedit_core.testing.effects import Shift
from kedit_core.testing.toys import toy_facts
from kedit_core.tokens import encode
from tests.core.families import BLOCKS, HIDDEN
from tests.numerics.tiny import tiny_host

PROMPT, SUBJECT = "xy Abc lies in", "Abc"  # a token for each character, the space for itself
SPAN, LENGTH = (3, 6), 14


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def traced(host, *, level=1.0, samples=3, window=2, **options):
    return trace(
        host, PROMPT, SUBJECT, generator=seeded(), level=level, samples=samples, window=window,
        **options,
    )  # fmt: skip


def corrupted(host, samples=3):
    return Corruption(host, encode(host, PROMPT).ids, SPAN, 1.0, samples, seeded())


@pytest.fixture
def fast_only(monkeypatch):
    """A trace that falls back to the plain way fails."""

    def agree(self, kind, spans, found):
        assert own(self, kind, spans, found)
        return True

    own = Corruption._agrees
    monkeypatch.setattr(Corruption, "_agrees", agree)


# bloom adds the stream inside its parts, falcon adds in place and mpt has no row per position bias.
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "bloom", "falcon", "mpt"])
def test_fast_way_gives_the_numbers_of_one_run_per_state(family, fast_only):
    host = tiny_host(family)

    for fast, plain in zip(traced(host), traced(host, plain=True), strict=True):
        assert (fast.kind, fast.high, fast.low) == (plain.kind, plain.high, plain.low)
        # Float32 sums in another order.
        torch.testing.assert_close(fast.scores, plain.scores, rtol=1e-4, atol=1e-6)
        assert plain.effects.abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_in_float64_the_fast_way_is_one_run_per_state_to_its_rounding(family, fast_only):
    host = tiny_host(family, torch.float64)

    for fast, plain in zip(traced(host), traced(host, plain=True), strict=True):
        assert fast.scores.dtype == torch.float64
        torch.testing.assert_close(fast.scores, plain.scores, rtol=1e-10, atol=1e-13)


def test_fast_way_on_trained_toys(host, fast_only):
    fact = next(fact for fact in toy_facts() if not fact.prompt.endswith("{}"))
    asked = (host, fact.prompt, fact.subject, fact.answer)

    fast, plain = (
        trace(*asked, generator=seeded(), samples=2, window=3, plain=way) for way in (False, True)
    )

    for ours, theirs in zip(fast, plain, strict=True):
        assert ours.is_expected
        assert ours.total_effect > 0.1
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-3, atol=1e-5)


def test_small_batches_and_no_cache_give_the_same(monkeypatch):
    host = tiny_host("llama")
    whole = traced(host)
    spans = windows(BLOCKS, 2)

    monkeypatch.setattr(restore, "MAX_TOKENS", 1)
    for result in traced(host):
        expected = next(r for r in whole if r.kind == result.kind)
        torch.testing.assert_close(result.scores, expected.scores, rtol=1e-4, atol=1e-6)
    uncached = corrupted(host)._fast_scores("mlp", spans, lambda: None, cached=False)
    torch.testing.assert_close(uncached.mean(-1), whole[1].scores, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_states_are_restored_as_by_hooks_written_out(host):
    """An independent computation of one score, on a bare transformers model."""
    fact = next(fact for fact in toy_facts() if not fact.prompt.endswith("{}"))
    (result,) = trace(
        host, fact.prompt, fact.subject, generator=seeded(), kinds=["block"], samples=2, level=0.5
    )
    ids = torch.tensor([encode(host, result.prompt).ids])
    (start, end), layer, model = result.subject, 1, host.model
    noise = 0.5 * torch.randn(2, end - start, host.anatomy.hidden_size, generator=seeded())
    clean = model(ids, output_hidden_states=True)
    states, answer = clean.hidden_states[layer + 1], clean.logits[0, -1].argmax()
    block = host.module(host.blocks[layer].path)

    def hide(module, args, output):
        output = output.clone()
        output[:, start:end] += noise
        return output

    def put_back(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[:, end - 1] = states[0, end - 1]

    model.get_input_embeddings().register_forward_hook(hide)
    low = model(ids.repeat(2, 1)).logits[:, -1].softmax(-1)
    block.register_forward_hook(put_back)
    restored = model(ids.repeat(2, 1)).logits[:, -1].softmax(-1)
    assert result.low == pytest.approx(float(low[:, answer].mean()), rel=1e-3)
    expected = float(restored[:, answer].mean())
    assert float(result.scores[layer, end - 1]) == pytest.approx(expected, rel=1e-3)
    assert expected != pytest.approx(result.low, rel=0.1)


def test_restoring_everything_gives_the_clean_score_and_nothing_the_corrupted_one(host):
    fact = toy_facts()[0]
    text = fact.prompt.replace("{}", fact.subject)
    ids = encode(host, text).ids
    (start, end) = trace(
        host, fact.prompt, fact.subject, generator=seeded(), kinds=["block"], samples=1
    )[0].subject
    found = Corruption(host, ids, (start, end), 1.0, 3, seeded())

    for layer in range(len(host.blocks)):
        everywhere = found.score("block", [layer], range(len(ids)))
        assert everywhere == pytest.approx(found.high, abs=1e-5)
    assert found.score("block", [], []) == pytest.approx(found.low, abs=1e-6)
    assert found.low < found.high


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_ends_of_the_map(family):
    for result in traced(tiny_host(family)):
        assert result.scores.shape == (BLOCKS, LENGTH)
        assert (result.subject, len(result.tokens)) == (SPAN, LENGTH)
        # Nothing reaches the tokens before the subject; behind the last block nothing mixes.
        assert torch.allclose(result.scores[:, : SPAN[0]], torch.tensor(result.low))
        if result.kind == "block":
            assert torch.allclose(result.scores[-1, :-1], torch.tensor(result.low))
            assert float(result.scores[-1, -1]) == pytest.approx(result.high, abs=1e-6)


def test_all_restorations_see_the_same_noise():
    host = tiny_host("llama")
    seen = []

    def note(module, args):
        if args[0].shape[:2] == (3, LENGTH):
            seen.append(args[0].clone())

    host.module(host.blocks[0].path).register_forward_pre_hook(note)
    traced(host, kinds=["block", "mlp"], plain=True)

    assert len(seen) == 1 + 2 * BLOCKS * LENGTH
    assert all(torch.equal(states, seen[0]) for states in seen)
    assert not torch.equal(seen[0][0], seen[0][1])


def test_same_generator_same_trace_and_another_seed_another():
    host = tiny_host("gpt2")
    first, again = traced(host)[0], traced(host)[0]
    other = trace(host, PROMPT, SUBJECT, generator=seeded(1), level=1.0, samples=3)[0]

    assert torch.equal(first.scores, again.scores)
    assert first.high == other.high
    assert first.low != other.low


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gemma3_text", "granite"])
def test_noise_has_its_level_where_embeddings_enter_the_first_block(family):
    host = tiny_host(family)
    if family == "granite":
        host.model.model.embedding_multiplier = 12.0
    entering = []
    host.module(host.blocks[0].path).register_forward_pre_hook(
        lambda m, args: entering.append(args[0])
    )
    Corruption(host, encode(host, PROMPT).ids, SPAN, 0.7, 400, seeded())

    clean, noisy = (next(x for x in entering if len(x) == rows) for rows in (1, 400))
    added = noisy - clean
    # 38 400 numbers: the standard error of their standard deviation is 0.4 %.
    assert float(added[:, slice(*SPAN)].std()) == pytest.approx(0.7, rel=0.02)
    assert not added[:, : SPAN[0]].any()
    assert not added[:, SPAN[1] :].any()


def test_level_is_three_times_the_deviation_of_all_subjects_embeddings():
    host, scale = tiny_host("granite"), 12.0
    host.model.model.embedding_multiplier = scale
    facts = [(PROMPT, SUBJECT), ("{} is", "Qrs")]

    ids = [encode(host, text).ids for text in (PROMPT, "Qrs is")]
    subjects = torch.cat([embeddings(host, ids[0])[3:6], embeddings(host, ids[1])[:3]])
    assert embedding_scale(host, ids[0]) == pytest.approx(scale, rel=1e-2)
    assert noise_level(host, facts) == pytest.approx(3 * scale * float(subjects.std()), rel=1e-2)
    assert trace(host, PROMPT, SUBJECT, generator=seeded(), samples=1)[0].level == pytest.approx(
        noise_level(host, facts[:1])
    )


def test_windows_are_centred_and_cut_at_the_ends():
    assert windows(4, 1) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert windows(5, 3) == [(0, 2), (0, 3), (1, 4), (2, 5), (3, 5)]
    assert windows(30, 10)[0] == (0, 5)
    assert windows(30, 10)[15] == (10, 20)
    assert windows(30, 10)[29] == (24, 30)
    assert windows(3, 10) == [(0, 3)] * 3


def test_a_window_over_all_layers_is_one_number_per_token():
    for result in traced(tiny_host("llama"), window=10, kinds=["mlp", "attn"]):
        spread = result.scores.max(0).values - result.scores.min(0).values
        assert spread.max() < 1e-6
        assert result.effects.abs().max() > 1e-3


def test_model_is_left_without_hooks_and_replaced_forwards(host):
    fact = toy_facts()[0]
    weights = {name: tensor.clone() for name, tensor in host.model.state_dict().items()}

    trace(host, fact.prompt, fact.subject, generator=seeded(), samples=1)

    for module in host.model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(torch.equal(weights[n], t) for n, t in host.model.state_dict().items())


def test_model_that_cannot_be_entered_in_between_is_run_whole(caplog):
    host = tiny_host("llama")
    inner = host.model.model
    forward = inner.forward

    def reads_block_0(*args, **kwargs):
        seen = []
        handle = inner.layers[0].mlp.register_forward_hook(lambda m, a, out: seen.append(out))
        try:
            output = forward(*args, **kwargs)
        finally:
            handle.remove()
        output.last_hidden_state = output.last_hidden_state + seen[0].mean()
        return output

    inner.forward = reads_block_0
    with caplog.at_level("INFO"):
        (fast,) = traced(host, kinds=["block"])

    assert "one full run per state" in caplog.text
    assert torch.equal(fast.scores, traced(host, kinds=["block"], plain=True)[0].scores)


def test_wrapped_modules_read_whole_rows(monkeypatch):
    from kedit_core.effects import ModuleSwap

    host = tiny_host("llama")
    block = host.module(host.blocks[1].path)
    state = {"vector": torch.ones(HIDDEN)}
    block.mlp.down_proj = Shift.build(block.mlp.down_proj, [ModuleSwap("", "", state=state)])
    monkeypatch.setattr(Corruption, "_fast_scores", None)

    (edited,) = traced(host, kinds=["mlp"])

    assert edited.high != traced(tiny_host("llama"), kinds=["mlp"], plain=True)[0].high


# -- bad input ---------------------------------------------------------------------------------


def test_encoder_decoder_is_refused():
    with pytest.raises(ModelError, match="causal"):
        traced(tiny_host("t5"))


def test_a_block_without_the_part_is_named():
    with pytest.raises(ModelError, match="Block 0 of mixtral has routed experts"):
        traced(tiny_host("mixtral"), kinds=["mlp"])


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"window": 0}, {"level": 0.0}, {"level": -1.0}])
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(RequestError, match="positive"):
        traced(tiny_host("llama"), **wrong)


def test_a_subject_that_is_not_in_the_prompt_is_refused():
    with pytest.raises(RequestError, match="not in the prompt"):
        trace(tiny_host("llama"), PROMPT, "Zzz", generator=seeded())


def test_an_answer_that_the_model_does_not_give_is_told(toy_host):
    host, fact = toy_host("llama"), toy_facts()[0]
    right, wrong = fact.answer, fact.target_new

    for answers, expected in ((right, True), (wrong, False), ((wrong, right), True), ((), True)):
        (found,) = trace(
            host, fact.prompt, fact.subject, answers, generator=seeded(), kinds=["block"], samples=1
        )
        assert found.is_expected is expected


# -- averages ----------------------------------------------------------------------------------


def result(effects, subject, *, expected=True, kind="mlp"):
    scores = torch.tensor(effects).float() + 0.1
    tokens = tuple("abcdefgh"[: scores.shape[1]])
    return TraceResult("a", kind, 3, scores, 0.1, 0.9, tokens, subject, "x", 1.0, expected)


def test_average_by_place():
    long = result([[9, 1, 2, 4, 3, 5, 7, 6.0]], (1, 5))  # before, 4 subject, after, further, last
    short = result([[9, 8, 2.0]], (1, 2))  # before, subject, last
    ends = result([[9, 4, 6.0]], (1, 3))  # the subject's last token is the prompt's

    found = average([long, short, ends, result([[99.0] * 3], (0, 1), expected=False)])

    assert found.counts == (2, 1, 3, 1, 1, 2)
    torch.testing.assert_close(found.effects[:, 0], torch.tensor([2.5, 3, 17 / 3, 5, 7, 4]))
    # 1.96 s / √n with s² of 1 and 4: 4.5; of 3, 8 and 6: 19/3; of 6 and 2: 8.
    expected = [1.96 * math.sqrt(x) for x in (4.5 / 2, 0, 19 / 9, 0, 0, 8 / 2)]
    torch.testing.assert_close(found.errors[:, 0], torch.tensor(expected))
    assert found.total_effect == pytest.approx(0.8)
    assert found.left_out == ("a",)


def test_strongest_layers_come_first():
    found = average([result([[0, 1.0], [0, 3.0], [0, 2.0]], (1, 2))])

    assert found.strongest(count=2) == [1, 2]
    assert found.effects[PLACES.index("middle subject tokens")].isnan().all()


def test_unlike_or_unexpected_results_have_no_average():
    one = result([[0, 1.0]], (0, 1))
    with pytest.raises(RequestError, match="several kinds"):
        average([one, result([[0, 1.0]], (0, 1), kind="attn")])
    with pytest.raises(RequestError, match="none of the 1 prompts"):
        average([result([[0, 1.0]], (0, 1), expected=False)])
    with pytest.raises(RequestError):
        average([])


def test_all_kinds_are_traced_by_default():
    assert tuple(r.kind for r in traced(tiny_host("gpt2"), samples=1)) == KINDS
