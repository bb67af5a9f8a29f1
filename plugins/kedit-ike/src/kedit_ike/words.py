"""How facts and demonstrations are written (arXiv:2305.12740)."""

from __future__ import annotations

from kedit_core.words import separator


def statement(prompt: str, answer: str) -> str:
    """A prompt with its answer."""
    return prompt + separator(prompt, answer) + answer


def demonstration(fact: str, answered: str) -> str:
    """A fact, and a prompt with the answer that follows."""
    return f"New Fact: {fact}\nPrompt: {answered}\n\n"


def fact_lines(instruction: str, fact: str) -> str:
    """What stands right before the question."""
    return f"{instruction}{instruction and chr(10)}New Fact: {fact}\nPrompt: "
