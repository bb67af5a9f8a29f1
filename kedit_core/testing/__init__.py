"""Toy models and the conformance suite: what every method must do, to be tested in any plugin.

    @parametrize_checks("rome", hparams={"layer": 1})
    def test_conformance(check):
        check()

Names are imported at first use: this package is also where an entry point lives.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kedit_core.testing.conformance import all_checks, parametrize_checks, run_checks
    from kedit_core.testing.toys import load_toy, toy_corpus, toy_facts, toy_folder

_LAZY = {
    "all_checks": "conformance",
    "parametrize_checks": "conformance",
    "run_checks": "conformance",
    "load_toy": "toys",
    "toy_corpus": "toys",
    "toy_facts": "toys",
    "toy_folder": "toys",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"kedit_core.testing.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'kedit_core.testing' has no attribute '{name}'")


__all__ = [
    "all_checks",
    "load_toy",
    "parametrize_checks",
    "run_checks",
    "toy_corpus",
    "toy_facts",
    "toy_folder",
]
