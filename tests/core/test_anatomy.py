"""What `find_anatomy` sees in a model equals what is known about its family."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import GPT2Model, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from kedit_core.anatomy import Anatomy, BlockAnatomy, find_anatomy, hidden_of, with_hidden
from kedit_core.errors import ModelError, SiteError
from kedit_core.host import ModelHost
from kedit_core.sites import Site
from tests.core.families import BLOCKS, FAMILIES, HIDDEN, INNER
from tests.numerics.tiny import tiny_tokenizer

TOKENS = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]])


@dataclass(frozen=True)
class Known:
    """What is known about a family of equal blocks; module names are relative to the block."""

    blocks: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    mlp: str | None
    attention: str
    attention_out: str
    final_norm: str | None
    embedding: str
    head: str = "lm_head"
    tied: bool = False
    layer_output: str = "tensor"
    transposed: bool = False

    def block(self, index: int) -> BlockAnatomy:
        path = f"{self.blocks}.{index}"

        def site(name: str) -> Site:
            return Site(f"{path}.{name}.weight", self.transposed)

        return BlockAnatomy(
            path=path,
            mlp_out=site(self.mlp_out),
            mlp_in=tuple(site(name) for name in self.mlp_in),
            mlp=self.mlp and f"{path}.{self.mlp}",
            attention=f"{path}.{self.attention}",
            attention_out=site(self.attention_out),
        )

    def anatomy(self) -> Anatomy:
        return Anatomy(
            blocks=tuple(self.block(index) for index in range(BLOCKS)),
            encoder_blocks=(),
            final_norm=self.final_norm,
            head=self.head,
            embedding=self.embedding,
            tied=self.tied,
            hidden_size=HIDDEN,
            layer_output=self.layer_output,  # type: ignore[arg-type]
        )


LLAMA = Known(
    blocks="model.layers",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"),
    mlp_out="mlp.down_proj",
    mlp="mlp",
    attention="self_attn",
    attention_out="self_attn.o_proj",
    final_norm="model.norm",
    embedding="model.embed_tokens",
)
FUSED = replace(LLAMA, mlp_in=("mlp.gate_up_proj",))
GPT2 = Known(
    blocks="transformer.h",
    mlp_in=("mlp.c_fc",),
    mlp_out="mlp.c_proj",
    mlp="mlp",
    attention="attn",
    attention_out="attn.c_proj",
    final_norm="transformer.ln_f",
    embedding="transformer.wte",
    tied=True,
    transposed=True,
)
GPTJ = replace(
    GPT2,
    mlp_in=("mlp.fc_in",),
    mlp_out="mlp.fc_out",
    attention_out="attn.out_proj",
    tied=False,
    layer_output="tuple",
    transposed=False,
)
NEOX = Known(
    blocks="gpt_neox.layers",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
    mlp="mlp",
    attention="attention",
    attention_out="attention.dense",
    final_norm="gpt_neox.final_layer_norm",
    embedding="gpt_neox.embed_in",
)
BLOOM = replace(
    NEOX,
    blocks="transformer.h",
    attention="self_attention",
    attention_out="self_attention.dense",
    final_norm="transformer.ln_f",
    embedding="transformer.word_embeddings",
    tied=True,
    layer_output="tuple",
)
OPT = Known(
    blocks="model.decoder.layers",
    mlp_in=("fc1",),
    mlp_out="fc2",
    mlp=None,
    attention="self_attn",
    attention_out="self_attn.out_proj",
    final_norm="model.decoder.final_layer_norm",
    embedding="model.decoder.embed_tokens",
    tied=True,
)
DENSE = {
    "gpt2": GPT2,
    "gpt2-square": GPT2,
    "gptj": GPTJ,
    "codegen": GPTJ,
    "gpt_neo": replace(
        GPT2,
        attention="attn.attention",
        attention_out="attn.attention.out_proj",
        layer_output="tuple",
        transposed=False,
    ),
    "gpt_neox": NEOX,
    "llama": LLAMA,
    "llama-square": LLAMA,
    "mistral": LLAMA,
    "internlm3": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "granite": LLAMA,
    "stablelm": LLAMA,
    "olmo2": LLAMA,
    "gemma2": replace(LLAMA, tied=True),
    "gemma3_text": replace(LLAMA, tied=True),
    "smollm3": replace(LLAMA, tied=True),
    "cohere": replace(LLAMA, tied=True),
    "phi": replace(
        LLAMA,
        mlp_in=("mlp.fc1",),
        mlp_out="mlp.fc2",
        attention_out="self_attn.dense",
        final_norm="model.final_layernorm",
    ),
    "phi3": FUSED,
    "glm": FUSED,
    "glm4": FUSED,
    "starcoder2": replace(LLAMA, mlp_in=("mlp.c_fc",), mlp_out="mlp.c_proj", tied=True),
    "opt": OPT,
    "opt-post-norm": replace(OPT, final_norm=None),
    "falcon": BLOOM,
    "falcon-new": BLOOM,
    "bloom": BLOOM,
    "mpt": replace(
        GPTJ,
        blocks="transformer.blocks",
        mlp_in=("ffn.up_proj",),
        mlp_out="ffn.down_proj",
        mlp="ffn",
        final_norm="transformer.norm_f",
        tied=True,
    ),
}
EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next"]


def short(block: BlockAnatomy) -> dict[str, str | None]:
    """MLP, attention and experts of a block, relative to it."""

    def inside(path: str | None) -> str | None:
        return path and path.removeprefix(f"{block.path}.")

    return {
        "mlp_out": inside(block.mlp_out and block.mlp_out.parameter),
        "attention": inside(block.attention),
        "experts": ", ".join(str(inside(site.parameter)) for site in block.experts),
    }


@pytest.mark.parametrize("name", DENSE)
def test_dense_decoders_are_found_as_they_are_known(name):
    assert find_anatomy(FAMILIES[name]()) == DENSE[name].anatomy()


def test_every_family_has_an_expectation():
    others = {"qwen3_5_text", "mamba", "t5", "t5-gated"}
    assert FAMILIES.keys() == DENSE.keys() | set(EXPERTS) | others


@pytest.mark.parametrize("name", DENSE)
def test_found_matrices_map_what_comes_in_to_what_goes_out(name):
    model = FAMILIES[name]()
    anatomy = find_anatomy(model)
    sites = [
        site
        for block in anatomy.blocks
        for site in (block.mlp_out, *block.mlp_in, block.attention_out)
        if site is not None
    ]
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for site in sites:

        def note(
            _: nn.Module, args: tuple[Tensor], output: Tensor, path: str = site.module
        ) -> None:
            seen[path] = args[0].clone(), output.clone()  # Falcon adds to the output in place

        model.get_submodule(site.module).register_forward_hook(note)

    with torch.no_grad():
        model(input_ids=TOKENS)

    for site in sites:
        given, returned = seen[site.module]
        bias = getattr(model.get_submodule(site.module), "bias", None)
        expected = given @ site.view(model.get_parameter(site.parameter)).T
        expected = expected if bias is None else expected + bias
        torch.testing.assert_close(returned, expected.detach())


@pytest.mark.parametrize("name", ["t5", "t5-gated"])
def test_encoder_decoder(name):
    anatomy = find_anatomy(FAMILIES[name]())
    inputs = ("wi_0", "wi_1") if name == "t5-gated" else ("wi",)

    def block(path: str, mlp: str) -> BlockAnatomy:
        mlp = f"{path}.{mlp}.DenseReluDense"
        return BlockAnatomy(
            path=path,
            mlp_out=Site(f"{mlp}.wo.weight"),
            mlp_in=tuple(Site(f"{mlp}.{name}.weight") for name in inputs),
            mlp=mlp,
            attention=f"{path}.layer.0.SelfAttention",
            attention_out=Site(f"{path}.layer.0.SelfAttention.o.weight"),
        )

    assert anatomy == Anatomy(
        blocks=tuple(block(f"decoder.block.{i}", "layer.2") for i in range(BLOCKS)),
        encoder_blocks=tuple(block(f"encoder.block.{i}", "layer.1") for i in range(2)),
        final_norm="decoder.final_layer_norm",
        head="lm_head",
        embedding="shared",
        tied=True,  # transformers 5 ties the gated kind too, whatever its config says
        hidden_size=HIDDEN,
        layer_output="tuple",
    )


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_blocks_of_routed_experts_have_no_mlp(name):
    for block in find_anatomy(FAMILIES[name]()).blocks:
        assert (block.mlp_out, block.mlp_in, block.mlp) == (None, (), None)
        assert short(block)["experts"] == "mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("name", "shared"), [("qwen2_moe", "mlp.shared_expert"), ("deepseek_v3", "mlp.shared_experts")]
)
def test_shared_experts_are_an_mlp(name, shared):
    dense, *mixed = find_anatomy(FAMILIES[name]()).blocks

    assert short(dense) == {
        "mlp_out": "mlp.down_proj.weight",
        "attention": "self_attn",
        "experts": "",
    }
    for block in mixed:
        assert block.mlp == f"{block.path}.{shared}"
        assert len(block.mlp_in) == 2
        assert short(block) == {
            "mlp_out": f"{shared}.down_proj.weight",
            "attention": "self_attn",
            "experts": "mlp.experts.down_proj",
        }


@pytest.mark.parametrize("name", EXPERTS)
def test_rows_of_expert_matrices_are_output_features(name):
    model = FAMILIES[name]()
    block = find_anatomy(model).blocks[-1]
    (site,) = block.experts
    stack = model.get_parameter(site.parameter)
    with torch.no_grad():
        for expert in range(len(stack)):
            replace(site, expert=expert).view(stack)[5] = 0.0
    outputs: list[Tensor] = []
    model.get_submodule(site.module).register_forward_hook(lambda *call: outputs.append(call[2]))

    model(input_ids=TOKENS)

    assert not outputs[0][..., 5].any()
    assert outputs[0][..., 6].any()


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text"])
def test_layers_of_different_kinds_are_told_apart(name):
    first, second, third = find_anatomy(FAMILIES[name]()).blocks

    assert short(first)["attention"] == short(third)["attention"] == "linear_attn"
    assert short(second)["attention"] == "self_attn"
    assert second.attention_out == Site("model.layers.1.self_attn.o_proj.weight")
    assert third.attention_out == Site("model.layers.2.linear_attn.out_proj.weight")
    assert short(second)["mlp_out"] == "mlp.down_proj.weight"


def test_model_without_mlp():
    anatomy = find_anatomy(FAMILIES["mamba"]())

    for block in anatomy.blocks:
        assert (block.mlp_out, block.mlp_in, block.mlp) == (None, (), None)
        assert short(block)["attention"] == "mixer"
    assert anatomy.final_norm == "backbone.norm_f"
    assert "mlp_out        none" in anatomy.describe()


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_changes_nothing(name):
    assert find_anatomy(FAMILIES[name]().bfloat16()) == find_anatomy(FAMILIES[name]())


@pytest.mark.parametrize("name", ["gpt2-square", "falcon", "mixtral", "qwen3_5_text", "t5"])
def test_float16_changes_nothing(name):
    assert find_anatomy(FAMILIES[name]().half()) == find_anatomy(FAMILIES[name]())


@pytest.mark.parametrize("name", FAMILIES)
def test_structure_is_found_without_numbers(name):
    with torch.device("meta"):
        # bfloat16: torch's grouped product of experts has no other type on this device
        model = FAMILIES[name]().bfloat16()

    assert find_anatomy(model) == find_anatomy(FAMILIES[name]())


def test_large_model_on_the_meta_device():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # the sizes of Llama-2-7B

    anatomy = find_anatomy(model)

    assert len(anatomy.blocks) == 32
    assert anatomy.hidden_size == 4096
    assert anatomy.blocks[31] == LLAMA.block(31)


def test_offloaded_weights():
    model = FAMILIES["gpt2-square"]()
    expected = find_anatomy(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.transformer.wte.weight.is_meta

    assert find_anatomy(model) == expected


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon", "mixtral", "t5"])
def test_model_is_left_as_it_was(name):
    model = FAMILIES[name]().train()
    first = model.get_submodule(find_anatomy(model).blocks[0].path)
    first.eval()
    for parameter in first.parameters():
        parameter.requires_grad = False
    handle = model.register_forward_hook(lambda *_: None)

    def state() -> list[object]:
        modules = list(model.modules())
        return [
            [module.training for module in modules],
            [
                sum(len(value) for key, value in vars(module).items() if "hook" in key and value)
                for module in modules
            ],
            [parameter.requires_grad for parameter in model.parameters()],
            [parameter.grad for parameter in model.parameters()],
            {key: tensor.numpy().tobytes() for key, tensor in model.state_dict().items()},
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
        ]

    before = state()
    find_anatomy(model)
    assert state() == before

    with pytest.raises(SiteError):
        find_anatomy(model, {"blocks": "nowhere"})
    assert state() == before
    handle.remove()


class TurnedLinear(nn.Module):
    """A projection that keeps its weight (d_in, d_out) and is of no class that anyone knows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().T.clone())

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight


