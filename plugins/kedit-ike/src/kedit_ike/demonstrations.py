"""Training facts, and which of them are demonstrated before a new one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from kedit_core import DataError, EditCase, EditRequest, SettingError, discover
from kedit_core.editing import EditJob
from kedit_core.encoder import Encoder
from kedit_core.named import read_dataset
from kedit_core.records import checked
from kedit_core.words import is_spaced
from kedit_ike.hparams import IkeHyperParams
from kedit_ike.words import demonstration, statement

KINDS = ("copy", "update", "retain")


@dataclass(frozen=True)
class TrainingFact:
    """A fact that was edited elsewhere, and what it teaches.

    Attributes:
        request: the fact.
        rephrases: other prompts with the same answer.
        neighbours: unrelated prompts, each with its true answer.
    """

    request: EditRequest
    rephrases: tuple[str, ...]
    neighbours: tuple[tuple[str, str], ...]

    @property
    def statement(self) -> str:
        return statement(self.request.text, self.request.target_new)

    def answered(self, kind: str) -> list[str]:
        """The prompts with answers that demonstrations of this kind can show."""
        if kind == "copy":
            return [self.statement]
        if kind == "update":
            return [statement(prompt, self.request.target_new) for prompt in self.rephrases]
        return [statement(prompt, answer) for prompt, answer in self.neighbours]


@dataclass(frozen=True)
class Corpus:
    """Training facts and the embeddings by which they are found.

    Attributes:
        facts: all of them.
        entries: (number of the fact, a demonstration of it), one for each row of `embeddings`;
            where demonstrations are made when they are needed, an entry holds no text.
        embeddings: (entries, d), each of length 1.
    """

    facts: tuple[TrainingFact, ...]
    entries: tuple[tuple[int, str], ...]
    embeddings: Tensor


def training_corpus(job: EditJob, hparams: IkeHyperParams, encoder: Encoder) -> Corpus:
    """The training facts; their embeddings are made once and kept under a hash of the texts.

    Raises:
        SettingError: there is no such dataset, or it needs a file.
        DataError: the file cannot be read, or no fact in it has both a rephrasing and a neighbour.
    """
    facts = tuple(_facts(hparams.demonstrations))
    if hparams.form == "ike":
        entries = [(number, "") for number in range(len(facts))]
        texts = [_query(fact.request) for fact in facts]
    else:
        entries = [
            (number, demonstration(fact.statement, answered))
            for number, fact in enumerate(facts)
            for kind in KINDS
            for answered in fact.answered(kind)[:1]
        ]
        texts = [text for _, text in entries]
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    key = {"encoder": encoder.fingerprint, "texts": digest}
    stored = job.artifacts.get("demonstrations", key)
    if stored is None:
        stored = {"embeddings": encoder.embed(texts)}
        job.artifacts.put("demonstrations", key, stored)
    return Corpus(facts, tuple(entries), stored["embeddings"])


def nearest_demonstrations(
    job: EditJob, hparams: IkeHyperParams, encoder: Encoder, corpus: Corpus
) -> list[tuple[str, ...]]:
    """For each request at most k demonstrations, in the order in which they are shown.

    None is of the request itself, of its rephrasings, or says anything of its subject.
    """
    find = _query if hparams.form == "ike" else _copy
    queries = encoder.embed([find(request) for request in job.requests])
    ranks = (queries @ corpus.embeddings.mT).argsort(dim=1, descending=True, stable=True)
    choose = _mixed if hparams.form == "ike" else _nearest
    return [
        choose(hparams, corpus, order, request, job.generator())
        for request, order in zip(job.requests, ranks.tolist(), strict=True)
    ]


def _mixed(
    hparams: IkeHyperParams,
    corpus: Corpus,
    order: Sequence[int],
    request: EditRequest,
    generator: Generator,
) -> tuple[str, ...]:
    """One demonstration of each of the nearest facts; kinds in a random order, nearest last."""
    kinds = _kinds(hparams)
    shuffled = [kinds[n] for n in torch.randperm(len(kinds), generator=generator).tolist()]
    shown: list[str] = []
    for number in order:
        if len(shown) == len(kinds):
            break
        fact = without(corpus.facts[number], request)
        if fact is None or not (fact.rephrases and fact.neighbours):
            continue
        answers = fact.answered(shuffled[len(shown)])
        pick = int(torch.randint(len(answers), (1,), generator=generator))
        shown.append(demonstration(fact.statement, answers[pick]))
    return tuple(reversed(shown))


def _nearest(
    hparams: IkeHyperParams,
    corpus: Corpus,
    order: Sequence[int],
    request: EditRequest,
    generator: Generator,
) -> tuple[str, ...]:
    """The nearest demonstrations of any kind, nearest first, as EasyEdit shows them."""
    shown: list[str] = []
    for place in order:
        if len(shown) == hparams.k:
            break
        number, text = corpus.entries[place]
        fact = without(corpus.facts[number], request)
        allowed = (a for kind in KINDS for a in fact.answered(kind)) if fact is not None else ()
        if fact is not None and text in {demonstration(fact.statement, a) for a in allowed}:
            shown.append(text)
    return tuple(shown)


def _kinds(hparams: IkeHyperParams) -> list[str]:
    """k kinds in the ratio; what does not divide evenly goes to the last kind with a share."""
    counts = [hparams.k * share // sum(hparams.ratio) for share in hparams.ratio]
    last = max(n for n, share in enumerate(hparams.ratio) if share)
    counts[last] += hparams.k - sum(counts)
    return [kind for kind, count in zip(KINDS, counts, strict=True) for _ in range(count)]


def without(fact: TrainingFact, request: EditRequest) -> TrainingFact | None:
    """What the fact may show before the request's; None where it is about the same thing.

    A fact is, if one of its prompts is the request's or names its subject, or if the request
    names the fact's subject.  Neighbours that are or do so are left out.
    """

    def is_close(prompt: str) -> bool:
        return _plain(prompt) == _plain(request.text) or _names(prompt, request.subject)

    prompts = (fact.request.text, *fact.rephrases)
    if any(map(is_close, prompts)) or _names(request.text, fact.request.subject):
        return None
    kept = tuple(n for n in fact.neighbours if not is_close(n[0]))
    return TrainingFact(fact.request, fact.rephrases, kept)


def _names(text: str, subject: str | None) -> bool:
    """Whether the subject stands in the text, as words of their own."""
    wanted = _plain(subject or "")
    if not wanted:
        return False
    if is_spaced(wanted[0]):
        return f" {wanted} " in f" {_plain(text)} "
    return wanted in _plain(text)


def _plain(text: str) -> str:
    """The words of a text, without case and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _query(request: EditRequest) -> str:
    """The text by which the nearest facts are found."""
    fact = statement(request.text, request.target_new)
    return f"New Fact: {fact}\nPrompt: {request.text}"


