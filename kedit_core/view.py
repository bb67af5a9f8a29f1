"""`ModelView`: everyone who asks the model something asks here.

Edits in weights, wrapped modules, prompts and logits then count alike.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Generator, Tensor

from kedit_core.ask import (
    Answer,
    Continue,
    Converse,
    Diverge,
    Divergence,
    Form,
    Question,
    Read,
    Sample,
    Score,
    Text,
)
from kedit_core.calls import MAX_LOGITS, changed, depths_of
from kedit_core.effects import Middleware
from kedit_core.errors import RequestError
from kedit_core.forward import label_logits, streams
from kedit_core.guard import untouched
from kedit_core.host import ModelHost
from kedit_core.tokens import MAX_TOKENS, Row, buckets, encode, fit, join, pad
from kedit_core.writing import Written, stop_ids, write_freely, write_greedily

TASK = "Please answer the question:"  # arXiv:2502.11177
ROUND = "\n\nQ: {}\nA:"


@dataclass(frozen=True)
class Comparison:
    """A prompt's greedy answers without and with the edits."""

    prompt: str
    before: str
    after: str


class ModelView:
    """Questions to a model.

    Args:
        host: the model.
        calls: returns the middleware in force, oldest first.
    """

    def __init__(self, host: ModelHost, calls: Callable[[], list[Middleware]] = list) -> None:
        self.host = host
        self._calls = calls

    @overload
    def greedy(self, prompts: str, max_new_tokens: int = ...) -> str: ...

    @overload
    def greedy(self, prompts: list[str], max_new_tokens: int = ...) -> list[str]: ...

    def greedy(self, prompts: str | list[str], max_new_tokens: int = 16) -> str | list[str]:
        """Greedy continuation of each prompt, without the prompt.

        Raises:
            RequestError: a prompt and its answer are longer than the model takes.
        """
        if isinstance(prompts, str):
            return self.greedy([prompts], max_new_tokens)[0]
        rows = [Row(encode(self.host, text).ids) for text in self.worded(prompts)]
        self._check_room(prompts, rows, max_new_tokens)
        written = write_greedily(self.host, self._calls(), rows, max_new_tokens)
        return [self._new_text(row, ids) for row, (ids, _) in zip(rows, written, strict=True)]

    def score(self, prompts: Sequence[str], targets: Sequence[str]) -> list[Score]:
        """How the model reads each target after its prompt.

        Raises:
            RequestError: a prompt with its target is longer than the model takes, or there are not
                as many targets as prompts.
        """
        is_text = isinstance(prompts, str) or isinstance(targets, str)
        if is_text or len(prompts) != len(targets):
            raise RequestError(
                "score takes a list of prompts and one target for each: score([prompt], [target])."
            )
        asked = [Read(p, t) for p, t in zip(prompts, targets, strict=True)]
        texts = self.worded(prompts)
        rows = [join(self.host, text, q.target) for text, q in zip(texts, asked, strict=True)]
        return self._read(asked, rows)

    def logits(self, prompts: Sequence[str]) -> Tensor:
        """Next-token logits after each prompt: (prompts, vocabulary), float32, on the CPU."""
        rows = [Row(encode(self.host, text).ids, targets=(0,)) for text in self.worded(prompts)]
        return self._target_logits(rows).cpu()

    def ask(self, questions: Iterable[Question]) -> dict[Question, Answer]:
        """The answers to all questions, each asked once, in batches of similar length.

        A prompt that is too long loses its beginning, and the answer says so.  `Diverge` compares
        with the unedited model and so needs a session; here it is 0, the unedited model's own.

        Raises:
            RequestError: a text has no token, or a target alone is too long.
        """
        wanted = list(dict.fromkeys(questions))
        answers: dict[Question, Answer] = {}
        reads = [q for q in wanted if isinstance(q, Read)]
        rows, cuts = self._rows(reads)
        for read, score, cut in zip(reads, self._read(reads, rows), cuts, strict=True):
            answers[read] = replace(score, cut=cut)
        answers.update(self._continued([q for q in wanted if isinstance(q, Continue)]))
        answers.update(self._conversed([q for q in wanted if isinstance(q, Converse)]))
        answers.update(self._sampled([q for q in wanted if isinstance(q, Sample)]))
        diverges = [q for q in wanted if isinstance(q, Diverge)]
        rows, _ = self._rows(diverges)
        for diverge, row in zip(diverges, rows, strict=True):
            answers[diverge] = Divergence(0.0, len(row.targets))
        return answers

    @torch.no_grad()
    def distributions(self, questions: Sequence[Diverge]) -> list[Tensor]:
        """For each question the log-probabilities at its target: (tokens, vocabulary), float32."""
        rows, _ = self._rows(questions)
        logprobs = torch.log_softmax(self._target_logits(rows), dim=-1)
        return list(logprobs.split([len(row.targets) for row in rows]))

    # -- for those who make tokens of texts themselves ------------------------------------

    def read(self, rows: Sequence[Row]) -> list[Score]:
        """How the model reads each row's targets.

        Rows are tokens: nothing is put before them, see `worded`.  A prompt that is too long loses
        its beginning, and the answer says so.

        Raises:
            RequestError: a row's targets alone are too long.
        """
        fitted = [fit(self.host, row) for row in rows]
        scores = self._read([Read("", "")] * len(rows), [row for row, _ in fitted])
        return [replace(score, cut=cut) for score, (_, cut) in zip(scores, fitted, strict=True)]

    def worded(self, prompts: Sequence[str], forms: Sequence[Form] = ()) -> list[str]:
        """What the model is given for each prompt, with all that edits make of it; prompts are
        `bare` by default."""
        texts = list(prompts)
        for call in self._calls() if texts else ():
            texts = call.prompts(texts)
        forms = forms or ["bare"] * len(texts)
        return [self._formed(text, form) for text, form in zip(texts, forms, strict=True)]

    # -- texts to rows --------------------------------------------------------------------

    def _formed(self, prompt: str, form: Form) -> str:
        return prompt if form == "bare" else self._spoken([prompt], [])

    def _spoken(self, turns: Sequence[str], replies: Sequence[str]) -> str:
        """What people told the model so far, with its replies to all turns but the last."""
        if not self._is_chat("task"):
            lines = [f" {_first_line(reply)}" for reply in replies]
            rounds = zip(turns, [*lines, ""], strict=True)
            return TASK + "".join(ROUND.format(turn) + line for turn, line in rounds)
        tokenizer = self.host.tokenizer
        said = [{"role": "user", "content": turns[0]}]
        for reply, turn in zip(replies, turns[1:], strict=True):
            said += [{"role": "assistant", "content": reply}, {"role": "user", "content": turn}]
        text = str(tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False))
        if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
            text = text.removeprefix(str(tokenizer.bos_token))  # encoding puts it there
        return text

    def _is_chat(self, form: Form) -> bool:
        """Whether the chat template stands round prompts of this form."""
        return form == "task" and bool(getattr(self.host.tokenizer, "chat_template", None))

    def _rows(self, questions: Sequence[Read] | Sequence[Diverge]) -> tuple[list[Row], list[bool]]:
        """Each question as a row that the model takes, and whether its prompt was cut."""
        forms: list[Form] = [q.form if isinstance(q, Read) else "bare" for q in questions]
        texts = self.worded([q.prompt for q in questions], forms)
        fitted = []
        for number, text in enumerate(texts):
            question = questions[number]
            exact = self._is_chat(forms[number]) or getattr(question, "exact", False)
            row = join(self.host, text, question.target, any_length=True, exact=exact)
            if isinstance(question, Read) and question.stop:
                row = replace(row, targets=(*row.targets, self._stop_id()))
            fitted.append(fit(self.host, row))
        return [row for row, _ in fitted], [cut for _, cut in fitted]

    def _stop_id(self) -> int:
        stops = stop_ids(self.host)
        if not stops:
            raise RequestError(f"{self.host.name} has no end-of-text token to read.")
        own = self.host.tokenizer.eos_token_id
        return own if isinstance(own, int) else min(stops)

    def _check_room(self, prompts: Sequence[str], rows: Sequence[Row], new_tokens: int) -> None:
        limit = self.host.max_length
        if self.host.is_encoder_decoder or limit is None or not rows:
            return
        length, prompt = max((len(r.prompt), p) for r, p in zip(rows, prompts, strict=True))
        if length + new_tokens - 1 > limit:  # the last token is never read
            raise RequestError(
                f"The prompt {prompt[:40]!r}… and its answer have {length + new_tokens} tokens, "
                f"and {self.host.name} takes at most {limit}. Shorten it, or ask for fewer tokens."
            )

    # -- reading --------------------------------------------------------------------------

    @torch.no_grad()
    def _read(self, questions: Sequence[Read], rows: Sequence[Row]) -> list[Score]:
        # Rows that differ in the last target only are one row for the model, which never reads it.
        same: dict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
        for n, row in enumerate(rows):
            same[row.ids, len(row.prompt)].append(n)
        members = list(same.values())
        scores: list[Score | None] = [None] * len(rows)
        for group in self._groups([rows[numbers[0]] for numbers in members]):
            logits = self._batch_logits([rows[members[g][0]] for g in group])
            logprobs = torch.log_softmax(logits, dim=-1)
            best = logits.argmax(dim=-1).tolist()
            start = 0
            for g in group:
                end = start + len(rows[members[g][0]].targets)
                for n in members[g]:
                    scores[n] = _score(questions[n], rows[n], logprobs[start:end], best[start:end])
                start = end
        return [score for score in scores if score is not None]

    def _groups(self, rows: Sequence[Row]) -> list[list[int]]:
        """Rows of similar length, so many that a batch and its logits stay small."""
        groups: list[list[int]] = []
        vocabulary = self.host.model.config.get_text_config().vocab_size
        for bucket in buckets([len(row.prompt) + len(row.targets) for row in rows], MAX_TOKENS):
            room = 0
            for n in bucket:
                room -= len(rows[n].targets) * vocabulary
                if room < 0 or n == bucket[0]:
                    groups.append([])
                    room = MAX_LOGITS - len(rows[n].targets) * vocabulary
                groups[-1].append(n)
        return groups

    @torch.no_grad()
    def _target_logits(self, rows: Sequence[Row]) -> Tensor:
        """The logits that predict the rows' targets: (targets of all rows, vocabulary)."""
        parts: list[Tensor] = [torch.empty(0)] * len(rows)
        for group in self._groups(rows):
            batch = [rows[n] for n in group]
            split = self._batch_logits(batch).split([len(row.targets) for row in batch])
            for n, logits in zip(group, split, strict=True):
                parts[n] = logits
        if not parts:
            return torch.empty(0, self.host.model.config.get_text_config().vocab_size)
        return torch.cat(parts)

    def _batch_logits(self, rows: Sequence[Row]) -> Tensor:
        batch = pad(self.host, rows)
        calls = self._calls()
        with (
            self.host.lock,
            untouched(self.host.model, self.host.tokenizer),
            streams(self.host, depths_of(calls)) as found,
        ):
            logits = label_logits(self.host, batch).float()
            at_labels = {
                depth: s[batch.rows.to(s.device), batch.columns.to(s.device)]
                for depth, s in found.items()
            }
            return changed(self.host, calls, logits, at_labels)

    # -- writing --------------------------------------------------------------------------

    def _continued(self, questions: Sequence[Continue]) -> dict[Question, Answer]:
        texts = self.worded([q.prompt for q in questions], [q.form for q in questions])
        return dict(zip(questions, self._answered(questions, texts), strict=True))

    def _conversed(self, questions: Sequence[Converse]) -> dict[Question, Answer]:
        """First all conversations of one turn, then those that go on from them, and so on."""
        said: dict[Converse, Text] = {}
        for length in range(1, max((len(q.turns) for q in questions), default=0) + 1):
            longer = [q for q in questions if len(q.turns) >= length]
            asked = list(dict.fromkeys(replace(q, turns=q.turns[:length]) for q in longer))
            texts = []
            for q in asked:
                earlier = [said[replace(q, turns=q.turns[:n])].text for n in range(1, length)]
                texts.append(self._spoken(self.worded(q.turns), earlier))
            said.update(zip(asked, self._answered(asked, texts), strict=True))
        return {q: said[q] for q in questions}

    def _answered(
        self, questions: Sequence[Continue | Converse], texts: Sequence[str]
    ) -> list[Text]:
        """What the model says after each question's text.

        Each row is continued once, as far as any question wants it.  A prompt that must be cut for
        one question only is another row there.
        """
        fitted = [
            self._prompt_row(text, q.new_tokens) for q, text in zip(questions, texts, strict=True)
        ]
        longest: dict[Row, int] = {}
        for q, (row, _) in zip(questions, fitted, strict=True):
            longest[row] = max(q.new_tokens, longest.get(row, 0))
        calls, written = self._calls(), dict[Row, Written]()
        for new_tokens in sorted(set(longest.values())):
            rows = [row for row, wanted in longest.items() if wanted == new_tokens]
            found = write_greedily(self.host, calls, rows, new_tokens)
            written.update(zip(rows, found, strict=True))
        return [
            self._text(q.prompt, row, cut, *written[row], room=q.new_tokens)
            for q, (row, cut) in zip(questions, fitted, strict=True)
        ]

    def _sampled(self, questions: Sequence[Sample]) -> dict[Question, Answer]:
        answers: dict[Question, Answer] = {}
        limit = self.host.max_length
        for length, top_k in dict.fromkeys((q.length, q.top_k) for q in questions):
            if limit is not None and length > limit:
                raise RequestError(
                    f"A sample of {length} tokens is asked for, and {self.host.name} takes at most "
                    f"{limit}. Ask for a shorter one."
                )
            asked = [q for q in questions if (q.length, q.top_k) == (length, top_k)]
            fitted = [self._prompt_row(text, 1) for text in self.worded([q.prompt for q in asked])]
            rows, cuts = [row for row, _ in fitted], [cut for _, cut in fitted]
            rooms = [max(1, length - len(row.prompt)) for row in rows]
            draws = [_generator(q) for q in asked]
            written = write_freely(self.host, self._calls(), rows, rooms, draws, top_k)
            for q, row, cut, new, room in zip(asked, rows, cuts, written, rooms, strict=True):
                answers[q] = self._text(q.prompt, row, cut, *new, room=room)
        return answers

    def _prompt_row(self, text: str, new_tokens: int) -> tuple[Row, bool]:
        ids = encode(self.host, text, any_length=True).ids
        return fit(self.host, Row(ids), new_tokens)

    def _text(
        self, prompt: str, row: Row, cut: bool, ids: list[int], ended: bool, *, room: int
    ) -> Text:
        """What was written, as far as there is room for it."""
        kept = ids[:room]
        ended = ended and len(ids) < room
        return Text(prompt, self._new_text(row, kept), tuple(kept), ended, cut, room)

    def _new_text(self, row: Row, ids: Sequence[int]) -> str:
        if self.host.is_encoder_decoder:
            return self._decode(ids)
        return self._decode([*row.prompt, *ids])[len(self._decode(row.prompt)) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.host.tokenizer.decode(list(ids), skip_special_tokens=True))


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _generator(question: Sample) -> Generator:
    digest = hashlib.sha256(f"{question.seed}\0{question.prompt}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _score(question: Read, row: Row, logprobs: Tensor, predicted: Sequence[int]) -> Score:
    tokens = torch.tensor(row.targets, device=logprobs.device)
    picked = logprobs.gather(1, tokens[:, None])[:, 0]
    return Score(
        prompt=question.prompt,
        target=question.target,
        tokens=row.targets,
        logprobs=tuple(picked.tolist()),
        predicted=tuple(predicted),
        # Of a model that says no numbers, all tokens are as far from the first place as can be.
        rank=int((~(logprobs[0] <= picked[0])).sum()),
        merged=row.merged,
    )
