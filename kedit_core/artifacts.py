"""The store of what can be made again but is dear: statistics, projectors, sampled texts."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kedit_core.errors import ArtifactError
from kedit_core.files import new_folder
from kedit_core.paths import cache_root

log = logging.getLogger(__name__)

Key = Mapping[str, Any]


class ArtifactStore:
    """Tensors under keys that nothing can mix up.

    A key is a JSON mapping that names everything the content depends on: the model's
    fingerprint, the module, the corpus, all settings.  It is stored beside the content and
    compared field by field at each look-up.

    Args:
        root: folder of the store; by default `artifacts` in kedit's cache folder.

    Attributes:
        found: how many artifacts of each kind were found so far, and so not made again.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = Path(root) if root is not None else cache_root() / "artifacts"
        self.found: Counter[str] = Counter()

    def folder(self, kind: str, key: Key) -> Path:
        """Where the artifact is, or would be."""
        digest = hashlib.sha256(_canonical(key).encode()).hexdigest()[:32]
        return self.root / kind / digest

    def get(self, kind: str, key: Key) -> dict[str, Tensor] | None:
        """The tensors stored under the key, or None.

        Raises:
            ArtifactError: the stored files are damaged or belong to another key.
        """
        folder = self.folder(kind, key)
        if not folder.exists():
            return None
        try:
            stored = json.loads((folder / "key.json").read_text("utf-8"))
            tensors = load_file(folder / "tensors.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise ArtifactError(
                f"The stored {kind} in {folder} is damaged ({error}). Delete that folder; it is "
                f"made again when it is needed."
            ) from None
        if _canonical(stored) != _canonical(key):
            raise ArtifactError(f"The stored {kind} in {folder} belongs to another key. Delete it.")
        self.found[kind] += 1
        return tensors

    def put(self, kind: str, key: Key, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors under a key, whole or not at all.

        Raises:
            ArtifactError: the disk refuses.
        """
        folder = self.folder(kind, key)
        try:
            with new_folder(folder) as temporary:
                (temporary / "key.json").write_text(json.dumps(key, indent=2), "utf-8")
                # Cloned, as the file format has no tensors that share memory.
                own = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
                save_file(own, temporary / "tensors.safetensors")
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"The {kind} cannot be stored in {folder}: {error}.") from None


def _canonical(key: Key) -> str:
    return json.dumps(key, sort_keys=True, separators=(",", ":"))
