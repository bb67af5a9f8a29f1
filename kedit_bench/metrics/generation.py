"""How freely written text looks: fluency, what the unedited model makes of it, and consistency with
texts about the new fact."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from kedit_bench.metrics.likelihood import likelihood_scores, perplexities
from kedit_core.ask import Answers, Question, Read, Sample, Text
from kedit_core.errors import SettingError
from kedit_core.measure import mean, probes_of, read_of, text_of
from kedit_core.protocols import CaseScore
from kedit_core.request import EditCase
from kedit_core.texts import ngram_entropy, words_of

_TERMS = re.compile(r"(?u)\b\w\w+\b")  # scikit-learn's, with which the published tables were made
_MIN_ROOM = 20  # tokens
_DEGENERATE = 0.5  # of a text's words that repeat one of the three before
_ESSENCE = 100  # tokens


class Fluency:
    """Entropy of word pairs and triples of sampled text, as in ROME.

    GE = H₂/3 + 2·H₃/3 with Hₙ = −Σ f log₂ f over the n-grams' relative frequencies.  Also the share
    of different pairs, the share of words that are the same as one of the three before, and the
    share of texts of which more than half the words are.

    Where a prompt leaves room for fewer than 20 tokens, the text would tell about the prompt, and
    does not count.  A text that the model ended counts, however short.

    Args:
        length: tokens of prompt and continuation.
        top_k: draw among so many tokens.
        seed: of the draws.
        prompt: whether the text is read with its prompt, as in ROME.
    """

    details = "words: runs of letters and digits, single marks"

    def __init__(
        self, length: int = 100, top_k: int = 5, seed: int = 0, prompt: bool = True
    ) -> None:
        self.length, self.top_k, self.seed, self.prompt = length, top_k, seed, prompt

    def questions(self, case: EditCase) -> Iterable[Question]:
        """A sample after each `generation` prompt, or after the rewritten prompts."""
        return [
            Sample(prompt, self.length, self.top_k, self.seed)
            for prompt in generation_prompts(case)
        ]

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """Entropy in bits, and the parts `distinct_2`, `repetition` and `degenerate` as shares."""
        written = [(q.prompt * self.prompt, text_of(after, q)) for q in self.questions(case)]
        texts = [prompt + new.text for prompt, new in written if _had_room(new)]
        if not texts:
            return {}
        words = [words_of(text) for text in texts]
        repetition = [_repetition(listed) for listed in words]
        return {
            "": CaseScore(mean(map(ngram_entropy, texts)), len(texts)),
            "distinct_2": CaseScore(mean(map(_distinct_pairs, words)), len(texts)),
            "repetition": CaseScore(mean(repetition), len(texts)),
            "degenerate": CaseScore(mean(r > _DEGENERATE for r in repetition), len(texts)),
        }


class Naturalness:
    """How the unedited model reads sampled text: mean negative log-probability of its tokens.

    Args:
        length, top_k, seed: as in `Fluency`.

    Only what follows the prompt is read, as it was written.  A case where no text has a token has
    no score.
    """

    def __init__(self, length: int = 100, top_k: int = 5, seed: int = 0) -> None:
        self._fluency = Fluency(length, top_k, seed)

    def questions(self, case: EditCase) -> Iterable[Question]:
        return self._fluency.questions(case)

    def followups(self, case: EditCase, answers: Answers) -> list[Question]:
        """A reading of each text, but for a last character that was not finished."""
        texts = [(q.prompt, text_of(answers, q).text) for q in self.questions(case)]
        return [
            Read(prompt, whole, exact=True)
            for prompt, text in texts
            if (whole := text.rstrip("\ufffd"))
        ]

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """In nats per token; the part `perplexity_per_case` is exp of it."""
        found = [-read_of(before, read).mean_logprob for read in self.followups(case, after)]
        return likelihood_scores({"": CaseScore(mean(found), len(found))}) if found else {}

    def combine(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Perplexity is exp of the mean over cases."""
        return perplexities(means)


class Consistency:
    """Cosine of TF-IDF vectors of generated texts and of texts about the new fact (ROME's RS).

    Args:
        vocabulary: `tfidf_vocab.json` of ROME's data: term to column.
        idf: `idf.npy` of ROME's data: (terms,).
        length, top_k, seed: as in `Fluency`.

    Reference texts are `references` of a case's `meta`; a case without them has no score.
    """

    def __init__(
        self, vocabulary: str, idf: str, length: int = 100, top_k: int = 5, seed: int = 0
    ) -> None:
        import numpy as np

        self._fluency = Fluency(length, top_k, seed)
        try:
            self._columns: dict[str, int] = json.loads(Path(vocabulary).read_text("utf-8"))
            self._idf = np.load(idf, allow_pickle=False).reshape(-1)
        except (OSError, ValueError) as error:
            raise SettingError(f"The TF-IDF files cannot be read: {error}.") from None

    def questions(self, case: EditCase) -> Iterable[Question]:
        return self._fluency.questions(case) if _texts_in(case, "references") else []

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        references = _texts_in(case, "references")
        if not references:
            return {}
        asked = list(self.questions(case))
        ours = self._vector(" ".join(_prompt_and_text(after, q) for q in asked))
        theirs = self._vector(" ".join(references))
        product = sum(weight * theirs.get(term, 0.0) for term, weight in ours.items())
        size = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        return {"": CaseScore(product / size if size else 0.0, len(asked))}

    def _vector(self, text: str) -> dict[int, float]:
        terms = Counter(_TERMS.findall(text.lower()))
        return {
            self._columns[term]: count * float(self._idf[self._columns[term]])
            for term, count in terms.items()
            if term in self._columns
        }


class Essence:
    """How the edited model reads what is known of the subject: ROME's essence score.

    The first 100 tokens of the texts `essence` of a case's `meta`, of which the first word is
    given; a case without them has no score.
    """

    def questions(self, case: EditCase) -> Iterable[Question]:
        """One reading of the texts, joined by spaces."""
        words = " ".join(_texts_in(case, "essence")).split()[: _ESSENCE + 1]
        return [Read(words[0], " " + " ".join(words[1:]), exact=True)] if len(words) > 1 else []

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """Mean negative log-probability in nats; the part `perplexity_per_case` is exp of it."""
        nll = [-mean(read_of(after, q).logprobs[:_ESSENCE]) for q in self.questions(case)]
        return likelihood_scores({"": CaseScore(nll[0])}) if nll else {}

    def combine(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Perplexity is exp of the mean over cases."""
        return perplexities(means)


def generation_prompts(case: EditCase) -> list[str]:
    """Prompts to write freely after: the case's own, or else those that were rewritten."""
    found = [probe.prompt for probe in case.probes if probe.kind == "generation"]
    return found or [probe.prompt for probe in probes_of(case) if probe.kind == "rewrite"]


def _had_room(text: Text) -> bool:
    """Whether the prompt left room for a text."""
    if text.room is None:
        return text.ended or len(text.tokens) >= _MIN_ROOM
    return text.room >= _MIN_ROOM


def _distinct_pairs(words: Sequence[str]) -> float:
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def _repetition(words: Sequence[str]) -> float:
    """Share of words that are the same as the one, two or three words before."""
    if not words:
        return 0.0
    return mean(
        any(n >= d and words[n] == words[n - d] for d in (1, 2, 3)) for n in range(len(words))
    )


def _prompt_and_text(answers: Answers, question: Question) -> str:
    assert isinstance(question, Sample)
    return question.prompt + text_of(answers, question).text


def _texts_in(case: EditCase, key: str) -> list[str]:
    found = case.meta.get(key)
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []
