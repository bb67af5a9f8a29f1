"""How an answer becomes a number: every protocol for probes that have an answer.

Each function here makes a metric for one kind of probe, `rank("rephrase")`, and has a name for each
kind, `rephrase_rank()`.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from kedit_bench.metrics.likelihood import likelihood_scores, perplexities
from kedit_core.ask import Answers, Continue, Form, Question, Read, Score
from kedit_core.measure import ProbeMetric, for_kinds, mean, read_of, text_of
from kedit_core.protocols import CaseScore
from kedit_core.request import EditCase, Probe
from kedit_core.texts import NATURAL_TOKENS, begins_with, contains, folded, natural_end

GREEDY_TOKENS = 12

_LITERAL_STOP = re.compile(r"[.\n]")
_PUNCTUATION = string.punctuation + "。，、！？；："  # SQuAD's, and Chinese
_ARTICLES = re.compile(r"\b(a|an|the)\b")


# -- teacher forcing -------------------------------------------------------------------------


def teacher_forced(kind: str) -> ProbeMetric:
    """Share of answer tokens that are the most probable ones; the best accepted answer counts."""
    return _read_metric(kind, lambda score: score.accuracy)


def all_tokens(kind: str) -> ProbeMetric:
    """1 if every answer token is the most probable one."""
    return _read_metric(kind, lambda score: float(score.accuracy == 1))


def with_stop(kind: str) -> ProbeMetric:
    """As `teacher_forced`, with the end-of-text token as a part of the answer."""
    return _read_metric(kind, lambda score: score.accuracy, stop=True)


def probability(kind: str) -> ProbeMetric:
    """Probability of the whole answer: exp Σ log p."""
    return _read_metric(kind, lambda score: math.exp(sum(score.logprobs)))


def rank(kind: str) -> ProbeMetric:
    """How many tokens are more probable than the answer's first; the best answer counts."""
    return _read_metric(kind, lambda score: score.rank, best=min)


def nll(kind: str) -> Likelihood:
    """Mean negative log-probability of the answer's tokens, in nats."""
    return Likelihood(_read_metric(kind, lambda score: -score.mean_logprob, best=min))


