"""The evaluator as a whole, on models of which one knows what they say and what they are worth."""

from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from kedit_bench.metrics import answers as protocols
from kedit_bench.plugin import AGREEMENTS, PROTOCOLS
from kedit_bench.scoring import IMMEDIATE, Scorer, choose_metrics
from kedit_bench.unedited import Asker
from kedit_core.ask import Read
from kedit_core.editing import EditSession, ModelHost, ModelView
from kedit_core.errors import RequestError
from kedit_core.plugins import discover
from kedit_core.protocols import CaseScore, Metric
from kedit_core.request import EditCase, EditRequest, Probe
from kedit_core.testing.toys import toy_facts
from kedit_core.tokens import encode, join
from kedit_core.view import ROUND, TASK
from tests.bench.asked import case, says, score
from tests.bench.fakes import WHERE, toy_cases
from tests.core.edits import weight_patch
from tests.core.test_tokens import byte_level

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama(tokenizer, *, hidden: int = 32, spread: float = 0.02, positions: int = 128) -> ModelHost:
    """A tiny random model; the larger the spread, the surer it is of what it says."""
    config = LlamaConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        max_position_embeddings=positions,
        initializer_range=spread,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return ModelHost(LlamaForCausalLM(config).eval(), tokenizer, "tiny")


def directions(count: int, width: int) -> Tensor:
    """Vectors of length √width, each closest to itself."""
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(drawn, dim=-1) * math.sqrt(width)


@torch.no_grad()
def saying(tokenizer, follows: Mapping[int, int]) -> ModelHost:
    """A model that always says what `follows` the last token: blocks add nothing to what is
    embedded, and the head knows it."""
    host = llama(tokenizer, hidden=64)
    codes = directions(len(tokenizer), 64)
    for block in host.model.model.layers:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    embedded = [codes[follows.get(token, token)] for token in range(len(tokenizer))]
    host.model.model.embed_tokens.weight.copy_(torch.stack(embedded))
    host.model.lm_head.weight.copy_(codes)
    return host


def knowing(tokenizer, prompt: str, target: str) -> ModelHost:
    """A model that answers the prompt, bare or in its instruction, with the target, and ends."""
    host = llama(tokenizer)
    wanted = join(host, prompt, target).targets
    chain = (*wanted, tokenizer.eos_token_id)
    ends = {encode(host, text).ids[-1] for text in (prompt, (TASK + ROUND).format(prompt))}
    assert len(set(chain)) == len(chain), "a token that comes twice has two that follow it"
    assert not ends & set(chain)
    return saying(tokenizer, dict(pairwise(chain)) | dict.fromkeys(ends, chain[0]))


def scores_of(metric: Metric, asked: EditCase, host: ModelHost) -> Mapping[str, CaseScore]:
    """What the metric makes of a model without edits."""
    answers = ModelView(host).ask(metric.questions(asked))
    return metric.score(asked, answers, answers)


def value_of(protocol: str, host: ModelHost, prompt: str, *expected: str) -> float | None:
    """A probe's value by a protocol for answers; None where it has none."""
    probe = Probe(kind="rephrase", prompt=prompt, expected=expected)
    found = scores_of(getattr(protocols, protocol)("rephrase"), case(probe), host)
    return found[""].value if found else None


def scorer(*names: str) -> Scorer:
    return Scorer(choose_metrics(discover(), names), WHERE)


@torch.no_grad()
def bare_logits(host: ModelHost, ids: Sequence[int]) -> Tensor:
    """Of one plain call of the model: (tokens, vocabulary)."""
    return host.model(input_ids=torch.tensor([list(ids)])).logits[0]


# -- a model that knows the answer -----------------------------------------------------------------

