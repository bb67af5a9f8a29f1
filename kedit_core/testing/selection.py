"""Which checks apply to a method: marks on check functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from kedit_core.spec import Effect

F = TypeVar("F", bound=Callable[..., None])

ALL_EFFECTS: frozenset[Effect] = frozenset({"weights", "modules", "calls"})


def only_for(*effects: Effect) -> Callable[[F], F]:
    """Decorator: the check is about methods with these kinds of effect only."""

    def mark(function: F) -> F:
        function.__dict__["effects"] = frozenset(effects)
        return function

    return mark


def once(function: F) -> F:
    """Decorator: the check does not depend on the model and runs for the first layout only."""
    function.__dict__["once"] = True
    return function


def about_facts(function: F) -> F:
    """Decorator: the check is about methods that write what a request says."""
    function.__dict__["about_facts"] = True
    return function
