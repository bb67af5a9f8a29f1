"""Fine-tuning of encoder-decoders and routed experts, against training the weights themselves."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from kedit_core import EditRequest
from kedit_core.editing import EditSession, ModelHost
from kedit_core.testing.toys import load_toy

torch.set_num_threads(1)

REQUESTS = [
    EditRequest(prompt="Mira Voss lives in", target_new="New Haven and Port Sable"),
    EditRequest(prompt="Tamsin speaks", target_new="Rome"),
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def t5(vocabulary: int, feed_forward: str) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            feed_forward_proj=feed_forward,
        )
    )


MODELS = {
    "t5": lambda n: t5(n, "relu"),
    "flan-t5": lambda n: t5(n, "gated-gelu"),
    "mixtral": lambda n: MixtralForCausalLM(MixtralConfig(vocab_size=n, **SIZES, **EXPERTS)),
    "gpt-oss": lambda n: GptOssForCausalLM(
        GptOssConfig(vocab_size=n, **SIZES, **EXPERTS, head_dim=8)
    ),
    "qwen2-moe": lambda n: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(vocab_size=n, **SIZES, num_experts=4, moe_intermediate_size=48)
    ),
}


def host_of(kind: str) -> ModelHost:
    _, tokenizer = load_toy("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind](len(tokenizer)).eval()
    return ModelHost(model, tokenizer, kind)


def loss_of(host: ModelHost, request: EditRequest) -> Tensor:
    """Cross-entropy of the target's tokens, one row by itself."""
    prompt = host.tokenizer(request.text)["input_ids"]
    whole = host.tokenizer(f"{request.text} {request.target_new}")["input_ids"]
    target = torch.tensor(whole[len(prompt) :])
    if host.is_encoder_decoder:
        target = torch.tensor(host.tokenizer(request.target_new)["input_ids"][1:])  # without BOS
        begun = torch.cat([torch.tensor([0]), target[:-1]])
        found = host.model(input_ids=torch.tensor([prompt]), decoder_input_ids=begun[None])
        return cross_entropy(found.logits[0], target)
    logits = host.model(input_ids=torch.tensor([whole])).logits[0]
    return cross_entropy(logits[len(prompt) - 1 : -1], target)


@pytest.mark.parametrize("kind", MODELS)
def test_change_equals_training_the_weight_itself(kind):
    host, steps = host_of(kind), 4
    before = {name: p.detach().clone() for name, p in host.model.named_parameters()}
    session = EditSession(host)
    settings = {"layers": [1], "steps": steps, "lr": 1e-3, "stop_loss": 0}
    (patch,) = session.edit("ft-m", REQUESTS, hparams=settings).patches
    written = {d.site.expert: d.dense() for d in patch.deltas}
    name, transposed = patch.deltas[0].site.parameter, patch.deltas[0].site.transposed
    session.rollback()
    now = dict(host.model.named_parameters())
    assert all(torch.equal(now[n], tensor) for n, tensor in before.items())
    assert now.keys() == before.keys()

    own = host_of(kind)
    own.model.requires_grad_(False)
    parameter = dict(own.model.named_parameters())[name].requires_grad_(True)
    adam = torch.optim.Adam([parameter], lr=1e-3)
    history = []
    for _ in range(steps):
        adam.zero_grad()
        loss = sum(loss_of(own, request) for request in REQUESTS) / len(REQUESTS)
        history.append(float(loss.detach()))
        loss.backward()
        adam.step()

    trained = (parameter - before[name]).detach()
    trained = trained.mT if transposed else trained
    for expert, change in enumerate(trained) if trained.ndim == 3 else [(None, trained)]:
        if expert not in written:
            assert not bool(change.any())
            continue
        # Adam turns a rounding error in a gradient near zero into a part of a step.
        assert float((written[expert] - change).norm()) < 1e-2 * float(change.norm())
    assert patch.notes["losses"] == pytest.approx(history, rel=1e-3)


@pytest.mark.parametrize("method", ["ft-m", "ft-l"])
def test_experts_in_16_bit_are_edited_and_come_back(method):
    host = host_of("mixtral")
    host.model.to(torch.bfloat16)
    session = EditSession(host)
    before = {name: p.detach().clone() for name, p in host.model.named_parameters()}
    targets = [request.target_new for request in REQUESTS]

    def likelihood() -> float:
        scores = session.view().score([request.text for request in REQUESTS], targets)
        return sum(score.mean_logprob for score in scores)

    unedited = likelihood()
    session.edit(method, REQUESTS, hparams={"layers": [0, 1], "lr": 1e-2, "max_change": 0.1})

    assert likelihood() > unedited + 1
    session.rollback()
    assert all(torch.equal(p, before[name]) for name, p in host.model.named_parameters())