ANSWER_PROTOCOLS = sorted(p.replace("-", "_") for p in PROTOCOLS if p not in ("nll", "rank"))
KNOWN = [
    ("The Tower is in", "a"),
    ("The Tower is in", "Paris"),
    ("The Tower is in", " Paris"),
    ("The Tower is in", "New York"),
    ("The Tower is in", " Łódź"),
    ("这座塔在", "罗马"),
    ("这座塔在", "巴黎"),
    ("这座塔在", " 巴黎"),
]
BEGIN = pytest.mark.parametrize("begin", [False, True], ids=["no begin token", "begin token"])


@pytest.fixture(scope="module")
def tokenizers():
    """They spell any script; without and with a token at the beginning."""
    made = {begin: byte_level(begin) for begin in (False, True)}
    for tokenizer in made.values():
        tokenizer.add_tokens(["巴黎"])
    return made


@BEGIN
@pytest.mark.parametrize(
    ("protocol", "prompt", "target"),
    [
        (protocol, *known)
        for protocol in ANSWER_PROTOCOLS
        for known in KNOWN
        # Two spaces would be the same token twice.
        if (protocol, known) != ("easyedit", KNOWN[-1])
    ],
)
def test_a_model_that_knows_the_answer_scores_one_by_every_protocol(
    tokenizers, protocol, prompt, target, begin
):
    said = f" {target}" if protocol == "easyedit" else target  # it always has a space of its own
    host = knowing(tokenizers[begin], prompt, said)

    assert value_of(protocol, host, prompt, target) == pytest.approx(1, abs=1e-3)
    if protocol != "easyedit":  # which reads the first answer only
        assert value_of(protocol, host, prompt, "Lima", target) == pytest.approx(1, abs=1e-3)


@BEGIN
def test_answers_of_one_token_and_of_several_are_among_them(tokenizers, begin):
    host = llama(tokenizers[begin])
    for language in (KNOWN[:5], KNOWN[5:]):
        lengths = {len(join(host, *known).targets) for known in language}
        assert min(lengths) == 1
        assert max(lengths) >= 5


@pytest.mark.parametrize(("prompt", "target"), KNOWN)
def test_a_model_that_knows_the_answer_is_sure_of_it(tokenizers, prompt, target):
    host = knowing(tokenizers[True], prompt, target)

    assert value_of("rank", host, prompt, target) == 0
    assert value_of("nll", host, prompt, target) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("protocol", ANSWER_PROTOCOLS)
def test_a_model_that_knows_another_answer_scores_zero(tokenizers, protocol):
    host = knowing(tokenizers[False], "The Tower is in", "Łódź")

    assert value_of(protocol, host, "The Tower is in", "Paris") == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(("prompt", "target"), KNOWN)
@pytest.mark.parametrize("protocol", AGREEMENTS)
def test_a_model_that_says_the_same_agrees_with_itself(tokenizers, protocol, prompt, target):
    metric = getattr(protocols, f"agreement_{protocol.replace('-', '_')}")("locality")
    asked = case(Probe(kind="locality", prompt=prompt, expected=(target, "Lima")))
    before, after = (
        ModelView(knowing(tokenizers[True], prompt, target)).ask(metric.questions(asked))
        for _ in range(2)
    )

    assert metric.score(asked, before, after)[""].value == 1


# -- the unedited model ----------------------------------------------------------------------------


@pytest.mark.parametrize("toy", ["gpt2", "llama"])
def test_an_edit_that_changes_nothing_makes_no_difference(toy_host, toy):
    session = EditSession(toy_host(toy))
    asker, cases = Asker(session), toy_cases(2, session.host)
    answers = [f"{q}/{p}@1" for q in ("efficacy", "generalization") for p in PROTOCOLS]
    agreements = [f"locality-agreement/{p}@1" for p in AGREEMENTS]
    further = ["locality-accuracy/nll@1", "opinion/divergence@1", "fluency/ngram-entropy@1"]
    several = scorer(*answers, *agreements, *further)
    session.apply(weight_patch(session.host, 1, scale=0.0))

    seen = set()
    for asked in cases:
        questions = several.questions(asked)
        before, after = asker.unedited(questions), asker.edited(questions)
        unchanged, edited = (
            {(m.protocol.metric, m.protocol.part): m.value for m in found}
            for found in (
                several.unchanged(asked, before),
                several.score(asked, before, after, IMMEDIATE),
            )
        )
        assert {name for name, _ in edited} == {*answers, *agreements, *further}
        assert edited == unchanged
        assert {edited[name, ""] for name in agreements} == {1.0}
        assert edited["opinion/divergence@1", ""] == 0
        seen |= set(edited.values())
    assert len(seen) > 20, "the model says nothing that could differ"


