"""Where the value of a hyperparameter comes from, and what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pydantic
import pytest

from kedit_core import MethodSpec, PluginError, SettingError
from kedit_core.hparams import parse_settings, presets_of, resolve

HPARAMS = """
from typing import Literal
from pydantic import Field
from kedit_core import HyperParams

class Odd(HyperParams):
    layer: int = Field(ge=0)
    steps: int = Field(25, gt=0)
    lr: float = Field(0.5, gt=0)
    key: Literal["mean", "plain"] = "mean"
    bound: float | None = Field(None, gt=0)
    layers: tuple[int, ...] = ()
"""
PRESETS = {
    "big": "methods: [odd, odder]\nsource: arXiv:0000.00000\n"
    "fits: {model_type: wide, hidden_size: 64}\nsettings: {layer: 17, steps: 20, lr: 5e-1}\n",
    "small": "methods: [odd]\nsource: Tuned.\nfits: {model_type: narrow}\nsettings: {layer: 3}\n",
    "anywhere": "methods: [odd]\nsource: Tuned.\nsettings: {layer: 1}\n",
    "foreign": "methods: [even]\nsource: Tuned.\nsettings: {parity: 2}\n",
}
WIDE = {"model_type": "wide", "hidden_size": 64, "num_hidden_layers": 48}


@pytest.fixture
def presets(tmp_path, monkeypatch) -> Path:
    """Folder of the presets of a method package `oddpkg` that can be imported."""
    folder = tmp_path / "oddpkg" / "presets"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").touch()
    (folder.parent / "hparams.py").write_text(HPARAMS)
    for name, text in PRESETS.items():
        (folder / f"{name}.yaml").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [n for n in sys.modules if n.split(".")[0] == "oddpkg"]:
        del sys.modules[name]


@pytest.fixture
def odd(presets) -> MethodSpec:
    return MethodSpec(
        "odd",
        "oddpkg.method:Odd",
        "A method.",
        hparams="oddpkg.hparams:Odd",
        presets="oddpkg.presets",
    )


@pytest.fixture
def odder(presets) -> MethodSpec:
    return MethodSpec(
        "odder",
        "oddpkg.method:Odd",
        "A variant.",
        hparams="oddpkg.hparams:Odd",
        presets="oddpkg.presets",
        variant_of="odd",
        defaults={"key": "plain", "steps": 7, "lr": 2},
    )


def problem(spec, **options) -> str:
    with pytest.raises(SettingError) as caught:
        resolve(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- provenance ----------------------------------------------------------------------------------


def test_each_source_overrides_the_one_before_and_is_named(odder, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 0.25\nbound: 1.0\n")

    found = resolve(odder, preset="big", file=file, settings={"bound": 2.0, "layers": [1, 2]})

    assert found.hparams.model_dump() == {
        "layer": 17,
        "steps": 20,
        "lr": 0.25,
        "key": "plain",
        "bound": 2.0,
        "layers": (1, 2),
    }
    assert found.origin == {
        "layer": "preset big",
        "steps": "preset big",
        "lr": str(file),
        "key": "odder",
        "bound": "set",
        "layers": "set",
    }


def test_value_that_nobody_gives_is_the_default(odd):
    found = resolve(odd, settings={"layer": 2})

    assert found.hparams.steps == 25
    assert found.origin["steps"] == "default"
    assert found.origin["layer"] == "set"


def test_result_is_frozen(odd):
    found = resolve(odd, settings={"layer": 2})

    with pytest.raises(pydantic.ValidationError):
        found.hparams.layer = 3


# -- presets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "layer"),
    [(WIDE, 17), ({"model_type": "narrow", "hidden_size": 8}, 3)],
)
def test_preset_is_chosen_by_the_models_config(odd, config, layer):
    assert resolve(odd, config=config).hparams.layer == layer


@pytest.mark.parametrize(
    "config",
    [
        {**WIDE, "hidden_size": 65},
        {"model_type": "wide"},
        {"model_type": "other", "_name_or_path": "big", "name": "small"},
        {},
        None,
    ],
)
def test_no_preset_is_taken_when_the_config_differs_whatever_the_name(odd, config):
    message = problem(odd, config=config)

    assert message == (
        "odd needs a value for 'layer', and no preset of it fits this model. Give --set layer=…, "
        "or choose a preset: anywhere, big, small."
    )


def test_named_preset_wins_over_the_config(odd):
    found = resolve(odd, preset="anywhere", config=WIDE)

    assert (found.hparams.layer, found.origin["layer"]) == (1, "preset anywhere")


def test_presets_are_those_of_the_method(odd, odder):
    assert [p.name for p in presets_of(odd)] == ["anywhere", "big", "small"]
    assert [p.name for p in presets_of(odder)] == ["big"]
    assert presets_of(odd)[1].source == "arXiv:0000.00000"


def test_unknown_preset_is_answered_with_the_nearest(odd):
    assert problem(odd, preset="smal") == "odd has no preset 'smal'. Did you mean 'small'?"
    assert problem(odd, preset="foreign").startswith("odd has no preset 'foreign'.")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("methods: [odd]\nsettings: {}\n", "the keys are methods, source, fits and settings"),
        ("methods: [odd]\nsource: x\nsettings: {}\nfit: {}\n", "the keys are methods, source"),
        ("methods: [odd]\nsource: x\nsettings:\n", "`settings` is no mapping"),
        ("methods: [odd]\nsource: x\nfits: [1]\nsettings: {}\n", "`fits` is no mapping"),
        ("methods: [odd]\nsource: 5\nsettings: {}\n", "`source` is no text"),
        *(
            (f"methods: {given}\nsource: x\nsettings: {{}}\n", "`methods` is no list of names")
            for given in ("odd", "", "[]", "[1]", "{odd: 1}")
        ),
        ("- odd\n", "broken.yaml is no mapping"),
        ("methods: [odd\n", "broken.yaml is not YAML"),
    ],
)
def test_malformed_preset_is_named(odd, presets, text, words):
    (presets / "broken.yaml").write_text(text)

    message = problem(odd, preset="big")
    assert words in message
    assert "broken.yaml" in message


def test_package_of_presets_that_does_not_exist_is_named(odd, odder):
    mistaken = replace(odd, presets="oddpkg.preset"), replace(odder, presets="no_such.presets")

    for spec, problem in zip(
        mistaken,
        (
            "The presets of odd, 'oddpkg.preset', cannot be imported: the package 'oddpkg' has no "
            "module 'oddpkg.preset'.",
            "The presets of odder, 'no_such.presets', cannot be imported: it needs the package "
            "'no_such', which is not installed.",
        ),
        strict=True,
    ):
        with pytest.raises(PluginError) as caught:
            presets_of(spec)
        assert str(caught.value) == problem


def test_preset_with_an_unknown_key_is_named(odd, presets):
    (presets / "broken.yaml").write_text("methods: [odd]\nsource: x\nsettings: {stepz: 1}\n")

    assert problem(odd, preset="broken") == (
        "Unknown setting 'stepz' of odd (preset broken). Did you mean 'steps'?"
    )


# -- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"), [("5e-1", 0.5), ("5.0e-1", 0.5), ("1", 1.0), ("1e3", 1000.0)]
)
def test_scientific_notation_is_a_number_everywhere(odd, tmp_path, text, value):
    file = tmp_path / "mine.yaml"
    file.write_text(f"lr: {text}\nbound: {text}\n")

    by_file = resolve(odd, preset="small", file=file).hparams
    by_set = resolve(odd, preset="small", settings=parse_settings([f"lr={text}"])).hparams

    assert (by_file.lr, by_file.bound, by_set.lr) == (value, value, value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "Setting 'steps' = 0 of odd (set): input should be greater than 0."),
        ({"layer": -1}, "Setting 'layer' = -1 of odd (set): input should be greater than or equal"),
        ({"lr": "fast"}, "Setting 'lr' = 'fast' of odd (set): input should be a valid number"),
        (
            {"lr": float("nan")},
            "Setting 'lr' = nan of odd (set): input should be a finite number.",
        ),
        (
            {"lr": float("inf")},
            "Setting 'lr' = inf of odd (set): input should be a finite number.",
        ),
        ({"steps": 2.5}, "Setting 'steps' = 2.5 of odd (set): input should be a valid integer"),
        ({"key": "men"}, "Setting 'key' = 'men' of odd (set): input should be 'mean' or 'plain'."),
        ({"layers": [1, "x"]}, "Setting 'layers' = 'x' of odd (set): input should be a valid int"),
        ({"layers": 3}, "Setting 'layers' = 3 of odd (set): input should be a list; write [3]."),
        ({"layers": "3,4"}, "Setting 'layers' = '3,4' of odd (set): input should be a list; write"),
        ({"stps": 3}, "Unknown setting 'stps' of odd (set). Did you mean 'steps'?"),
        ({"zzz": 3}, "Unknown setting 'zzz' of odd (set). Known: bound, key, layer"),
    ],
)
def test_wrong_value_is_one_sentence_with_its_origin(odd, settings, message):
    assert problem(odd, preset="small", settings=settings).startswith(message)


def test_wrong_value_in_a_file_names_the_file(odd, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: -1\n")

    assert problem(odd, preset="small", file=file) == (
        f"Setting 'lr' = -1 of odd ({file}): input should be greater than 0."
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- lr: 1\n", "is no mapping"),
        (b"", "is no mapping"),
        (b"lr", "is no mapping"),
        (b"lr: [\n", "is not YAML"),
        (b"lr: !!python/object:a.B c\n", "is not YAML"),
        (b"lr: 2024-13-45\n", "is not YAML"),
        (b"5: x\n", "Unknown setting '5' of odd"),
        (b"lr: \xff\n", "cannot be read"),
    ],
)
def test_malformed_file_is_one_sentence_that_names_it(odd, tmp_path, content, words):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)

    message = problem(odd, preset="small", file=file)
    assert words in message
    assert str(file) in message


def test_file_may_be_a_preset_of_the_method(odd, odder, tmp_path):
    file = tmp_path / "tuned.yaml"
    file.write_text("methods: [odd]\nsource: Tuned.\nfits: {}\nsettings: {layer: 9}\n")

    assert resolve(odd, file=file, config=WIDE).hparams.layer == 9
    assert "a preset of odd, not odder" in problem(odder, file=file, config=WIDE)
    file.write_text("methods: odd\nsource: Tuned.\nsettings: {layer: 9}\n")
    assert problem(odd, file=file) == (
        f"Preset {file}: `methods` is no list of names, such as [rome]."
    )
    file.write_text("methods: [odd]\nsettings: {layer: 9}\n")
    assert str(file) in problem(odd, file=file, config=WIDE)


def test_missing_file_is_named(odd, tmp_path):
    assert "none.yaml cannot be read" in problem(odd, file=tmp_path / "none.yaml")


def test_method_without_presets_says_only_what_to_set(odd):
    bare = MethodSpec("bare", odd.target, "A method.", hparams=odd.hparams)

    assert problem(bare).endswith("Give --set layer=….")
    assert problem(bare, preset="big") == "bare has no preset 'big'. None are known."


@pytest.mark.parametrize("target", ["", "oddpkg.nowhere:Odd", "oddpkg.hparams:Even", "oddpkg"])
def test_hyperparameters_that_cannot_be_imported_are_the_plugins_fault(odd, target):
    with pytest.raises(PluginError, match=r"cannot be imported|does not exist"):
        resolve(MethodSpec("lost", odd.target, "A method.", hparams=target))


# -- KEY=VALUE -----------------------------------------------------------------------------------


def test_pairs_are_read_as_yaml():
    pairs = ["layer=5", " lr = 5e-1", "layers=[1, 2]", "bound=null", "text=a=b", "flag=true"]

    assert parse_settings(pairs) == {
        "layer": 5,
        "lr": "5e-1",
        "layers": [1, 2],
        "bound": None,
        "text": "a=b",
        "flag": True,
    }


def test_later_pair_wins():
    assert parse_settings(["layer=5", "layer=6"]) == {"layer": 6}


@pytest.mark.parametrize("pair", ["layer", "=5", " =5", "", "a=[1", "a=2024-13-45", "a=!!x/y z"])
def test_malformed_pair_is_shown(pair):
    with pytest.raises(SettingError) as caught:
        parse_settings([pair])

    assert repr(pair) in str(caught.value)
    assert "\n" not in str(caught.value)
