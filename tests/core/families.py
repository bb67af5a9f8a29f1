"""Tiny random models of many families: hidden size 32, MLP size 64, three blocks, 100 tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

HIDDEN, INNER, BLOCKS, VOCABULARY, HEADS = 32, 64, 3, 100, 4

LLAMA_LIKE = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
GPT_LIKE = {"n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": HEADS, "n_inner": INNER}
PLAIN = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
}
T5_LIKE = {
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": INNER,
    "num_layers": 2,
    "num_decoder_layers": BLOCKS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
}
MOE = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
OPT = {"hidden_size": HIDDEN, "ffn_dim": INNER, "num_hidden_layers": BLOCKS}

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": GPT_LIKE,
    "gpt2-square": {**GPT_LIKE, "model_type": "gpt2", "n_inner": HIDDEN},
    "gptj": {**GPT_LIKE, "rotary_dim": 4},
    "gpt_neo": {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_layers": BLOCKS,
        "num_heads": HEADS,
        "attention_types": [[["global", "local", "global"], 1]],
    },
    "gpt_neox": PLAIN,
    "codegen": {**GPT_LIKE, "rotary_dim": 4, "n_ctx": 64},
    "llama": LLAMA_LIKE,
    "llama-square": {**LLAMA_LIKE, "model_type": "llama", "intermediate_size": HIDDEN},
    "mistral": LLAMA_LIKE,
    "internlm3": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 16},
    "gemma2": {**LLAMA_LIKE, "head_dim": 16},
    "gemma3_text": {**LLAMA_LIKE, "head_dim": 16},
    "phi": PLAIN,
    "phi3": LLAMA_LIKE,
    "olmo2": LLAMA_LIKE,
    "glm": LLAMA_LIKE,
    "glm4": LLAMA_LIKE,
    "stablelm": LLAMA_LIKE,
    "cohere": LLAMA_LIKE,
    "starcoder2": LLAMA_LIKE,
    "granite": LLAMA_LIKE,
    "smollm3": LLAMA_LIKE,
    "opt": {**OPT, "num_attention_heads": HEADS, "word_embed_proj_dim": HIDDEN},
    "opt-post-norm": {
        **OPT,
        "model_type": "opt",
        "num_attention_heads": HEADS,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    },
    "falcon": {**PLAIN, "ffn_hidden_size": INNER, "multi_query": True, "parallel_attn": True},
    "falcon-new": {
        **PLAIN,
        "model_type": "falcon",
        "ffn_hidden_size": INNER,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
    },
    "bloom": {"hidden_size": HIDDEN, "n_layer": BLOCKS, "n_head": HEADS},
    "mpt": {"d_model": HIDDEN, "n_layers": BLOCKS, "n_heads": HEADS, "expansion_ratio": 2},
    "mixtral": {**LLAMA_LIKE, "num_local_experts": 4},
    "qwen2_moe": {
        **LLAMA_LIKE,
        **MOE,
        "shared_expert_intermediate_size": INNER,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {**LLAMA_LIKE, **MOE},
    "gpt_oss": {**LLAMA_LIKE, "intermediate_size": HIDDEN, "num_local_experts": 4},
    "deepseek_v3": {
        **PLAIN,
        "num_key_value_heads": HEADS,
        "moe_intermediate_size": 48,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "qwen3_next": {
        **LLAMA_LIKE,
        **MOE,
        **DELTA_NET,
        "shared_expert_intermediate_size": INNER,
        "mlp_only_layers": [0, 1],
    },
    "qwen3_5_text": {**LLAMA_LIKE, **DELTA_NET},
    "mamba": {"hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "state_size": 4},
    "t5": T5_LIKE,
    "t5-gated": {
        **T5_LIKE,
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
}


def config_of(name: str) -> PreTrainedConfig:
    """The tiny config of a family."""
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    settings = {"model_type": name, **tokens, **CONFIGS[name]}
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def build(name: str) -> PreTrainedModel:
    """The tiny model of a family in evaluation mode; the same weights every time."""
    config = config_of(name)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return auto.from_config(config).eval()


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    name: partial(build, name) for name in CONFIGS
}