# -- teacher forcing and writing -------------------------------------------------------------------


def test_all_tokens_are_right_exactly_where_what_is_written_begins_with_them():
    host = llama(byte_level(True), spread=0.4)
    texts = [host.tokenizer.decode([token]) for token in range(len(host.tokenizer))]
    silent = [n for n, text in enumerate(texts) if not re.fullmatch(r" \w+", text)]
    with torch.no_grad():  # it says whole words, so that its texts are read as they were written
        host.model.lm_head.weight[silent] = 0
    view, draw = ModelView(host), random.Random(0)
    words = ["Anne", "Paris", "lives", "in", "the", "Tower", "of", "Rome", "is", "old", "Norse"]
    prompts = [" ".join(draw.choices(words, k=draw.randint(2, 6))) for _ in range(200)]
    probes = []
    for n, (prompt, own) in enumerate(zip(prompts, view.greedy(prompts, 3), strict=True)):
        # What it says itself; wrong in the last word; wrong from the first.
        target = [own, own, f"{own} {draw.choice(words)}", draw.choice(words)][n % 4]
        probes.append(Probe(kind="rephrase", name=str(n), prompt=prompt, expected=target))

    forced, written = (
        {name: score.value for name, score in scores_of(metric, case(*probes), host).items()}
        for metric in (protocols.all_tokens("rephrase"), protocols.greedy_cut("rephrase"))
    )

    assert len(forced) == len(prompts) + 1  # and the headline
    assert forced == written
    assert min(list(forced.values()).count(right) for right in (0, 1)) >= 40


# -- encoder-decoders ------------------------------------------------------------------------------


@torch.no_grad()
def copying(tokenizer) -> ModelHost:
    """An encoder-decoder that predicts, at each place, the token that its decoder reads there."""
    width = 64
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = T5ForConditionalGeneration(config).eval()
    for block in model.decoder.block:
        block.layer[0].SelfAttention.o.weight.zero_()
        block.layer[1].EncDecAttention.o.weight.zero_()
        block.layer[2].DenseReluDense.wo.weight.zero_()
    codes = directions(len(tokenizer), width)
    model.get_input_embeddings().weight.copy_(codes)
    model.lm_head.weight.copy_(codes)
    return ModelHost(model, tokenizer, "copying")


@pytest.mark.parametrize("target", ["Paris", "New York", "Old Norse, in", "罗马"])
def test_an_encoder_decoder_that_copies_what_it_reads_scores_zero(target):
    host = copying(byte_level(False))
    tokens = join(host, "Anne lives in", target).targets
    assert len(set(tokens)) == len(tokens)
    # The target where the decoder reads it, not shifted: it is all there.
    ids = torch.tensor([encode(host, "Anne lives in").ids])
    with torch.no_grad():
        unshifted = host.model(input_ids=ids, decoder_input_ids=torch.tensor([tokens])).logits[0]
    assert tuple(unshifted.argmax(-1).tolist()) == tokens

    for protocol in ("teacher_forced", "all_tokens", "with_stop", "greedy", "greedy_cut"):
        assert value_of(protocol, host, "Anne lives in", target) == 0


# -- long answers ----------------------------------------------------------------------------------