def test_orientation_of_a_square_matrix_is_read_from_numbers():
    model = FAMILIES["llama-square"]()
    model.model.layers[1].mlp.down_proj = TurnedLinear(model.model.layers[1].mlp.down_proj)

    blocks = find_anatomy(model).blocks

    assert [block.mlp_out.transposed for block in blocks] == [False, True, False]


class PackedLinear(nn.Module):
    """A quantised projection as bitsandbytes makes them: its weight is no matrix any more."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.shape = packed.shape
        self.weight = nn.Parameter(packed.view(-1, 1), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ (self.weight.view(self.shape) * self.scale).T


def test_quantised_projections():
    model = FAMILIES["llama-square"]()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            model.set_submodule(path, PackedLinear(module))

    assert find_anatomy(model) == DENSE["llama-square"].anatomy()


class SequenceFirst(nn.Module):
    """Runs a block on (position, batch, feature) hidden states, as ChatGLM2 does."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attention = Swapped(block.self_attn)
        self.mlp = block.mlp

    def forward(self, hidden: Tensor, **kwargs: object) -> Tensor:
        hidden = hidden + self.attention(hidden, **kwargs)
        return hidden + self.mlp(hidden)


class Swapped(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner = attention

    def forward(self, hidden: Tensor, **kwargs: object) -> Tensor:
        return self.inner(hidden.transpose(0, 1), **kwargs)[0].transpose(0, 1)


def sequence_first() -> PreTrainedModel:
    model = FAMILIES["llama"]()
    model.model.layers = nn.ModuleList(SequenceFirst(block) for block in model.model.layers)
    model.model.layers[0].register_forward_pre_hook(lambda _, args: (args[0].transpose(0, 1),))
    model.model.norm.register_forward_pre_hook(lambda _, args: (args[0].transpose(0, 1),))
    return model


def test_sequence_first_hidden_states():
    anatomy = find_anatomy(sequence_first())

    assert anatomy.sequence_first
    assert short(anatomy.blocks[1])["attention"] == "attention.inner"
    assert short(anatomy.blocks[1])["mlp_out"] == "mlp.down_proj.weight"


def test_sequence_first_models_are_refused():
    with pytest.raises(ModelError, match="the position first and the row of the batch second"):
        ModelHost(sequence_first(), tiny_tokenizer(), "turned")


class ExpertList(nn.Module):
    """Experts as modules in a list; every token goes through the second one."""

    def __init__(self, mlp: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList([mlp, other])

    def forward(self, hidden: Tensor) -> Tensor:
        return self.experts[1](hidden)


def test_a_routed_expert_in_a_list_is_no_mlp():
    model = FAMILIES["llama"]()
    for block, other in zip(model.model.layers, FAMILIES["llama"]().model.layers, strict=True):
        block.mlp = ExpertList(block.mlp, other.mlp)

    assert all(block.mlp_out is None for block in find_anatomy(model).blocks)


def test_a_narrow_adapter_after_the_mlp_is_not_the_mlp():
    model = FAMILIES["gpt2"]()
    for block in model.transformer.h:
        adapter = nn.Sequential(nn.Linear(HIDDEN, 8), nn.Linear(8, HIDDEN))
        block.mlp.add_module("adapter", adapter)
        block.mlp.register_forward_hook(lambda mlp, _, output: output + mlp.adapter(output))

    assert find_anatomy(model) == DENSE["gpt2"].anatomy()


def test_override_replaces_single_fields():
    override = {"blocks": "transformer.h", "attention_out": "mlp.c_fc", "final_norm": "transformer"}
    found = find_anatomy(FAMILIES["gpt2"](), override)

    expected = replace(GPT2, attention_out="mlp.c_fc", final_norm="transformer").anatomy()
    assert found == expected


def test_override_of_several_inputs():
    found = find_anatomy(FAMILIES["llama"](), {"mlp_in": "mlp.up_proj, mlp.gate_proj"})

    assert [site.module for site in found.blocks[2].mlp_in] == [
        "model.layers.2.mlp.up_proj",
        "model.layers.2.mlp.gate_proj",
    ]


def test_override_counts_where_a_block_has_the_module():
    found = find_anatomy(FAMILIES["qwen3_5_text"](), {"attention": "self_attn"})

    kinds = [short(block)["attention"] for block in found.blocks]
    assert kinds == ["linear_attn", "self_attn", "linear_attn"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ({"mlp_uot": "mlp.c_proj"}, "'mlp_uot' .* Did you mean 'mlp_out'?"),
        ({"mlp_out": "mlp.c_pro"}, "'mlp.c_pro' for `mlp_out`.* Did you mean 'mlp.c_proj'?"),
        (
            {"blocks": "transformer.g"},
            "'transformer.g' for `blocks`.* Did you mean 'transformer.h'?",
        ),
        ({"blocks": "transformer.wte"}, "'transformer.wte' cannot be `blocks`"),
    ],
)
def test_wrong_override(override, sentence):
    with pytest.raises(SiteError, match=sentence):
        find_anatomy(FAMILIES["gpt2"](), override)


class Bag(PreTrainedModel):
    """Embeds, averages nothing, has a list of modules that never runs, and no blocks."""

    config_class = PreTrainedConfig

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.embed_tokens = nn.Embedding(50, HIDDEN)
        self.spare = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.lm_head = nn.Linear(HIDDEN, 50)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        return self.lm_head(self.embed_tokens(input_ids))


def test_model_without_blocks_says_what_was_seen():
    with pytest.raises(SiteError) as caught:
        find_anatomy(Bag())

    message = str(caught.value)
    assert message.startswith("Bag has no module list that could be its blocks")
    assert "'spare' (4 modules, 0 ran)" in message
    assert "ArchitectureSpec" in message


def test_model_without_head():
    with pytest.raises(SiteError, match=r"GPT2Model has no output head: .*AutoModelForCausalLM"):
        find_anatomy(GPT2Model(FAMILIES["gpt2"]().config))


def test_model_that_does_not_run_on_tokens_alone():
    model = FAMILIES["gpt2"]()
    model.transformer.wte.register_forward_hook(lambda *_: 1 / 0)

    with pytest.raises(ModelError, match=r"GPT2LMHeadModel does not run on token ids alone.*Zero"):
        find_anatomy(model)
    assert not model.transformer.h[0]._forward_hooks


def test_description_joins_equal_blocks():
    assert (
        find_anatomy(FAMILIES["qwen3_5_text"]()).describe()
        == """\
embedding        model.embed_tokens
blocks           model.layers.0, 2
  mlp            mlp
  mlp_in         mlp.gate_proj.weight, mlp.up_proj.weight
  mlp_out        mlp.down_proj.weight
  attention      linear_attn
  attention_out  linear_attn.out_proj.weight
blocks           model.layers.1
  mlp            mlp
  mlp_in         mlp.gate_proj.weight, mlp.up_proj.weight
  mlp_out        mlp.down_proj.weight
  attention      self_attn
  attention_out  self_attn.o_proj.weight
final_norm       model.norm
head             lm_head
hidden_size      32
layer_output     tensor"""
    )


def test_description_names_orientation_and_tying():
    text = find_anatomy(FAMILIES["gpt2"]()).describe()

    assert "blocks           transformer.h.0-2\n" in text
    assert "mlp_out        mlp.c_proj.weight (transposed)\n" in text
    assert "head             lm_head, weight shared with the embedding\n" in text


def test_hidden_state_of_a_tensor_is_the_whole_batch():
    hidden, new = torch.randn(2, 3, INNER), torch.zeros(2, 3, INNER)

    assert hidden_of(hidden) is hidden
    assert with_hidden(hidden, new) is new


@pytest.mark.parametrize("kind", [tuple, list])
def test_hidden_state_of_a_sequence_is_its_first(kind):
    hidden, new = torch.randn(2, 3, INNER), torch.zeros(2, 3, INNER)
    output = kind([hidden, None, "rest"])

    assert hidden_of(output) is hidden
    changed = with_hidden(output, new)
    assert isinstance(changed, kind)
    assert changed[0] is new
    assert changed[1:] == output[1:]


@pytest.mark.parametrize("output", [None, (), (None, torch.zeros(1)), {"hidden": torch.zeros(1)}])
def test_output_without_hidden_state_is_refused(output):
    with pytest.raises(ModelError, match="no hidden state"):
        hidden_of(output)
    with pytest.raises(ModelError, match="no hidden state"):
        with_hidden(output, torch.zeros(1))


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_replacing_hidden_states_in_a_hook_works_in_both_forms(name):
    model = FAMILIES[name]()
    block = model.get_submodule(find_anatomy(model).blocks[-1].path)
    block.register_forward_hook(lambda _, __, out: with_hidden(out, hidden_of(out).flip(0)))

    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits
        expected = FAMILIES[name]()(input_ids=TOKENS.flip(0)).logits

    torch.testing.assert_close(logits, expected)
