"""The unedited model's answers: asked once per model and question, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import sqlite3
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
from kedit_core.errors import EditError
from kedit_core.paths import cache_root
from kedit_core.writing import stop_ids

_VERSION = 2  # of how questions are asked; a new one makes all kept answers void
_AT_ONCE = 8  # distributions of the whole vocabulary that are held together


class AnswerCache:
    """Answers by question, in one file for each model, tokenizer, type and library version.

    Args:
        key: everything but the question on which an answer depends.
        root: folder of the files; by default `answers` in kedit's cache folder.
    """

    def __init__(self, key: Mapping[str, str], root: Path | None = None) -> None:
        folder = root if root is not None else cache_root() / "answers"
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        self.path = folder / f"{name}.sqlite"
        with self._open() as file:
            file.execute(
                "CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, answer TEXT)"
            )
            file.execute("CREATE TABLE IF NOT EXISTS key (content TEXT PRIMARY KEY)")
            file.execute("INSERT OR IGNORE INTO key VALUES (?)", (json.dumps(key, sort_keys=True),))

    def get(self, questions: Iterable[Question]) -> dict[Question, Answer]:
        """Those that were answered before."""
        found: dict[Question, Answer] = {}
        with self._open() as file:
            for question in questions:
                row = file.execute(
                    "SELECT answer FROM answers WHERE question = ?", (_text(question),)
                ).fetchone()
                if row is not None:
                    found[question] = answer_from_json(question, json.loads(row[0]))
        return found

    def put(self, answers: Answers) -> None:
        """Keep answers: all of them or none."""
        rows = [(_text(q), json.dumps(answer_to_json(a))) for q, a in answers.items()]
        with self._open() as file:
            file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60)


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
        self.weights = self.key["weights"]
        self.cache = cache or AnswerCache(self.key)

    def unedited(self, questions: Iterable[Question]) -> dict[Question, Answer]:
        """Answers of the model without any edit."""
        wanted = list(dict.fromkeys(questions))
        found = self.cache.get(wanted)
        missing = [question for question in wanted if question not in found]
        if missing:
            with self.session.suspended():
                asked = self.session.view().ask(missing)
            self.cache.put(asked)
            found.update(asked)
        return {question: found[question] for question in wanted}

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


def weights_digest(host: ModelHost) -> str:
    """A digest of every bit of the weights, made where they are."""
    digest = hashlib.sha256()
    for name, tensor in host.model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(bit_sums(tensor))
    return digest.hexdigest()


def _kl(p: Tensor, q: Tensor) -> float:
    """Mean over tokens of KL(p ‖ q) of two log-distributions: (tokens, vocabulary) each."""
    return float((p.exp() * (p - q)).sum(dim=-1).mean().clamp(min=0))


def _text(question: Question) -> str:
    return json.dumps(question_to_json(question), ensure_ascii=False)
