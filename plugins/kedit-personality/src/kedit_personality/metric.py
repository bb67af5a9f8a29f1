"""Does an edited model write in the manner of the target trait?"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from kedit_core.ask import Answers, Continue, Question
from kedit_core.measure import classifier_of, text_of
from kedit_core.protocols import CaseScore
from kedit_core.request import EditCase
from kedit_core.texts import first_line, ngram_entropy
from kedit_personality.dataset import TRAITS

NEW_TOKENS = 60
COHERENT = 3.5  # bits
DEFAULT = "sequence-classifier"
MODEL, LABELS = "shai-msy/per-classifier", "+".join(TRAITS)

Pair = tuple[str, str]  # texts of the unedited and of the edited model


class _OfTrait(ABC):
    """What a classifier finds of the trait `meta["trait"]` in generated text.

    The text is the first line of a continuation of a `generation` prompt by up to 60 tokens, each
    the most probable one.  Where the n-gram entropy of the text before or after the edit is below
    3.5 bits, neither counts; the part `left_out` is the share of such texts.  Scores and limits
    are those of Mao et al. 2023 (arXiv:2310.02168) and of its authors' code.

    Args:
        classifier: name of an installed classifier with the three traits as labels.
        model, labels: settings of the classifier; by default those with which
            `sequence-classifier` is PersonalityEdit's own.  Another `model` needs `labels` too,
            unless its config names them.

    Raises:
        SettingError: a setting is refused, or the classifier cannot be loaded or lacks a trait.
        UnknownNameError: there is no such classifier.
    """

    def __init__(self, classifier: str = DEFAULT, model: str = "", labels: str = "") -> None:
        self.classifier = classifier_of(
            classifier, model, labels, own=(DEFAULT, MODEL, LABELS), needed=TRAITS
        )

    def questions(self, case: EditCase) -> Iterable[Question]:
        """A continuation of each `generation` prompt; nothing where the case names no trait."""
        if case.meta.get("trait") not in TRAITS:
            return []
        return [Continue(p.prompt, NEW_TOKENS) for p in case.probes if p.kind == "generation"]

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        """The mean over texts that count, and `left_out`; without such texts `left_out` alone.

        Raises:
            SettingError: the classifier's weights cannot be loaded.
        """
        pairs = [
            (first_line(text_of(before, q).text), first_line(text_of(after, q).text))
            for q in self.questions(case)
        ]
        if not pairs:
            return {}
        kept = [pair for pair in pairs if min(map(ngram_entropy, pair)) >= COHERENT]
        scores = {"left_out": CaseScore(1 - len(kept) / len(pairs), len(pairs))}
        if kept:
            values = self._values(kept, str(case.meta["trait"]))
            scores[""] = CaseScore(sum(values) / len(values), len(values))
        return scores

    @abstractmethod
    def _values(self, pairs: Sequence[Pair], trait: str) -> list[float]:
        """A value for each pair of texts."""


class Accuracy(_OfTrait):
    """Acc: 1 if the target trait is the most probable one for the text of the edited model."""

    def _values(self, pairs: Sequence[Pair], trait: str) -> list[float]:
        found = self.classifier.classify([after for _, after in pairs])
        return [float(max(labels, key=lambda label: labels[label]) == trait) for labels in found]


class Tpei(_OfTrait):
    """TPEI = CE(text before) − CE(text after), CE(text) = −ln p(target trait | text), in nats."""

    def _values(self, pairs: Sequence[Pair], trait: str) -> list[float]:
        found = self.classifier.classify([text for pair in pairs for text in pair])
        entropies = [-math.log(max(labels[trait], sys.float_info.min)) for labels in found]
        return [a - b for a, b in zip(entropies[::2], entropies[1::2], strict=True)]
