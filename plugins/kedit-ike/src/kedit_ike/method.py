"""IKE, ICE and PROMPT: nothing is computed but what stands before the question."""

from __future__ import annotations

from collections.abc import Sequence

from kedit_core.editing import CallEffect, EditJob, ModelHost, Patch
from kedit_core.encoder import Encoder
from kedit_core.request import EditRequest
from kedit_core.tokens import encode
from kedit_ike.demonstrations import nearest_demonstrations, training_corpus
from kedit_ike.hparams import IkeHyperParams, InContextHyperParams
from kedit_ike.words import demonstration, fact_lines, statement


class InContext:
    """The new fact before the question: ICE, and with an instruction PROMPT.

    Both are baselines of IKE, Zheng et al. 2023 (arXiv:2305.12740).
    """

    def __init__(self, hparams: InContextHyperParams) -> None:
        self.hparams = hparams

    def edit(self, job: EditJob) -> Patch:
        """One entry of the fact memory for each request; the model is not asked anything."""
        encoder = Encoder(self.hparams.encoder)
        shown = self._demonstrations(job, encoder)
        embeddings = encoder.embed([request.text for request in job.requests])
        effects = tuple(
            CallEffect(
                "in-context",
                config={
                    "prompt": request.text,
                    "target": request.target_new,
                    "instruction": self.hparams.instruction,
                    "demonstrations": list(demonstrations),
                    "min_similarity": self.hparams.min_similarity,
                    "gate_single": self.hparams.gate_single,
                    "encoder": self.hparams.encoder,
                    **self._room(job.host, request, demonstrations),
                },
                state={"embedding": embedding.clone()},
            )
            for request, embedding, demonstrations in zip(
                job.requests, embeddings, shown, strict=True
            )
        )
        return Patch("in-context", effects)

    def _demonstrations(self, job: EditJob, encoder: Encoder) -> list[tuple[str, ...]]:
        """For each request what is demonstrated before its fact, the farthest first."""
        return [()] * len(job.requests)

    def _room(
        self, host: ModelHost, request: EditRequest, demonstrations: Sequence[str]
    ) -> dict[str, object]:
        """What is needed to drop demonstrations that the model would not take."""
        return {"lengths": [], "room": None}


class Ike(InContext):
    """In-context knowledge editing, Zheng et al. 2023 (arXiv:2305.12740).

    Demonstrations teach the model to copy a new fact, to use it in other words, and to leave
    other facts alone.
    """

    hparams: IkeHyperParams

    def __init__(self, hparams: IkeHyperParams) -> None:
        super().__init__(hparams)

    def prepare(self, job: EditJob) -> None:
        """Embed the training facts."""
        training_corpus(job, self.hparams, Encoder(self.hparams.encoder))

    def _demonstrations(self, job: EditJob, encoder: Encoder) -> list[tuple[str, ...]]:
        if not self.hparams.k:
            shown: list[tuple[str, ...]] = [()] * len(job.requests)
        else:
            corpus = training_corpus(job, self.hparams, encoder)
            shown = nearest_demonstrations(job, self.hparams, encoder, corpus)
        if not self.hparams.final_copy:
            return shown
        return [
            (*found, demonstration(fact, fact))
            for found, fact in zip(shown, map(_statement, job.requests), strict=True)
        ]

    def _room(
        self, host: ModelHost, request: EditRequest, demonstrations: Sequence[str]
    ) -> dict[str, object]:
        """The tokens from each demonstration on to the question, and how many the model takes."""
        if host.max_length is None:
            return {"lengths": [], "room": None}
        lines = fact_lines(self.hparams.instruction, _statement(request))
        encoded = encode(host, "".join(demonstrations) + lines, any_length=True)
        always = set(host.tokenizer.all_special_ids)
        lengths, start = [], 0
        for text in (*demonstrations, lines):
            lengths.append(
                sum(
                    token in always or first >= start or end > start
                    for token, (first, end) in zip(encoded.ids, encoded.spans, strict=True)
                )
            )
            start += len(text)
        return {"lengths": lengths, "room": host.max_length - self.hparams.reserve}


def _statement(request: EditRequest) -> str:
    return statement(request.text, request.target_new)
