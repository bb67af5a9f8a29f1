"""ROUGE, BLEU and sentence embeddings.

Each function makes a metric for one kind of probe, `bleu("rephrase")`, and has a name for each
kind, `rephrase_bleu()`.
"""

from __future__ import annotations

from collections.abc import Sequence

from kedit_core.encoder import Encoder
from kedit_core.errors import SettingError
from kedit_core.measure import for_kinds
from kedit_similarity.probes import NEW_TOKENS, Compare, Similarity
from kedit_similarity.words import bleu_tokenizer, words

KINDS = ("rewrite", "rephrase", "portability", "locality")


def rouge_1(kind: str, new_tokens: int = NEW_TOKENS) -> Similarity:
    """Share of the answer's words that the text has too (Lin 2004)."""
    return Similarity(kind, rouge_recall("rouge1"), new_tokens)


def rouge_2(kind: str, new_tokens: int = NEW_TOKENS) -> Similarity:
    """Share of the answer's pairs of adjacent words that the text has too."""
    return Similarity(kind, rouge_recall("rouge2"), new_tokens)


def rouge_l(kind: str, new_tokens: int = NEW_TOKENS) -> Similarity:
    """Length of the longest common subsequence of words, as share of the answer's words."""
    return Similarity(kind, rouge_recall("rougeL"), new_tokens)


def bleu(kind: str, new_tokens: int = NEW_TOKENS) -> Similarity:
    """BLEU of the text against the answer, from 0 to 1.

    BP · exp(mean of log pₙ), n up to 4 or to the text's length, BP = min(1, exp(1 − r/c)) for r
    words of the answer and c of the text; missing n-grams are smoothed exponentially (Post 2018,
    arXiv:1804.08771).
    """
    return Similarity(kind, _bleu(), new_tokens)


def cosine(kind: str, encoder: str = "", new_tokens: int = NEW_TOKENS) -> Similarity:
    """Cosine of the sentence embeddings of text and answer (Reimers & Gurevych 2019,
    arXiv:1908.10084).

    Args:
        kind: of the probes.
        encoder: see `Encoder`.
        new_tokens: see `Similarity`.
    """
    return Similarity(kind, Encoder(encoder).cosines, new_tokens)


def rouge_recall(measure: str) -> Compare:
    """Recall by `rouge-score`, on words in any script.

    Args:
        measure: `rouge1`, `rouge2` or `rougeL`.

    Raises:
        SettingError: the package is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import Tokenizer
    except ImportError:
        raise SettingError("ROUGE needs the package rouge-score: pip install rouge-score") from None

    class Words(Tokenizer):  # type: ignore[misc]
        def tokenize(self, text: str) -> list[str]:
            return words(text)

    scorer = RougeScorer([measure], tokenizer=Words())

    def compare(pairs: Sequence[tuple[str, str]]) -> list[float]:
        return [float(scorer.score(answer, text)[measure].recall) for text, answer in pairs]

    return compare


def _bleu() -> Compare:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise SettingError("BLEU needs the package sacrebleu: pip install sacrebleu") from None

    def compare(pairs: Sequence[tuple[str, str]]) -> list[float]:
        return [
            BLEU(tokenize=bleu_tokenizer(answer), effective_order=True)
            .sentence_score(text, [answer])
            .score
            / 100
            for text, answer in pairs
        ]

    return compare


__getattr__ = for_kinds(globals(), KINDS)
