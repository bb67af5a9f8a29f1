"""Sequence classification models of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from kedit_core.errors import SettingError, reason_of
from kedit_core.host import CANNOT_LOAD
from kedit_core.models import locate
from kedit_core.plugins import discover

MAX_TOKENS = 512
BATCH = 16


class SequenceClassifier:
    """p(label | text): the softmax of a model's logits, from the first 512 tokens of the text.

    The config is read at once, so that a wrong name is told before anything is computed; the
    weights are read when the first text comes, in float32 and on the CPU, and kept.

    Args:
        model: folder or hub id.
        labels: names of the classes in their order, joined by `+`; by default the config's.

    Attributes:
        labels: names of the classes in their order.

    Raises:
        SettingError: the model cannot be loaded, has no classes that exclude one another, or has
            not as many as `labels` names.
        ModelError, UnknownNameError: `model` is no folder and no hub id.
    """

    def __init__(self, model: str, labels: str = "") -> None:
        self.model = model
        self._folder = locate(model, discover())
        config = self._try(AutoConfig)
        if config.num_labels < 2 or config.problem_type == "multi_label_classification":
            raise SettingError(
                f"The classifier '{model}' has no classes that exclude one another. Give one that "
                f"has, with model=."
            )
        named = [label.strip() for label in labels.split("+")] if labels else []
        self.labels = tuple(named or (config.id2label[n] for n in range(config.num_labels)))
        if len(set(self.labels)) != config.num_labels or not all(self.labels):
            raise SettingError(
                f"The classifier '{model}' has {config.num_labels} classes, which "
                f"'{'+'.join(self.labels)}' does not name. Give each a name of its own, in their "
                f"order: labels=FIRST+SECOND."
            )
        self._loaded: tuple[Any, Any] | None = None

    def classify(self, texts: Sequence[str]) -> list[Mapping[str, float]]:
        """For each text the probability of each label.

        Raises:
            SettingError: the weights or the tokenizer cannot be loaded.
        """
        if self._loaded is None:
            self._loaded = self._load()
        model, tokenizer = self._loaded
        pads = tokenizer.pad_token_id is not None and model.config.pad_token_id is not None
        size = BATCH if pads else 1
        found: list[Mapping[str, float]] = []
        for start in range(0, len(texts), size):
            for row in self._probabilities(model, tokenizer, texts[start : start + size]):
                found.append(dict(zip(self.labels, row, strict=True)))
        return found

    @torch.no_grad()
    def _probabilities(self, model: Any, tokenizer: Any, texts: Sequence[str]) -> list[list[float]]:
        """Rows of (labels); in float64, so that small ones do not become 0."""
        batch = tokenizer(
            list(texts),
            padding=len(texts) > 1,
            truncation=True,
            max_length=min(MAX_TOKENS, tokenizer.model_max_length),
            return_tensors="pt",
        )
        accepted = inspect.signature(model.forward).parameters
        logits = model(**{k: v for k, v in batch.items() if k in accepted}).logits
        rows: list[list[float]] = logits.double().softmax(dim=-1).tolist()
        return rows

    def _load(self) -> tuple[Any, Any]:
        tokenizer = self._try(AutoTokenizer)
        model, info = self._try(
            AutoModelForSequenceClassification, dtype=torch.float32, output_loading_info=True
        )
        if info["missing_keys"]:  # they were drawn at random
            raise SettingError(
                f"The model '{self.model}' is no sequence classifier: it has no weights for "
                f"{min(info['missing_keys'])}. Give one that is, with model=."
            )
        return model.eval(), tokenizer

    def _try(self, what: Any, **options: Any) -> Any:
        try:
            return what.from_pretrained(self._folder, trust_remote_code=False, **options)
        except CANNOT_LOAD as error:
            reason = reason_of(error).rstrip(".")
            raise SettingError(
                f"The classifier '{self.model}' cannot be loaded: {reason}. Give model=FOLDER, or "
                f"choose another classifier or other metrics."
            ) from None
