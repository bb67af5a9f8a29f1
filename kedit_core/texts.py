"""Texts that a model writes: where an answer ends, whether one stands there, variety of words."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from kedit_core.words import is_spaced

NATURAL_TOKENS = 50  # as long as an answer may be until its natural end, arXiv:2502.11177

_MARKS = " .!?…。！？"  # at the end of an answer that may as well be without

_END = re.compile(r"\n|(?<=\.)(?=\s|$)|(?<=。)")
_WORDS = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


def natural_end(text: str) -> str:
    """A text up to its first line break, or the first full stop that ends a sentence.

    A full stop inside a word or number (`U.S`, `1.5`) ends none; a Chinese one (`。`) always does.
    """
    return _END.split(text.strip(), maxsplit=1)[0].strip()


def first_line(text: str) -> str:
    """A text's first line that is not empty."""
    return text.strip().partition("\n")[0].strip()


def folded(text: str) -> str:
    """A text without regard to case and to the kind of its apostrophes."""
    return text.casefold().replace("’", "'").replace("‘", "'")


def begins_with(text: str, answer: str) -> bool:
    """Whether a text begins with the answer: as whole words, folded, without the answer's own full
    stop."""
    return _stands_at(0, folded(text.lstrip()), folded(answer.strip()))


def contains(text: str, answer: str) -> bool:
    """Whether the answer stands in a text: as `begins_with` compares them."""
    found, wanted = folded(text), folded(answer.strip())
    return any(
        _stands_at(start, found, wanted)
        for start in range(len(found) + 1)
        if not (found[start - 1 : start].isalnum() and is_spaced(found[start - 1 : start]))
    )


def _stands_at(start: int, text: str, answer: str) -> bool:
    """Whether the answer stands there in a text, and no word goes on behind it."""
    bare = answer.rstrip(_MARKS) or answer
    if not text.startswith(bare, start):
        return False
    end = start + len(bare)
    marks = answer[len(bare) :]
    return not _goes_on(text, end + len(marks) if text.startswith(marks, end) else end)


def _goes_on(text: str, end: int) -> bool:
    """Whether a word that ends here would go on; scripts without spaces have no such words."""
    after = text[end : end + 1]
    return after.isalnum() and is_spaced(after)


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, and each other mark by itself."""
    return _WORDS.findall(text)


def ngram_entropy(text: str) -> float:
    """`entropy_of_words` of a text's words and marks."""
    return entropy_of_words(words_of(text))


def entropy_of_words(words: Sequence[str]) -> float:
    """GE = H₂/3 + 2·H₃/3 in bits, Hₙ = −Σ f log₂ f over relative frequencies of n-grams of words.

    The measure of fluency of ROME (arXiv:2202.05262); a term without any n-gram is 0.
    """
    return _entropy(words, 2) / 3 + 2 * _entropy(words, 3) / 3


def _entropy(words: Sequence[str], n: int) -> float:
    grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = grams.total()
    return -sum(c / total * math.log2(c / total) for c in grams.values()) if total else 0.0