def test_an_answer_of_300_tokens_is_read_to_its_end():
    host = llama(byte_level(True), positions=512, spread=0.2)
    prompt, text = "Anne lives in", "old Rome and says that the house, "
    given, end = len(encode(host, prompt).ids), 300
    ids = encode(host, f"{prompt} {text * 30}").ids[: given + end]
    target = host.tokenizer.decode(list(ids[given:])).removeprefix(" ")
    assert encode(host, f"{prompt} {target}").ids == ids

    (found,) = ModelView(host).ask([Read(prompt, target)]).values()

    logprobs = bare_logits(host, ids).log_softmax(-1)[
        range(given - 1, given + end - 1), ids[given:]
    ]
    total = float(logprobs.double().sum())
    assert (len(found.tokens), found.cut) == (end, False)
    assert sum(found.logprobs) == pytest.approx(total, rel=1e-6)
    assert value_of("nll", host, prompt, target) == pytest.approx(-total / end, rel=1e-6)
    hits = bare_logits(host, ids).argmax(-1)[given - 1 : -1] == torch.tensor(ids[given:])
    assert value_of("teacher_forced", host, prompt, target) == float(hits.double().mean())
    assert value_of("greedy_cut", host, prompt, target) is None  # longer than what is written


# -- from probes to means --------------------------------------------------------------------------


def portability(**families: Sequence[bool]) -> tuple[EditCase, dict]:
    """A case with a probe for each verdict, and what a model says that earns them."""
    probes, said = [], {("The Tower is in",): score((1,))}
    for family, verdicts in families.items():
        for number, right in enumerate(verdicts):
            prompt = f"{family} {number}"
            probes.append(
                Probe(kind="portability", name=family, prompt=prompt, expected=("Rome", "Roma"))
            )
            said[prompt, "Rome"] = score((9,), (1,))  # wrong: the other answer decides
            said[prompt, "Roma"] = score((1,) if right else (9,), (1,))
    return case(*probes), said


def test_means_are_over_probes_then_families_then_the_cases_that_have_any():
    several = scorer("efficacy/teacher-forced@1", "portability/teacher-forced@1")
    measurements = []
    for asked, said in (
        portability(hop=[True, False], alias=[True]),
        portability(hop=[False]),
        portability(),
    ):
        metrics = [chosen.metric for chosen in several.chosen]
        after = {q: a for metric in metrics for q, a in says(metric, asked, said).items()}
        measurements += several.score(asked, dict(after), after, IMMEDIATE)

    means = {(m.protocol.metric, m.protocol.part): m for m in several.summary(measurements)}

    found = {
        part: (mean.mean, mean.cases, mean.probes)
        for (metric, part), mean in means.items()
        if metric.startswith("portability")
    }
    # All probes alike would be 2/4, the mean of the families' means (1/4 + 1) / 2.
    assert found == {
        "": ((3 / 4 + 0) / 2, 2, 4),
        "hop": ((1 / 2 + 0) / 2, 2, 3),
        "alias": (1, 1, 1),
    }
    assert means["portability/teacher-forced@1", ""].error == pytest.approx((3 / 4) / 2)
    assert means["efficacy/teacher-forced@1", ""].cases == 3


def test_accepted_answers_are_one_list():
    with pytest.raises(RequestError, match="expected"):
        Probe(kind="portability", prompt="Q", expected=[["Rome", "Roma"], ["Lima"]])


# -- as others compute it --------------------------------------------------------------------------


@torch.no_grad()
def romes_nll(
    host: ModelHost, prefixes: Sequence[str], targets: Sequence[str]
) -> list[list[float]]:
    """As ROME's `test_batch_prediction`: for each prefix the mean negative log-probability of each
    target, in one batch that is padded on the right."""
    tokenizer = host.tokenizer
    given = [len(tokenizer(prefix)["input_ids"]) for prefix in prefixes for _ in targets]
    wanted = [tokenizer(f" {target}")["input_ids"] for _ in prefixes for target in targets]
    texts = [tokenizer(f"{p} {target}")["input_ids"] for p in prefixes for target in targets]
    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    logprobs = host.model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    found = []
    for row, (start, tokens) in enumerate(zip(given, wanted, strict=True)):
        total = sum(-float(logprobs[row, start + j - 1, t]) for j, t in enumerate(tokens))
        found.append(total / len(tokens))
    return [found[n : n + len(targets)] for n in range(0, len(found), len(targets))]


