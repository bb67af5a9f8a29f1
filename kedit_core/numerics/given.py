"""Second moments that were collected elsewhere, as `.npz` files.

The layout is that of the statistics of kmeng01/rome, kmeng01/memit and zjunlp/EasyEdit (their
`util/runningstats.py` and `layer_stats.py`): `{module}_{type}_mom2_{documents}.npz`, in which the
array `mom2.mom2` is the sum Σ k kᵀ, (d_in, d_in), over `mom2.count` tokens.  Nothing in a file
says which model it was collected with, so it is compared with what the model at hand reads.
"""

from __future__ import annotations

import logging
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from kedit_core.corpus import Corpus
from kedit_core.errors import ArtifactError
from kedit_core.host import ModelHost
from kedit_core.job import EditJob
from kedit_core.numerics.sample import OPENINGS, sample
from kedit_core.numerics.states import watch_tokens
from kedit_core.sites import Site
from kedit_core.tokens import Row

log = logging.getLogger(__name__)

# In the batch size the authors' own code leaves the braces of a name that it did not fill in.
FILE_NAME = re.compile(
    r"(?P<module>.+)_float(16|32|64)_(\w+-)*mom2(-\w+?)?(_t(\d+|\{batch_tokens\}))?(_\d+)?\.npz"
)
ASYMMETRY = 1e-3  # of the largest number: sums in float32 are not symmetric to the last bit
ROUNDING = 1e-4  # of each diagonal number: more than long sums in float32 are off by
RIDGE = 0.1  # of the median diagonal number, as first tokens make some of them huge
TOKENS = 24  # that each of the texts is continued by
REFUSED, DOUBTED = 0.75, 0.9  # shares of tokens; see `check_model`


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


def check_model(job: EditJob, moments: Mapping[Site, Tensor]) -> None:
    """Refuse second moments of another model, and warn of doubtful ones.

    A model's keys k lie where its own C is large, and the units of another model stand in no
    relation to them.  So each key is compared with k̃, its own numbers in a random order.  What
    counts is the share of tokens with

        kᵀ (C + λI)⁻¹ k < k̃ᵀ (C + λI)⁻¹ k̃,

    which is 1 at best, and about a half for a C that says nothing about these keys.  Neither the
    scale of C nor a few huge numbers in it or in k matter.  The 400 tokens are written by the
    unedited model itself: that needs no data, and suits any language and tokenizer.

    On seven blocks of SmolLM2-135M, C of 1500 to 8200 tokens of its own text, of Markdown, of a
    licence or of Python gives shares from 0.94 to 1, and C of 75 German words, over and over, from
    0.84 to 1.  C of another block, or with its units in another order, gives 0.27 to 0.71.  Models
    with nearly the same weights, such as a base model and one tuned from it, are not told apart:
    noise of a fifth of each matrix's spread leaves shares from 0.96.

    Args:
        job: gives the model and the seed.
        moments: for each matrix C, (d_in, d_in), as given.

    Raises:
        ArtifactError: the share of a matrix is below 0.75, or its C is zero or not positive
            semidefinite.
    """
    for site, keys in _own_keys(job, list(moments)).items():
        share = _share(keys.double(), moments[site].to(keys.device).double(), job.generator())
        name = f"second moment of '{site.module}' in '{job.corpus.source}'"
        if share is None:
            raise ArtifactError(f"The {name} is none: it is zero or not positive semidefinite.")
        fit = (
            f"It fits {share:.0%} of the tokens that {job.host.name} writes; this model's own fits "
            f"nearly all, one of another model about half."
        )
        if share < REFUSED:
            raise ArtifactError(
                f"The {name} is of another model. {fit} Give the statistics of this model, or a "
                f"text to collect them on."
            )
        if share < DOUBTED:
            log.warning("The %s may be of another model. %s", name, fit)


@torch.no_grad()
def _own_keys(job: EditJob, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """What each matrix reads at each token of text by the unedited model: (tokens, d_in)."""
    found: dict[Site, Tensor] = {}
    points = {site: (site.module, "input") for site in sites}
    with job.unedited():
        texts = sample(job.host, OPENINGS, TOKENS, job.generator(), top_k=50)
        watch_tokens(job.host, [Row(ids) for ids in texts], points, found.__setitem__)
    return found


def _share(keys: Tensor, moment: Tensor, generator: Generator) -> float | None:
    """The share of `check_model`; None if C is zero or not positive semidefinite.

    Args:
        keys: (tokens, d_in), float64.
        moment: C, (d_in, d_in), float64.
        generator: CPU generator of the orders.
    """
    system, diagonal = moment.clone(), moment.diagonal()
    ridge = RIDGE * diagonal[diagonal > 0].median()
    system.diagonal().add_(ridge + ROUNDING * diagonal.abs())
    factor, failed = torch.linalg.cholesky_ex(system)
    if bool(failed):
        return None
    orders = torch.rand(keys.shape, generator=generator).argsort(dim=1).to(keys.device)
    own, mixed = (
        torch.linalg.solve_triangular(factor, rows.mT, upper=False).square().sum(dim=0)
        for rows in (keys, keys.gather(1, orders))
    )
    return float((own < mixed).double().mean())


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
