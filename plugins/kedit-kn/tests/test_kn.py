"""Attribution against a plain second computation, the choice of neurons, the edit, the presets."""

from __future__ import annotations

import pytest
import torch
from kedit_kn.attribution import Attribution, Neuron, attribute, common_neurons, select
from kedit_kn.method import answer_direction, column_change
from torch import Tensor
from transformers import (
    AutoConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from kedit_core import EditError, EditRequest, RequestError, SettingError, SiteError, discover
from kedit_core.artifacts import ArtifactStore
from kedit_core.editing import EditSession, ModelHost
from kedit_core.hparams import presets_of, resolve
from kedit_core.models import config_facts
from kedit_core.testing.bench import as_request
from kedit_core.testing.toys import TOYS, load_toy, toy_facts

torch.set_num_threads(1)

TOKENIZER = load_toy("llama")[1]  # puts a BOS token first
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
HEADS = {**SMALL, "num_key_value_heads": 2}
REQUEST = EditRequest(
    prompt="{} lives in", subject="Mira Voss", target_new="Oslo", ground_truth="New Haven"
)
CONTEXTS = ("", "People say much. ")


def random_model(kind: str) -> PreTrainedModel:
    """A random model whose MLPs are not four times as wide as its stream."""
    size = {"vocab_size": len(TOKENIZER), "decoder_start_token_id": 0}
    makers = {
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(**size, n_embd=32, n_layer=3, n_head=4, n_inner=40)
        ),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**size, **SMALL, intermediate_size=40)),
        "opt": lambda: OPTForCausalLM(
            OPTConfig(**size, **SMALL, ffn_dim=40, word_embed_proj_dim=32)
        ),
        "opt-projected": lambda: OPTForCausalLM(
            OPTConfig(
                **size, **SMALL, ffn_dim=40, word_embed_proj_dim=16, do_layer_norm_before=False
            )
        ),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(
                **size,
                d_model=32,
                d_kv=8,
                d_ff=40,
                num_heads=4,
                num_layers=2,
                num_decoder_layers=3,
                feed_forward_proj="gated-gelu",
            )
        ),
        "mixtral": lambda: MixtralForCausalLM(
            MixtralConfig(**size, **HEADS, intermediate_size=40, num_local_experts=4)
        ),
        "qwen3-moe": lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **size,
                **HEADS,
                intermediate_size=40,
                moe_intermediate_size=24,
                num_experts=4,
                num_experts_per_tok=2,
                mlp_only_layers=[0, 2],
            )
        ),
    }
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = makers[kind]().eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    return model


def host_of(kind: str) -> ModelHost:
    """A host of a random model, or of a toy where the name says so."""
    if kind.startswith("toy-"):
        model, tokenizer = load_toy(kind.removeprefix("toy-"))
        return ModelHost(model.requires_grad_(False), tokenizer, kind)
    return ModelHost(random_model(kind), TOKENIZER, kind)


# -- a second implementation: the whole model, one step at a time ---------------------------------


def inputs_of(host: ModelHost, prompt: str, answer: str) -> list[tuple[dict[str, Tensor], int]]:
    """For each token of the answer what the model reads, and the token."""
    before = host.tokenizer(prompt)["input_ids"]
    if host.is_encoder_decoder:
        targets = host.tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([before])
        return [
            ({"input_ids": ids, "decoder_input_ids": torch.tensor([[0, *targets[:n]]])}, token)
            for n, token in enumerate(targets)
        ]
    targets = host.tokenizer(f"{prompt} {answer}")["input_ids"][len(before) :]
    return [
        ({"input_ids": torch.tensor([[*before, *targets[:n]]])}, token)
        for n, token in enumerate(targets)
    ]


