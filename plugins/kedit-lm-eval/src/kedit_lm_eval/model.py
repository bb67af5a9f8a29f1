"""A `ModelView` as a model of the harness."""

from __future__ import annotations

from itertools import pairwise

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kedit_core.ask import Continue, Text
from kedit_core.editing import ModelView
from kedit_core.errors import ModelError, RequestError, SettingError
from kedit_core.tokens import Row

MAX_LENGTH = 2048  # the harness's, where a model does not say its own


class EditedLM(LM):  # type: ignore[misc]
    """Answers the harness's three kinds of requests as the edited model does.

    Texts become tokens as in the harness's `HFLM`, not as in `ModelView.ask`: what is to be read
    follows its context without a space between them, and may have no context at all.  A context
    that is too long loses its beginning, but unlike there not the special token before it.

    Args:
        view: the model with the edits in force.

    Raises:
        ModelError: the model is an encoder-decoder.
    """

    def __init__(self, view: ModelView) -> None:
        super().__init__()
        if view.host.is_encoder_decoder:
            raise ModelError(
                f"The harness asks causal models here, and {view.host.name} is an encoder-decoder."
            )
        self.view = view

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each context and continuation Σ log p, and whether each token is the best one."""
        scores = self.view.read([self._row(*request.args) for request in requests])
        return [(sum(score.logprobs), score.tokens == score.predicted) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Σ log p of whole texts, in windows as long as the model takes.

        What an edit puts before every prompt stands before the first window.
        """
        rows: list[Row] = []
        edges = [0]
        for request in requests:
            rows += self._windows(*request.args)
            edges.append(len(rows))
        sums = [sum(score.logprobs) for score in self.view.read(rows)]
        return [sum(sums[start:end]) for start, end in pairwise(edges)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy continuations up to the first of their stop texts.

        Raises:
            SettingError: the task draws at random.
        """
        asked: list[tuple[Continue, list[str]]] = []
        for request in requests:
            context, wanted = request.args
            wanted = normalize_gen_kwargs(wanted)
            if wanted["do_sample"]:
                raise SettingError(
                    f"The task '{request.task_name}' draws its answers at random; only greedy "
                    f"tasks are measured."
                )
            asked.append((Continue(context, wanted["max_gen_toks"]), wanted["until"]))
        answers = self.view.ask(question for question, _ in asked)
        texts = []
        for question, stops in asked:
            answer = answers[question]
            assert isinstance(answer, Text)
            text = self.view.host.tokenizer.decode(answer.tokens, skip_special_tokens=True)
            for stop in filter(None, stops):
                text = text.split(stop)[0]
            texts.append(text)
        return texts

    def _row(self, context: str, continuation: str) -> Row:
        """Spaces at the end of the context count as the continuation's."""
        (context,) = self.view.worded([context])
        bare = context.rstrip()
        if bare:
            given = self._ids(bare)
            wanted = self._ids(context + continuation)[len(given) :]
        else:
            given = [self._prefix_id()]
            wanted = self._ids(context + continuation, special=False)
        if not wanted:
            raise RequestError(
                f"{continuation!r} after …{context[-40:]!r} has no token of its own for "
                f"{self.view.host.name}."
            )
        return Row(tuple(given), tuple(wanted))

    def _windows(self, text: str) -> list[Row]:
        """The text's tokens, each once, after as many others as the model takes."""
        (before,) = self.view.worded([""])
        head = self._ids(before) if before else [self._prefix_id()]
        limit = self.view.host.max_length or MAX_LENGTH
        windows = get_rolling_token_windows(self._ids(text), head[-1], limit, context_len=1)
        rows = [Row(tuple(a), tuple(b)) for a, b in map(make_disjoint_window, windows)]
        return [Row((*head[:-1], *rows[0].prompt), rows[0].targets), *rows[1:]] if rows else []

    def _ids(self, text: str, special: bool = True) -> list[int]:
        found = self.view.host.tokenizer(
            text, add_special_tokens=special, truncation=False, verbose=False
        )
        return list(found["input_ids"])

    def _prefix_id(self) -> int:
        """What stands before a text that has no context."""
        tokenizer = self.view.host.tokenizer
        for found in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            if isinstance(found, int):
                return found
        raise ModelError(f"{self.view.host.name} has no token to begin a text with.")
