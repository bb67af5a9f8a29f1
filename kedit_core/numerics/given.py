"""Second moments that were collected elsewhere, as `.npz` files.

The layout is that of the statistics of kmeng01/rome, kmeng01/memit and zjunlp/EasyEdit (their
`util/runningstats.py` and `layer_stats.py`): `{module}_{type}_mom2_{documents}.npz`, in which the
array `mom2.mom2` is the sum Σ k kᵀ, (d_in, d_in), over `mom2.count` tokens.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kedit_core.corpus import Corpus
from kedit_core.errors import ArtifactError
from kedit_core.host import ModelHost
from kedit_core.sites import Site

# In the batch size the authors' own code leaves the braces of a name that it did not fill in.
FILE_NAME = re.compile(
    r"(?P<module>.+)_float(16|32|64)_(\w+-)*mom2(-\w+?)?(_t(\d+|\{batch_tokens\}))?(_\d+)?\.npz"
)
ASYMMETRY = 1e-3  # of the largest number: sums in float32 are not symmetric to the last bit


def moment_file(host: ModelHost, site: Site, corpus: Corpus) -> Path:
    """The file that holds the second moment of what a matrix reads.

    Raises:
        ArtifactError: there is none, or there are several.
    """
    named = [(FILE_NAME.fullmatch(file.name), file) for file in corpus.moment_files]
    found = [file for match, file in named if match and match["module"] == site.module]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise ArtifactError(
            f"'{corpus.source}' holds {len(found)} second moments of '{site.module}': {names}. "
            f"Give a folder with one of them."
        )
    others = ", ".join(sorted({match["module"] for match, _ in named if match})) or "none"
    raise ArtifactError(
        f"'{corpus.source}' holds no second moment of '{site.module}' of {host.name}, but of: "
        f"{others}. Give a file of the name '{site.module}_float32_mom2_100000.npz'."
    )


def token_count(file: Path) -> int:
    """Over how many tokens the file's second moment was collected.

    Raises:
        ArtifactError: the file is damaged or does not say.
    """
    count = _array(file, "mom2.count")
    if count.ndim or count.dtype.kind not in "iuf" or not 0 < count < 2**53:
        raise ArtifactError(f"'mom2.count' in {file} is no number of tokens.")
    return int(count)


def given_moment(host: ModelHost, site: Site, corpus: Corpus) -> Tensor:
    """The second moment C of what a matrix reads, from a file.

    Returns:
        (d_in, d_in), float32, on the CPU.

    Raises:
        ArtifactError: there is no such file, it is damaged, it was made for a matrix of another
            width, or what it holds is not finite or not symmetric.
    """
    file = moment_file(host, site, corpus)
    width = host.weight(site).shape[1]
    total = _array(file, "mom2.mom2")
    if total.shape != (width, width) or total.dtype.kind != "f":
        raise ArtifactError(
            f"{file} is not of this model: it holds {_shape(total)}, and '{site.module}' of "
            f"{host.name} needs {width}×{width}. Give the statistics of this model."
        )
    moment = (torch.from_numpy(total) / token_count(file)).float()
    if not bool(torch.isfinite(moment).all()):
        raise ArtifactError(f"The second moment in {file} is not finite. Collect it again.")
    if float((moment - moment.mT).abs().max()) > ASYMMETRY * float(moment.abs().max()):
        raise ArtifactError(f"What {file} holds is not symmetric, so it is no second moment.")
    return moment


def _array(file: Path, name: str) -> Any:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return arrays[name]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ArtifactError(
            f"{file} cannot be read as a second moment: {str(error).strip()}."
        ) from None


def _shape(array: Any) -> str:
    return f"{'×'.join(map(str, array.shape)) or 'a number'} of type {array.dtype}"