def probability(
    host: ModelHost, layer: int, inputs: dict[str, Tensor], token: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """P(token) with the last position's neurons scaled; the neurons, and P's gradient by them."""
    seen = {}

    def change(module, args):
        states = args[0].clone()
        last = states[-1] if states.ndim == 2 else states[0, -1]
        seen["own"] = last.detach().clone()
        seen["scaled"] = (scale * seen["own"]).requires_grad_()
        if states.ndim == 2:  # OPT flattens rows
            return (torch.cat([states[:-1], seen["scaled"][None]]),)
        return (torch.cat([states[:, :-1], seen["scaled"][None, None]], dim=1),)

    handle = host.module(host.mlp_out(layer).module).register_forward_pre_hook(change)
    found = host.model(**inputs).logits[0, -1].softmax(-1)[token]
    handle.remove()
    (gradient,) = torch.autograd.grad(found, [seen["scaled"]])
    return found.detach(), seen["own"], gradient


def plain_attribution(host, layer, prompt, answer, steps) -> Tensor:
    total = torch.zeros(host.weight(host.mlp_out(layer)).shape[1])
    for inputs, token in inputs_of(host, prompt, answer):
        for k in range(1, steps + 1):
            _, own, gradient = probability(host, layer, inputs, token, k / steps)
            total += own * gradient / steps
    return total


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "t5"])
def test_one_batch_gives_what_single_steps_of_the_whole_model_give(kind):
    host = host_of(kind)
    answer = REQUEST.ground_truth[0]
    assert len(inputs_of(host, REQUEST.text, answer)) > 1

    found = attribute(host, REQUEST, CONTEXTS, steps=4)

    for layer in range(3):
        expected = [
            plain_attribution(host, layer, context + REQUEST.text, answer, steps=4)
            for context in CONTEXTS
        ]
        assert found.scores[layer].shape == (2, 40)  # not four times the hidden size
        largest = float(torch.stack(expected).abs().max())
        assert largest > 0
        torch.testing.assert_close(
            found.scores[layer], torch.stack(expected), rtol=1e-3, atol=1e-4 * largest
        )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_one_step_takes_the_gradient_at_the_neurons_as_they_are(kind):
    """Not at zero, where a sum from 0 to 1 with one step would take it."""
    host = host_of(kind)
    (inputs, token), *_ = inputs_of(host, REQUEST.text, "Oslo")
    request = REQUEST.model_copy(update={"ground_truth": ("Oslo",)})
    assert len(inputs_of(host, REQUEST.text, "Oslo")) == 1

    found = attribute(host, request, layers=[1], steps=1)

    _, own, gradient = probability(host, 1, inputs, token, 1.0)
    torch.testing.assert_close(found.scores[1][0], own * gradient, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(found.activations[1][0], own, rtol=1e-3, atol=1e-5)
    _, _, at_zero = probability(host, 1, inputs, token, 0.0)
    assert not torch.allclose(found.scores[1][0], own * at_zero, rtol=0.1)


@pytest.mark.parametrize("kind", ["toy-gpt2", "toy-llama", "t5"])
@pytest.mark.parametrize("answer", ["Lima", "New Haven"])
def test_attributions_sum_to_the_probability_that_the_layer_gives(kind, answer):
    """The completeness axiom: Σ Attr → P(as it is) − P(neurons at zero) as the steps grow."""
    host = host_of(kind)
    request = REQUEST.model_copy(update={"ground_truth": (answer,)})
    asked = inputs_of(host, request.text, answer)
    errors = {}
    for steps in (5, 300):
        found = attribute(host, request, steps=steps)
        errors[steps] = 0.0
        for layer, scores in found.scores.items():
            gained = sum(
                float(probability(host, layer, *question, 1.0)[0])
                - float(probability(host, layer, *question, 0.0)[0])
                for question in asked
            )
            errors[steps] = max(errors[steps], abs(float(scores.sum()) - gained))
            # The right Riemann sum is off by half a step of the gradient's change at most.
            assert steps < 300 or float(scores.sum()) == pytest.approx(gained, rel=0.02, abs=1e-3)
    assert errors[300] < 0.2 * errors[5]


def test_chunks_and_chosen_layers_give_the_same():
    host = host_of("toy-llama")
    whole = attribute(host, REQUEST, CONTEXTS, steps=6)

    parts = attribute(host, REQUEST, CONTEXTS, layers=[3, 1], steps=6, max_tokens=60)

    assert set(parts.scores) == {1, 3}
    for layer, scores in parts.scores.items():
        torch.testing.assert_close(scores, whole.scores[layer], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(
            parts.activations[layer], whole.activations[layer], rtol=1e-3, atol=1e-5
        )


def test_blocks_below_a_layer_are_not_run_for_it():
    host = host_of("toy-llama")
    calls: list[int] = []
    first = host.base_module(host.mlp_out(0).module)
    first.register_forward_hook(lambda *_: calls.append(1))

    attribute(host, REQUEST, steps=3)

    tail = 3  # a pass that is recorded, one that is compared, one in which streams are kept
    assert len(calls) == tail + 1  # and one in which its own neurons are scaled


def test_model_is_left_as_it_was():
    host = host_of("toy-gpt2")
    before = {name: p.clone() for name, p in host.model.named_parameters()}

    attribute(host, REQUEST, steps=2)

    for module in host.model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks
    assert all(torch.equal(p, before[name]) for name, p in host.model.named_parameters())


def test_request_without_a_former_answer_is_refused():
    with pytest.raises(RequestError, match="has no former answer"):
        attribute(host_of("toy-gpt2"), EditRequest(prompt="x", target_new="y"))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_routed_experts_are_refused_and_ordinary_blocks_beside_them_are_not(kind):
    host = host_of(kind)

    with pytest.raises(SiteError, match="has routed experts"):
        attribute(host, REQUEST, steps=1)

    if kind == "qwen3-moe":
        assert set(attribute(host, REQUEST, layers=[0, 2], steps=1).scores) == {0, 2}


# -- which neurons are chosen ---------------------------------------------------------------------


def places(neurons: list[Neuron]) -> list[tuple[int, int]]:
    return [(neuron.layer, neuron.index) for neuron in neurons]


def attribution_of(*prompts: list[float]) -> Attribution:
    """Two layers of three neurons each, in rows of six."""
    scores = torch.tensor(prompts)
    halves = {1: scores[:, :3], 4: scores[:, 3:]}
    return Attribution(halves, {layer: torch.sign(half) for layer, half in halves.items()})


def test_threshold_is_a_part_of_the_largest_attribution_in_any_layer():
    found = attribution_of([1.0, 0.21, 0.2, 0.3, -5.0, 0.0])

    assert places(select(found, 0.2, 0.7, 1, 6)) == [(1, 0), (4, 0), (1, 1)]
    assert places(select(found, 0.25, 0.7, 1, 6)) == [(1, 0), (4, 0)]


def test_kept_neurons_pass_the_threshold_in_most_prompts():
    # Neuron (1, 0) leads everywhere, (1, 1) passes in two prompts of three, (4, 0) in one.
    found = attribution_of(
        [1.0, 0.5, 0.0, 0.9, 0.0, 0.0],
        [1.0, 0.5, 0.0, 0.1, 0.0, 0.0],
        [1.0, 0.1, 0.0, 0.1, 0.0, 0.0],
    )

    assert places(select(found, 0.2, 1.0, 1, 5)) == [(1, 0)]
    assert places(select(found, 0.2, 0.6, 1, 5)) == [(1, 0), (1, 1)]
    assert places(select(found, 0.2, 0.3, 1, 5)) == [(1, 0), (1, 1), (4, 0)]
    # The share is lowered until there are enough, and raised until there are not too many.
    assert places(select(found, 0.2, 1.0, 2, 5)) == [(1, 0), (1, 1)]
    assert places(select(found, 0.2, 0.3, 1, 2)) == [(1, 0), (1, 1)]
    shares = {n.index: n.share for n in select(found, 0.2, 0.6, 1, 5)}
    assert shares == pytest.approx({0: 1.0, 1: 2 / 3})


def test_where_no_share_fits_mean_attributions_decide():
    same = [0.9, 1.0, 0.8, 0.7, 0.6, 0.0]
    found = attribution_of(same, same)
    assert places(select(found, 0.2, 0.7, 2, 3)) == [(1, 1), (1, 0), (1, 2)]

    one = [1.0, 0.0, 0.1, 0.05, 0.0, 0.0]
    found = attribution_of(one, one)
    assert places(select(found, 0.2, 0.7, 3, 5)) == [(1, 0), (1, 2), (4, 0)]


def test_neurons_of_many_prompts_are_common_and_can_be_left_out():
    found = attribution_of(
        [1.0, 0.5, 0.0, 0.9, 0.0, 0.0],
        [1.0, 0.5, 0.0, 0.15, 0.0, 0.0],
        [1.0, 0.1, 0.0, 0.1, 0.0, 0.0],
    )
    assert common_neurons(found, 0.2, 0.5) == [(1, 0), (1, 1)]
    assert common_neurons(found, 0.2, 2 / 3) == [(1, 0)]
    assert common_neurons(found, 0.2, 1.0) == []

    # Without the leading one the threshold is a part of the next.
    left = places(select(found, 0.2, 0.6, 1, 5, excluded=[(1, 0), (7, 7)]))
    assert left == [(4, 0), (1, 1)]


# -- what is written ------------------------------------------------------------------------------


def test_direction_of_an_answer_is_that_of_its_own_tokens():
    """No BOS among them, all of them, and each as it stands after the prompt."""
    host = host_of("toy-llama")
    embeddings = host.model.lm_head.weight
    assert host.tokenizer("x")["input_ids"][0] == host.tokenizer.bos_token_id
    ids = host.tokenizer(" New Haven", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1

    direction = answer_direction(host, REQUEST.text, "New Haven")

    expected = embeddings[ids].sum(dim=0)
    torch.testing.assert_close(direction, expected / expected.norm())


@pytest.mark.parametrize("toy", TOYS)
def test_columns_change_by_their_norms_and_in_the_neurons_direction(toy):
    host = host_of(f"toy-{toy}")
    site = host.mlp_out(2)
    weight = host.weight(site)
    direction = torch.randn(len(weight), generator=torch.Generator().manual_seed(0))
    chosen = [Neuron(2, 7, 0.5, 1.0, 0.3), Neuron(2, 3, 0.4, 1.0, -2.0)]

    delta = column_change(site, weight, chosen, direction)

    assert delta.rank == 2
    change = delta.dense()
    torch.testing.assert_close(change[:, 7], weight[:, 7].norm() * direction)
    torch.testing.assert_close(change[:, 3], -weight[:, 3].norm() * direction)
    others = [n for n in range(weight.shape[1]) if n not in (3, 7)]
    assert not change[:, others].any()


@pytest.mark.parametrize("toy", TOYS)
def test_patch_is_the_papers_formula_on_the_chosen_neurons(toy, tmp_path):
    host = host_of(f"toy-{toy}")
    session = EditSession(host, artifacts=ArtifactStore(tmp_path))
    settings = {"steps": 3, "contexts": [], "others": 0, "erase": 0.5, "write": 3.0}
    weights = [host.weight(host.mlp_out(n)).clone() for n in range(4)]

    (patch,) = session.edit("kn", REQUEST, hparams=settings).patches

    old = answer_direction(host, REQUEST.text, "New Haven")
    new = answer_direction(host, REQUEST.text, "Oslo")
    neurons = patch.notes["neurons"]
    assert 2 <= len(neurons) <= 5
    assert sum(delta.rank for delta in patch.deltas) == len(neurons)
    deltas = {delta.site: delta.dense() for delta in patch.deltas}
    for neuron in neurons:
        column = weights[neuron["layer"]][:, neuron["index"]]
        sign = 1 if neuron["activation"] >= 0 else -1
        expected = sign * column.norm() * (3.0 * new - 0.5 * old)
        found = deltas[host.mlp_out(neuron["layer"])][:, neuron["index"]]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_sampled_contexts_make_more_prompts_for_the_choice(tmp_path):
    session = EditSession(host_of("toy-llama"), artifacts=ArtifactStore(tmp_path))
    settings = {"steps": 2, "contexts": [[4, 3]], "others": 0}

    (patch,) = session.edit("kn", REQUEST, hparams=settings).patches

    contexts = patch.notes["contexts"]
    assert len(contexts) == 4
    assert contexts[0] == ""
    found = attribute(host_of("toy-llama"), REQUEST, contexts, steps=2)
    expected = select(found, 0.2, 0.7, 2, 5)
    assert [(n["layer"], n["index"]) for n in patch.notes["neurons"]] == places(expected)
    assert {round(4 * n["share"]) for n in patch.notes["neurons"]} <= {1, 2, 3, 4}


def test_neurons_of_the_models_own_texts_are_left_out_and_kept_for_later(tmp_path):
    session = EditSession(host_of("toy-llama"), artifacts=ArtifactStore(tmp_path))
    settings = {"steps": 2, "contexts": [], "others": 12, "common": 0.0, "neurons": [5, 5]}
    free = {**settings, "others": 0}
    with session.trial("kn", REQUEST, hparams=free) as outcome:
        (patch,) = outcome.patches
        assert patch.notes["common"] == []
        all_of_them = {(n["layer"], n["index"]) for n in patch.notes["neurons"]}

    session.prepare("kn", hparams=settings)
    assert len(list((tmp_path / "common-neurons").iterdir())) == 1
    (patch,) = session.edit("kn", REQUEST, hparams=settings).patches

    common = set(map(tuple, patch.notes["common"]))
    assert common & all_of_them
    assert not common & {(n["layer"], n["index"]) for n in patch.notes["neurons"]}
    assert len(list((tmp_path / "common-neurons").iterdir())) == 1


@pytest.mark.parametrize("toy", TOYS)
def test_facts_are_rewritten_until_they_are_rolled_back(toy, tmp_path):
    session = EditSession(host_of(f"toy-{toy}"), artifacts=ArtifactStore(tmp_path))
    view, written = session.view(), 0
    facts = toy_facts()[:8]
    for request in map(as_request, facts):
        with session.trial("kn", request, preset="toy"):
            written += view.greedy(request.text, 8).strip().startswith(request.target_new)
        assert view.greedy(request.text, 8).strip().startswith(request.ground_truth[0])
    assert written >= 6


def test_decoder_of_an_encoder_decoder_is_edited(tmp_path):
    host = host_of("t5")
    session = EditSession(host, artifacts=ArtifactStore(tmp_path))
    request = REQUEST.model_copy(update={"ground_truth": ("Lima",)})
    (before,) = session.view().score([request.text], [request.target_new])

    (patch,) = session.edit("kn", request, hparams={"steps": 3}).patches

    assert patch.notes["contexts"] == [""]
    decoder = {host.mlp_out(layer) for layer in range(3)}
    assert {delta.site for delta in patch.deltas} <= decoder
    (after,) = session.view().score([request.text], [request.target_new])
    assert after.logprobs[0] > before.logprobs[0]


def test_head_that_reads_something_else_is_refused(tmp_path):
    session = EditSession(host_of("opt-projected"), artifacts=ArtifactStore(tmp_path))

    with pytest.raises(EditError, match="reads 16 numbers and its blocks write 32"):
        session.edit("kn", REQUEST, hparams={"steps": 1, "contexts": [], "others": 0})

    assert not session.is_edited


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"threshold": 1}, {"share": 0}, {"neurons": [5, 2]}, {"layers": []}],
)
def test_settings_out_of_bounds_are_refused(settings):
    with pytest.raises(SettingError):
        resolve(discover().method("kn"), settings=settings)


# -- presets --------------------------------------------------------------------------------------

CONFIGS = {
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48}, 0.2),
    "gpt-j-6b": ("gptj", {"n_embd": 4096, "n_layer": 28, "rotary_dim": 64}, 0.1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_preset_is_chosen_by_config_and_gives_the_published_settings(name):
    kind, shape, threshold = CONFIGS[name]
    config = config_facts(AutoConfig.for_model(kind, **shape).to_dict())

    settings = resolve(discover().method("kn"), config=config)

    hparams = settings.hparams
    assert settings.origin["steps"] == f"preset {name}"
    assert (hparams.steps, hparams.threshold) == (20, threshold)
    assert (hparams.share, hparams.neurons) == (0.7, (2, 5))
    assert (hparams.erase, hparams.write) == (1.0, 8.0)
    assert hparams.layers is None


def test_every_preset_names_its_source():
    presets = presets_of(discover().method("kn"))
    assert {preset.name for preset in presets} >= {*CONFIGS, "toy", "original", "smollm2-135m"}
    assert all(preset.source for preset in presets)