def average(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def test_counterfact_is_scored_as_by_romes_code(toy_host):
    host = toy_host("gpt2")  # the code wants a tokenizer that puts nothing before a text
    metric, view = scorer("counterfact/contrast@1"), ModelView(host)
    measurements, theirs = [], []
    for number, fact in enumerate(toy_facts()[::5]):
        pair = (fact.target_new, fact.answer)
        if number % 3 == 0:
            pair = pair[::-1]  # a model that was edited well
        near = [n.prompt for n in fact.neighborhood]
        asked = EditCase(
            request=EditRequest(
                prompt=fact.prompt,
                subject=fact.subject,
                target_new=pair[0],
                ground_truth=pair[1],
            ),
            probes=(
                *(Probe(kind="rephrase", prompt=p) for p in fact.rephrases),
                *(Probe(kind="locality", name="neighborhood", prompt=p) for p in near),
            ),
        )
        after = view.ask(metric.questions(asked))
        measurements += metric.score(asked, dict(after), after, IMMEDIATE)
        groups = {"E": [asked.request.text], "P": list(fact.rephrases), "N": near}
        case_of = {}
        for place, prompts in groups.items():
            read = romes_nll(host, prompts, pair)
            if place == "N":
                read = [[true, new] for new, true in read]  # the true answer should win
            case_of[f"{place}S"] = average(first < second for first, second in read)
            case_of[f"{place}M"] = average(math.exp(-a) - math.exp(-b) for a, b in read)
        theirs.append(case_of)

    ours = {m.protocol.part: m.mean for m in metric.summary(measurements)}

    expected = {part: average(c[part] for c in theirs) for part in theirs[0]}
    successes = [expected[part] for part in ("ES", "PS", "NS")]
    expected[""] = 3 / sum(1 / success for success in successes)
    assert ours == pytest.approx(expected, abs=1e-5)
    assert all(0 < success < 1 for success in successes)


def papers_text(host: ModelHost, question: str) -> str:
    """What WILD judges: instruction, 50 greedy tokens, cut at any full stop or line break."""
    ids = list(host.tokenizer(f"Please answer the question:\n\nQ: {question}\nA:")["input_ids"])
    given = len(ids)
    while len(ids) < given + 50:
        token = int(bare_logits(host, ids)[-1].argmax())
        if token == host.tokenizer.eos_token_id:
            break
        ids.append(token)
    text = host.tokenizer.decode(ids[given:], skip_special_tokens=True).strip()
    return re.split(r"[.\n]", text)[0].strip()


def papers_form(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def test_wild_is_scored_as_in_its_paper(toy_host):
    host = toy_host("llama")  # the other toy says nothing where it is instructed
    values = []
    for number, fact in enumerate(toy_facts()[::12]):
        prompt = fact.prompt.format(fact.subject)
        said = papers_text(host, prompt)
        forms = [said, said.upper(), f"The {said}!", f"{said} too", fact.target_new]
        answer = forms[number % 5] if said else fact.answer
        value = value_of("wild_paper", host, prompt, answer)
        if value is not None:  # the answer is not too long
            values.append(value)
            assert value == (papers_form(said) == papers_form(answer)), (prompt, answer)
    assert set(values) == {0, 1}
    assert len(values) >= 8


def test_the_papers_literal_stops_cut_what_a_model_knows(tokenizers):
    host = knowing(tokenizers[False], "The Tower is in", "U.S")

    assert value_of("greedy_exact", host, "The Tower is in", "U.S") == 1
    assert value_of("wild_paper", host, "The Tower is in", "U.S") == 0
