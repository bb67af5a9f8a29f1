"""The unedited model's answers: asked once per model and question, and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import transformers
from torch import Tensor

import kedit_core
from kedit_core.ask import (
    Answer,
    Answers,
    Diverge,
    Divergence,
    Question,
    answer_from_json,
    answer_to_json,
    question_to_json,
)
from kedit_core.digest import bit_sums
from kedit_core.editing import EditSession, ModelHost
from kedit_core.errors import EditError, PluginError
from kedit_core.paths import cache_root
from kedit_core.replies import Replies
from kedit_core.writing import stop_ids

_VERSION = 2  # of how questions are asked; a new one makes all kept answers void
_AT_ONCE = 8  # distributions of the whole vocabulary that are held together


class SpoiltModelError(PluginError):
    """A plugin left the weights changed, so there is no unedited model any more."""


class AnswerCache:
    """Answers by question, in one file for each model, tokenizer, type and library version.

    Args:
        key: everything but the question on which an answer depends.
        root: folder of the files; by default `answers` in kedit's cache folder.
    """

    def __init__(self, key: Mapping[str, str], root: Path | None = None) -> None:
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        folder = root if root is not None else cache_root() / "answers"
        self._kept = Replies(folder / f"{name}.sqlite")

    def get(self, questions: Iterable[Question]) -> dict[Question, Answer]:
        """Those that were answered before.

        Raises:
            ArtifactError: the file cannot be read.
        """
        asked = {_text(question): question for question in questions}
        found = self._kept.get(asked).items()
        return {asked[text]: answer_from_json(asked[text], json.loads(a)) for text, a in found}

    def put(self, answers: Answers) -> None:
        """Keep answers: all of them or none.

        Raises:
            ArtifactError: the file cannot be written.
        """
        self._kept.put({_text(q): json.dumps(answer_to_json(a)) for q, a in answers.items()})


class Asker:
    """Both sides of an evaluation: a session's model without its edits, and with them.

    Args:
        session: with or without edits; they are suspended while the unedited side is asked.
        cache: where answers of the unedited side are kept.
    """

    def __init__(self, session: EditSession, cache: AnswerCache | None = None) -> None:
        self.session = session
        with session.suspended():
            self.key = answer_key(session.host)
            self._tensors = session.host.model.state_dict(keep_vars=True)
        self.weights = self.key["weights"]
        self.cache = cache or AnswerCache(self.key)

    def unedited(self, questions: Iterable[Question]) -> dict[Question, Answer]:
        """Answers of the model without any edit.

        Raises:
            SpoiltModelError: something else than the session has changed the weights.
        """
        wanted = list(dict.fromkeys(questions))
        found = self.cache.get(wanted)
        missing = [question for question in wanted if question not in found]
        if missing:
            with self.session.suspended():
                self.check()
                asked = self.session.view().ask(missing)
            self.cache.put(asked)
            found.update(asked)
        return {question: found[question] for question in wanted}

    def check(self) -> None:
        """Look at every bit of the weights; edits are not in force, or are suspended.

        Raises:
            SpoiltModelError: they are not those of the beginning.
        """
        if weights_digest(self.session.host, self._tensors) != self.weights:
            raise SpoiltModelError(
                "The weights are no longer those of the unedited model, though no edit is in force."
            )

    def edited(self, questions: Iterable[Question]) -> dict[Question, Answer]:
        """Answers of the model with the edits in force.

        Raises:
            EditError: no edit is in force, so this would compare the model with itself.
        """
        if not self.session.is_edited:
            raise EditError("No edit is in force, so there is no edited model to ask.")
        wanted = list(dict.fromkeys(questions))
        answers = self.session.view().ask(wanted)
        answers.update(self._divergences([q for q in wanted if isinstance(q, Diverge)]))
        return answers

    def _divergences(self, questions: list[Diverge]) -> dict[Question, Answer]:
        found: dict[Question, Answer] = {}
        for start in range(0, len(questions), _AT_ONCE):
            asked = questions[start : start + _AT_ONCE]
            new = self.session.view().distributions(asked)
            with self.session.suspended():
                old = self.session.view().distributions(asked)
            for question, p, q in zip(asked, old, new, strict=True):
                found[question] = Divergence(_kl(p, q), len(p))
        return found


def answer_key(host: ModelHost) -> dict[str, str]:
    """Everything on which the unedited model's answers depend."""
    tokenizer = host.tokenizer
    words = tokenizer.backend_tokenizer.to_str() + str(getattr(tokenizer, "chat_template", ""))
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return {
        "weights": weights_digest(host),
        "tokenizer": hashlib.sha256(words.encode()).hexdigest(),
        "special tokens": json.dumps([special, sorted(stop_ids(host))]),
        "config": hashlib.sha256(host.model.config.to_json_string().encode()).hexdigest(),
        "device": host.device.type,
        "kedit": kedit_core.__version__,
        "protocol": str(_VERSION),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def weights_digest(host: ModelHost, tensors: Mapping[str, Tensor] | None = None) -> str:
    """A digest of every bit of the weights, made where they are; the model's name stands for those
    that are offloaded.

    Args:
        host: the model.
        tensors: its weights by name, where modules of an edit may stand before them.
    """
    digest = hashlib.sha256()
    for name, tensor in (tensors or host.model.state_dict()).items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(host.name.encode() if tensor.is_meta else bit_sums(tensor))
    return digest.hexdigest()


def _kl(p: Tensor, q: Tensor) -> float:
    """Mean over tokens of KL(p ‖ q) of two log-distributions: (tokens, vocabulary) each."""
    return float((p.exp() * (p - q)).sum(dim=-1).mean().clamp(min=0))


def _text(question: Question) -> str:
    return json.dumps(question_to_json(question), ensure_ascii=False)