class Likelihood:
    """Negative log-likelihood by case and family, and perplexity as exp of its mean over cases."""

    def __init__(self, nll: ProbeMetric) -> None:
        self._nll = nll

    def questions(self, case: EditCase) -> Iterable[Question]:
        return self._nll.questions(case)

    def score(self, case: EditCase, before: Answers, after: Answers) -> Mapping[str, CaseScore]:
        return likelihood_scores(self._nll.score(case, before, after))

    def combine(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Perplexity is exp of the mean, which outliers do not rule."""
        return perplexities(means)


def _read_metric(
    kind: str,
    value: Callable[[Score], float],
    *,
    best: Callable[[Iterable[float]], float] = max,
    stop: bool = False,
) -> ProbeMetric:
    def asks(probe: Probe) -> list[Question]:
        return _reads(probe, stop)

    def of(probe: Probe, before: Answers, after: Answers) -> float:
        return best(value(read_of(after, question)) for question in asks(probe))

    return ProbeMetric(kind, asks, of)


def _reads(probe: Probe, stop: bool = False) -> list[Question]:
    return [Read(probe.prompt, answer, stop=stop) for answer in probe.expected]


# -- free generation -------------------------------------------------------------------------
#
# An answer fits if its own tokens are no more than the metric lets the model write.  One that does
# not fit is not judged, and a probe none of whose answers fits has no score.  What was written does
# not decide that, nor does the edit: otherwise methods would be compared over different cases.


def greedy(kind: str) -> ProbeMetric:
    """1 if the greedy answer begins with an accepted answer.

    An answer of more than 12 tokens is not judged, see above.
    """
    return _text_metric(kind, begins_with, GREEDY_TOKENS, natural=False)


def greedy_exact(kind: str) -> ProbeMetric:
    """1 if the answer up to its natural end is an accepted answer, normalised."""
    return _text_metric(kind, exact_match)


def greedy_contains(kind: str) -> ProbeMetric:
    """1 if an accepted answer stands in the answer up to its natural end."""
    return _text_metric(kind, contains)


def greedy_f1(kind: str) -> ProbeMetric:
    """F1 of the words of the answer up to its natural end; the best accepted answer counts."""
    return _text_metric(kind, word_f1)


def task_exact(kind: str) -> ProbeMetric:
    """As `greedy_exact`, asked as people ask."""
    return _text_metric(kind, exact_match, form="task")


def task_contains(kind: str) -> ProbeMetric:
    """As `greedy_contains`, asked as people ask."""
    return _text_metric(kind, contains, form="task")


def task_f1(kind: str) -> ProbeMetric:
    """As `greedy_f1`, asked as people ask."""
    return _text_metric(kind, word_f1, form="task")


def greedy_cut(kind: str) -> ProbeMetric:
    """1 if the greedy tokens, cut to the answer's length, are the answer's tokens.

    An answer of more than 50 tokens is not judged, see above.
    """

    def asks(probe: Probe) -> list[Question]:
        return [*_reads(probe), Continue(probe.prompt, NATURAL_TOKENS)]

    def of(probe: Probe, before: Answers, after: Answers) -> float | None:
        written = text_of(after, Continue(probe.prompt, NATURAL_TOKENS)).tokens
        fitting = _fitting(probe, before, NATURAL_TOKENS)
        wanted = [read_of(after, Read(probe.prompt, answer)).tokens for answer in fitting]
        return max((float(written[: len(t)] == t) for t in wanted), default=None)

    return ProbeMetric(kind, asks, of)


def _text_metric(
    kind: str,
    match: Callable[[str, str], float],
    tokens: int = NATURAL_TOKENS,
    *,
    natural: bool = True,
    form: Form = "bare",
) -> ProbeMetric:
    def asks(probe: Probe) -> list[Question]:
        return [*_reads(probe), Continue(probe.prompt, tokens, form)]

    def of(probe: Probe, before: Answers, after: Answers) -> float | None:
        written = text_of(after, Continue(probe.prompt, tokens, form)).text
        text = natural_end(written) if natural else written
        fitting = _fitting(probe, before, tokens)
        return max((float(match(text, answer)) for answer in fitting), default=None)

    return ProbeMetric(kind, asks, of)


def _fitting(probe: Probe, before: Answers, room: int) -> list[str]:
    """The accepted answers of at most `room` tokens, as the unedited model reads them after the
    bare prompt."""
    return [a for a in probe.expected if len(read_of(before, Read(probe.prompt, a)).tokens) <= room]


# -- as others compute it ----------------------------------------------------------------------


def easyedit(kind: str) -> ProbeMetric:
    """EasyEdit's token accuracy: always one space before the answer, the first answer only."""

    def asks(probe: Probe) -> list[Question]:
        return [Read(probe.prompt, f" {probe.expected[0]}")]

    def of(probe: Probe, before: Answers, after: Answers) -> float:
        return mean(read_of(after, question).accuracy for question in asks(probe))

    return ProbeMetric(kind, asks, of)


def wild_paper(kind: str) -> ProbeMetric:
    """WILD's exact match (arXiv:2502.11177) with its literal stops: any full stop, a line break."""
    return _text_metric(kind, _exact_to_a_literal_stop, natural=False, form="task")


def _exact_to_a_literal_stop(text: str, answer: str) -> bool:
    return exact_match(_LITERAL_STOP.split(text.strip(), maxsplit=1)[0], answer)


# -- locality: the unedited model is the reference --------------------------------------------


def agreement_teacher_forced(kind: str) -> ProbeMetric:
    """Share of the expected answer's tokens at which the prediction has not changed."""

    def of(probe: Probe, before: Answers, after: Answers) -> float:
        shares = []
        for question in _reads(probe):
            old, new = read_of(before, question), read_of(after, question)
            shares.append(mean(a == b for a, b in zip(old.predicted, new.predicted, strict=True)))
        return mean(shares)

    return ProbeMetric(kind, _reads, of)


def agreement_greedy(kind: str) -> ProbeMetric:
    """1 if the greedy answer has not changed in as many words as the longest accepted answer has;
    in all of them where none is known."""

    def asks(probe: Probe) -> list[Question]:
        return [Continue(probe.prompt, GREEDY_TOKENS)]

    def of(probe: Probe, before: Answers, after: Answers) -> float:
        count = max((len(answer.split()) for answer in probe.expected), default=None)
        old, new = (
            _bare_words(text_of(answers, Continue(probe.prompt, GREEDY_TOKENS)).text)[:count]
            for answers in (before, after)
        )
        return float(old == new)

    return ProbeMetric(kind, asks, of, needs_expected=False)


def agreement_same_text(kind: str) -> ProbeMetric:
    """1 if the greedy text is the same, character by character."""

    def asks(probe: Probe) -> list[Question]:
        return [Continue(probe.prompt, GREEDY_TOKENS)]

    def of(probe: Probe, before: Answers, after: Answers) -> float:
        question = Continue(probe.prompt, GREEDY_TOKENS)
        return float(text_of(before, question).text == text_of(after, question).text)

    return ProbeMetric(kind, asks, of, needs_expected=False)


def normalise(text: str) -> str:
    """SQuAD's form: `folded`, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", _unmarked(text)).split())


def exact_match(text: str, answer: str) -> bool:
    """Whether a text is the answer, see `_normalised`."""
    found, wanted = _normalised(text, answer)
    return found == wanted


def word_f1(text: str, answer: str) -> float:
    """F1 of the words of a text and an answer (SQuAD), see `_normalised`."""
    found, wanted = (form.split() for form in _normalised(text, answer))
    common = sum((Counter(found) & Counter(wanted)).values())
    if not common:
        return float(found == wanted)
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _normalised(text: str, answer: str) -> tuple[str, str]:
    """Both normalised, but with what the answer consists of: articles, as the choice `A`, or
    marks."""
    for form in (normalise, _unmarked):
        if wanted := form(answer):
            return form(text), wanted
    return folded(text).strip(), folded(answer).strip()


def _unmarked(text: str) -> str:
    """`folded`, no punctuation, single spaces."""
    return " ".join("".join(c for c in folded(text) if c not in _PUNCTUATION).split())


def _bare_words(text: str) -> Sequence[str]:
    return [word.strip(".,;:!?\"'()").casefold() for word in text.split()]


__getattr__ = for_kinds(globals(), ("rewrite", "rephrase", "portability", "locality", "instance"))
