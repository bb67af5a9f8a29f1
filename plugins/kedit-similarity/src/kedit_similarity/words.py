"""Texts as words, in any script."""

from __future__ import annotations

import unicodedata

from kedit_core.words import is_spaced


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation.

    A word is a run of letters, marks and digits; in scripts that put no space between words each
    character is one.  Of ASCII text it makes the words that `rouge-score` makes.
    """
    found, word = [], ""
    for character in text.lower():
        inside = unicodedata.category(character)[0] in "LMN"
        if inside and is_spaced(character):
            word += character
            continue
        if word:
            found.append(word)
        word = ""
        if inside:
            found.append(character)
    return [*found, word] if word else found


def bleu_tokenizer(answer: str) -> str:
    """The tokenizer of sacrebleu for an answer, by the script of most of its letters.

    `13a` for scripts with spaces between words, `zh` for Chinese characters alone, `char` for
    other scripts without spaces.
    """
    letters = [character for character in answer if character.isalnum()]
    spaceless = [character for character in letters if not is_spaced(character)]
    if 2 * len(spaceless) <= len(letters):
        return "13a"
    is_chinese = all(unicodedata.name(c).startswith("CJK") for c in spaceless)
    return "zh" if is_chinese else "char"