def _copy(request: EditRequest) -> str:
    """The same for EasyEdit's form, whose corpus is of whole demonstrations."""
    fact = statement(request.text, request.target_new)
    return demonstration(fact, fact)


def _facts(source: str) -> Iterator[TrainingFact]:
    found = 0
    for case in _cases(source):
        fact = TrainingFact(
            case.request,
            tuple(p.prompt for p in case.probes if p.kind == "rephrase"),
            tuple(
                (p.prompt, p.expected[0])
                for p in case.probes
                if p.kind == "locality" and p.expected and p.expected[0].strip()
            ),
        )
        if len(case.requests) == 1 and fact.rephrases and fact.neighbours:
            found += 1
            yield fact
    if not found:
        raise DataError(
            f"No fact of {source} has both a rephrasing and an unrelated question with its answer, "
            f"so there is nothing to demonstrate. Choose another dataset for `demonstrations`."
        )


def _cases(source: str) -> Iterable[EditCase]:
    name, _, path = source.partition(":")
    catalog = discover()
    if catalog.dataset(name).needs_path and not path:
        raise SettingError(f"The dataset '{name}' needs its file: --set demonstrations={name}:PATH")
    spec, found = read_dataset(catalog, name, path or None)
    if spec.holds != "cases":
        raise SettingError(f"The dataset '{name}' has no facts to demonstrate.")
    return (case for case in checked(found) if isinstance(case, EditCase))
