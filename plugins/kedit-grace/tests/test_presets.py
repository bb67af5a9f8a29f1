"""The presets: published settings, chosen by config."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from kedit_core import discover
from kedit_core.hparams import presets_of, resolve
from kedit_core.models import config_facts

# The shapes of published models, as their configs give them; layer, module and steps as the
# source gives them.  All have a radius and a learning rate of 1 and write at the last token.
PUBLISHED = {
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48}, (35, "mlp_in", 200)),
    "gpt-j-6b": ("gptj", {"n_embd": 4096, "n_layer": 28, "rotary_dim": 64}, (25, "mlp_out", 200)),
    "llama-2-7b": (
        "llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008},
        (27, "mlp_out", 50),
    ),
    "llama-3.2-3b": (
        "llama",
        {"hidden_size": 3072, "num_hidden_layers": 28, "intermediate_size": 8192},
        (27, "mlp_out", 50),
    ),
    "qwen2.5-7b": (
        "qwen2",
        {"hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944},
        (18, "mlp_out", 50),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_is_chosen_by_config_and_gives_the_published_settings(name):
    kind, shape, expected = PUBLISHED[name]
    config = config_facts(AutoConfig.for_model(kind, **shape).to_dict())

    settings = resolve(discover().method("grace"), config=config)

    hparams = settings.hparams
    assert settings.origin["layer"] == f"preset {name}"
    assert (hparams.layer, hparams.module, hparams.steps) == expected
    assert (hparams.eps, hparams.lr, hparams.start) == (1.0, 1.0, "cold")
    assert (hparams.replace, hparams.decode) == ("last", "none")
    assert sum(preset.suits(config) for preset in presets_of(discover().method("grace"))) == 1


def test_every_preset_is_valid_and_names_its_source():
    spec = discover().method("grace")
    presets = presets_of(spec)
    assert {preset.name for preset in presets} == {*PUBLISHED, "smollm2-135m", "toy"}
    for preset in presets:
        assert preset.source
        resolved = resolve(spec, preset=preset.name)
        assert all(resolved.origin[key] == f"preset {preset.name}" for key in preset.settings)
