"""How cases are edited: one by one, in batches, or in a sequence."""

from __future__ import annotations

from dataclasses import dataclass

from kedit_core.errors import SettingError


@dataclass(frozen=True)
class Regime:
    """How many cases are edited together, and whether edits stay while others follow.

    Attributes:
        size: cases that are edited in one step.
        keeps: whether a step's edits stay in force for the steps after it.
    """

    size: int = 1
    keeps: bool = False

    @classmethod
    def parse(cls, text: str) -> Regime:
        """`single`, `batch:N`, `sequential` or `sequential:N`.

        Raises:
            SettingError: it is none of these.
        """
        word, _, number = text.partition(":")
        sized = number.isdecimal() and int(number) > 0
        if text == "single":
            return cls()
        if word == "sequential" and (sized or not number):
            return cls(int(number or 1), keeps=True)
        if word == "batch" and sized:
            return cls(int(number))
        raise SettingError(
            f"There is no regime '{text}'. Known: single, batch:N, sequential, sequential:N."
        )
