"""What an edit does to a model as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING

from kedit_bench.effort import measured
from kedit_bench.metrics.likelihood import perplexity
from kedit_core.ask import Continue
from kedit_core.effects import WeightDelta
from kedit_core.errors import SettingError
from kedit_core.measure import text_of

if TYPE_CHECKING:
    from torch import Tensor

    from kedit_core.editing import EditSession
    from kedit_core.sites import Site

_GIVEN = 4  # words of a passage that are given; perplexity is that of the rest
_BEGINNINGS = (
    *("The river rises in", "She opened the letter and", "In the year 1900", "Water boils at"),
    *("The recipe calls for", "Most birds build", "The engine stopped because", "Music is"),
)


class Perplexity:
    """exp of the mean negative log-probability per token of a text's passages.

    Asked through the view, so that edits in prompts, modules and logits count too.

    Args:
        text: a text file whose paragraphs are passages, or the name of a dataset as in
            `kedit_core.corpus`.
        passages: how many; headings and other short lines are passed over.
        words: of each passage.
    """

    def __init__(self, text: str, passages: int = 50, words: int = 100) -> None:
        from kedit_core.corpus import Corpus

        self.passages = []
        for document in islice(_long(Corpus(text).documents(), words), passages):
            listed = document.split()[:words]
            self.passages.append((" ".join(listed[:_GIVEN]), " ".join(listed[_GIVEN:])))
        if not self.passages:
            raise SettingError(f"'{text}' has no passage of at least {words // 2} words.")

    def measure(self, session: EditSession) -> Mapping[str, float]:
        """Perplexity over all tokens of all passages."""
        starts, rests = zip(*self.passages, strict=True)
        scores = session.view().score(list(starts), list(rests))
        logprobs = [logprob for score in scores for logprob in score.logprobs]
        return {"": perplexity(-sum(logprobs) / len(logprobs))}


def _long(documents: Iterable[str], words: int) -> Iterator[str]:
    return (text for text in documents if len(text.split()) >= words // 2)


class WeightChange:
    """‖ΔW‖ / ‖W‖ of each matrix that edits have changed, W being the unedited one (Frobenius).

    All changes of a matrix that are in force count together.  Edits in modules, prompts and logits
    change no matrix.
    """

    def measure(self, session: EditSession) -> Mapping[str, float]:
        """A ratio for each matrix by the name of its parameter, and the largest of them.

        Raises:
            SiteError: a changed matrix is quantised, so that its norm is unknown.
        """
        changes: dict[Site, Tensor] = {}
        for patch in session.stack:
            for delta in patch.deltas:
                dense = delta.dense()
                changes[delta.site] = (
                    changes[delta.site] + dense if delta.site in changes else dense
                )
        with session.suspended():
            ratios = {
                _named(site): float(change.norm() / session.host.weight(site).float().norm().cpu())
                for site, change in changes.items()
            }
        return {**ratios, "": max(ratios.values(), default=0.0)}


class Inference:
    """What edits cost whoever uses the model: speed, and memory beside the weights.

    Eight texts are continued by 32 tokens with the edits and without, in turn.

    Args:
        rounds: how often; the median counts.
    """

    def __init__(self, rounds: int = 5) -> None:
        self.rounds = rounds

    def measure(self, session: EditSession) -> Mapping[str, float]:
        """Tokens per second, edited over unedited; `extra_bytes` of tensors of wrapped modules,
        prompts and logits, and of changes that lie beside the weights."""
        if not session.is_edited:
            return {"": 1.0, "extra_bytes": 0.0}
        speeds = [
            (_tokens_per_second(session, True), _tokens_per_second(session, False))
            for _ in range(self.rounds)
        ]
        edited, plain = (median(side) for side in zip(*speeds, strict=True))
        return {"": edited / plain, "extra_bytes": float(_extra_bytes(session))}


def _named(site: Site) -> str:
    return site.parameter if site.expert is None else f"{site.parameter}[{site.expert}]"


def _tokens_per_second(session: EditSession, edited: bool) -> float:
    with nullcontext() if edited else session.suspended():
        questions = [Continue(text, 32) for text in _BEGINNINGS]
        with measured(session.host.device) as effort:
            answers = session.view().ask(questions)
    return sum(len(text_of(answers, q).tokens) for q in questions) / effort.seconds


def _extra_bytes(session: EditSession) -> int:
    return sum(
        tensor.nbytes
        for number, patch in enumerate(session.stack)
        for effect in patch.effects
        if session.is_overlay(number) or not isinstance(effect, WeightDelta)
        for tensor in effect.tensors.values()
    )
