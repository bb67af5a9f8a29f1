"""CKnowEdit's total."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from kedit_core.ask import Answers, Continue, Question
from kedit_core.measure import mean, text_of
from kedit_core.protocols import CaseScore
from kedit_core.request import EditCase
from kedit_core.texts import entropy_of_words
from kedit_similarity.probes import NEW_TOKENS, Similarity
from kedit_similarity.protocols import cosine, rouge_l
from kedit_similarity.words import words

WEIGHTS = MappingProxyType({"edit": 0.2, "portability": 0.35, "locality": 0.35, "fluency": 0.1})
_KINDS = (("edit", "rewrite"), ("portability", "portability"), ("locality", "locality"))


class Weighted:
    """0.2 · edit + 0.35 · portability + 0.35 · locality + 0.1 · fluency, as CKnowEdit sums up
    (arXiv:2409.05806).

    The first three are 100 · (ROUGE-L recall + cosine) / 2, the last is 10 · GE of what follows
    the rewritten prompt.  A term that a case lacks is left out, and the weights of the others are
    scaled to the sum 1.

    The authors weight means over the data set: that is `of_means` in a summary.  They also split
    words at spaces only, which makes one word of a Chinese sentence; here each character is one.

    Args:
        encoder: as in `cosine`; without a default, since it must know the language of the data.
        new_tokens: as in `Similarity`.
    """

    def __init__(self, encoder: str, new_tokens: int = NEW_TOKENS) -> None:
        embedded = cosine("rewrite", encoder, new_tokens).compare  # one encoder for all terms
        self._measures = {
            term: (rouge_l(kind, new_tokens), Similarity(kind, embedded, new_tokens))
            for term, kind in _KINDS
        }
        self._new_tokens = new_tokens

    def questions(self, case: EditCase) -> Iterable[Question]:
        """A continuation of every prompt of the three kinds."""
        return [q for overlap, _ in self._measures.values() for q in overlap.questions(case)]

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """The total and its terms, in points."""
        terms: dict[str, CaseScore] = {}
        for term, measures in self._measures.items():
            found = [m.score(case, before, after).get("") for m in measures]
            scores = [score for score in found if score is not None]
            if scores:
                terms[term] = CaseScore(100 * mean(s.value for s in scores), scores[0].probes)
        texts = [text_of(after, Continue(r.text, self._new_tokens)).text for r in case.requests]
        entropies = [entropy_of_words(words(text)) for text in texts]
        terms["fluency"] = CaseScore(10 * mean(entropies), len(entropies))
        total = _weigh({term: score.value for term, score in terms.items()})
        probes = sum(score.probes for term, score in terms.items() if term != "fluency")
        return {"": CaseScore(total, probes), **terms}

    def combine(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """The weighted sum of the terms' means over the cases that have them."""
        return {"of_means": _weigh({term: means[term] for term in WEIGHTS if term in means})}


def _weigh(terms: Mapping[str, float]) -> float:
    weights = sum(WEIGHTS[term] for term in terms)
    return sum(WEIGHTS[term] * value for term, value in terms.items()) / weights
