"""Second moments of what matrices read on ordinary text."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from kedit_core.artifacts import ArtifactStore
from kedit_core.corpus import Corpus, moments_key
from kedit_core.errors import ArtifactError
from kedit_core.files import new_file
from kedit_core.host import ModelHost
from kedit_core.job import EditJob
from kedit_core.numerics.given import check_model, given_moment, moment_file, token_count
from kedit_core.numerics.sample import OPENINGS, sample
from kedit_core.numerics.solve import cholesky
from kedit_core.numerics.states import watch_tokens
from kedit_core.progress import progress
from kedit_core.sites import Site
from kedit_core.tokens import Row

log = logging.getLogger(__name__)

TOKENS_PER_DIMENSION = 10  # arXiv:2506.04226: 2 to 10 times d_in are enough
CHUNK_ROWS = 32
GENERATED_LENGTH = 48  # tokens of one generated text
PIECE_LENGTH = 512  # tokens of one piece of a longer text
SAVE_EVERY = 30.0  # seconds between two saves of unfinished sums

Rows = list[tuple[int, ...]]


def second_moments(
    job: EditJob, sites: Sequence[Site], tokens: int | None = None
) -> dict[Site, Tensor]:
    """C = E[k kᵀ] of each matrix's input, from the store or collected now in one pass.

    Always of the unedited model.  Collected on `job.corpus`; every token counts, the first too.
    Where the corpus is a folder of second moments that were collected elsewhere, they are taken
    from there, checked and kept; see `kedit_core.numerics.given`.

    Args:
        job: gives model, corpus, seed and artifact store.
        sites: matrices (d_out, d_in) of one model.
        tokens: how many; by default 10 · d_in.  Given moments are of as many as they are.

    Returns:
        For each site (d_in, d_in), float32, on the CPU.

    Raises:
        ArtifactError: the corpus cannot be read or has too few tokens, or the given moments are
            not those of these matrices of this model.
    """
    keys = {site: _key(job, site, tokens) for site in sites}
    found = {site: job.artifacts.get("second-moment", key) for site, key in keys.items()}
    missing = [site for site, stored in found.items() if stored is None]
    if missing and job.corpus.moment_files:
        given = {site: given_moment(job.host, site, job.corpus) for site in missing}
        check_model(job, given)
        for site, moment in given.items():
            found[site] = {"moment": moment}
            job.artifacts.put("second-moment", keys[site], {"moment": moment})
        missing = []
    # One pass for all that read the same number of tokens.
    for wanted in sorted({int(keys[site]["tokens"]) for site in missing}):
        together = [site for site in missing if keys[site]["tokens"] == wanted]
        found.update(_collect_and_store(job, together, keys, wanted))
    return {site: stored["moment"] for site, stored in found.items() if stored is not None}


def second_moment(job: EditJob, site: Site, tokens: int | None = None) -> Tensor:
    """As `second_moments`, of one matrix."""
    return second_moments(job, [site], tokens)[site]


def moment_factors(
    job: EditJob, sites: Sequence[Site], tokens: int | None = None
) -> dict[Site, Tensor]:
    """Lower Cholesky factors of `second_moments`, each computed once and kept.

    Returns:
        For each site L (d_in, d_in) with L Lᵀ = C, float32, on the CPU.

    Raises:
        ArtifactError: as `second_moments`.
        EditError: a second moment is not positive definite.
    """

    def factor(moment: Tensor) -> dict[str, Tensor]:
        return {"factor": cholesky(moment).float()}

    found = from_moments(job, sites, tokens, "second-moment-factor", factor)
    return {site: stored["factor"] for site, stored in found.items()}


def from_moments(
    job: EditJob,
    sites: Sequence[Site],
    tokens: int | None,
    kind: str,
    compute: Callable[[Tensor], dict[str, Tensor]],
) -> dict[Site, dict[str, Tensor]]:
    """What is computed of each of `second_moments` once and kept.

    Args:
        kind: of the artifact; its key is that of the second moment.
        compute: from C (d_in, d_in), on the device of its matrix, to what is kept.

    Raises:
        ArtifactError: as `second_moments`.
    """
    keys = {site: _key(job, site, tokens) for site in sites}
    found = {site: job.artifacts.get(kind, key) for site, key in keys.items()}
    missing = [site for site, stored in found.items() if stored is None]
    for site, moment in second_moments(job, missing, tokens).items():
        computed = compute(moment.to(job.host.weight(site).device))
        kept = {name: tensor.cpu() for name, tensor in computed.items()}
        job.artifacts.put(kind, keys[site], kept)
        found[site] = kept
    return {site: stored for site, stored in found.items() if stored is not None}


def _key(job: EditJob, site: Site, tokens: int | None) -> dict[str, Any]:
    width = job.host.weight(site).shape[1]
    if job.corpus.moment_files:
        file = moment_file(job.host, site, job.corpus)
        corpus: dict[str, Any] = {"given": {file.name: moments_key(file)}}
        tokens = token_count(file)
    else:
        corpus = job.corpus.key()
    if job.corpus.is_generated:
        corpus["seed"] = job.seed
    return {
        "model": job.fingerprint,
        "parameter": site.parameter,
        "width": width,
        "corpus": corpus,
        "tokens": tokens or TOKENS_PER_DIMENSION * width,
        "version": 1,
    }


def _collect_and_store(
    job: EditJob, sites: Sequence[Site], keys: dict[Site, dict[str, Any]], tokens: int
) -> dict[Site, dict[str, Tensor]]:
    widths = [int(keys[site]["width"]) for site in sites]
    size = sum(4 * w * w for w in widths) / 1e6
    log.info(
        "Second moments of %d matrices of %s: %d tokens of %s, %.1f MB.",
        len(sites),
        job.host.name,
        tokens,
        "text that it writes" if job.corpus.is_generated else job.corpus.source,
        size,
    )
    started = time.perf_counter()
    # One pass: its name is the key of all of them together.
    together = {"sites": [keys[site] for site in sites]}
    with job.unedited():
        moments = collect(job.host, sites, job.corpus, tokens, job.seed, job.artifacts, together)
    stored = {site: {"moment": moment} for site, moment in moments.items()}
    for site, content in stored.items():
        job.artifacts.put("second-moment", keys[site], content)
    _partial(job.artifacts, together).unlink(missing_ok=True)
    log.info("Collected in %.0f s and kept for later edits.", time.perf_counter() - started)
    return stored


@torch.no_grad()
def collect(
    host: ModelHost,
    sites: Sequence[Site],
    corpus: Corpus,
    tokens: int,
    seed: int,
    store: ArtifactStore | None = None,
    key: dict[str, Any] | None = None,
) -> dict[Site, Tensor]:
    """Collect the second moments of all sites in one pass over the text.

    Sums run in float64 for matrices up to 4096 wide, in float32 above.  With a store the
    unfinished sums are saved every half minute, and the same call continues from there.

    Args:
        host: the model.
        sites: matrices (d_out, d_in).
        corpus: the text.
        tokens: how many to read.
        seed: from which generated text is drawn.
        store, key: where unfinished sums are kept.

    Returns:
        For each site (d_in, d_in), float32, on the CPU.

    Raises:
        ArtifactError: the text has no tokens, or fewer than the widest matrix has columns.
    """
    partial = _partial(store, key) if store is not None and key is not None else None
    sums, seen, chunk = _resume(host, sites, partial)
    saved = time.monotonic()
    with progress(tokens, f"second moments of {host.name}", "tok", initial=seen) as bar:
        chunks = _chunks(host, corpus, seed, chunk)
        # Not one chunk more than is needed: a generated one takes long.
        while seen < tokens and (drawn := next(chunks, None)) is not None:
            rows = _shorten(drawn, tokens - seen)
            _add(host, sites, rows, sums)
            read = sum(map(len, rows))
            seen, chunk = seen + read, chunk + 1
            bar.update(read)
            if partial is not None and time.monotonic() - saved > SAVE_EVERY:
                _save_partial(partial, sites, sums, seen, chunk)
                saved = time.monotonic()
    widest = max(len(total) for total in sums.values())
    if seen < min(tokens, widest):
        raise ArtifactError(
            f"The corpus '{corpus.source}' has {seen} tokens, and at least {widest} are needed. "
            f"Give a longer text."
        )
    return {site: (total / seen).float().cpu() for site, total in sums.items()}


def _add(host: ModelHost, sites: Sequence[Site], rows: Rows, sums: dict[Site, Tensor]) -> None:
    def take(site: Site, keys: Tensor) -> None:
        keys = keys.to(sums[site].dtype)
        sums[site].addmm_(keys.mT, keys)

    points = {site: (site.module, "input") for site in sites}
    watch_tokens(host, [Row(ids) for ids in rows], points, take)


def _chunks(host: ModelHost, corpus: Corpus, seed: int, first: int) -> Iterator[Rows]:
    """Groups of token rows; the same ones at every call, from number `first` on."""
    if corpus.is_generated:
        for number in itertools.count(first):
            generator = Generator().manual_seed(seed * 1_000_003 + number)
            starts = [OPENINGS[n % len(OPENINGS)] for n in range(CHUNK_ROWS)]
            yield sample(host, starts, GENERATED_LENGTH, generator, top_k=50)
    pieces = _pieces(host, corpus)
    groups = iter(lambda: list(itertools.islice(pieces, CHUNK_ROWS // 4)), [])
    yield from itertools.islice(groups, first, None)


def _pieces(host: ModelHost, corpus: Corpus) -> Iterator[tuple[int, ...]]:
    limit = min(PIECE_LENGTH, host.max_length or PIECE_LENGTH)
    for document in corpus.documents():
        ids = host.tokenizer(document, truncation=False, verbose=False)["input_ids"]
        for start in range(0, len(ids), limit):
            yield tuple(ids[start : start + limit])


def _shorten(rows: Rows, tokens: int) -> Rows:
    """The first rows with at most `tokens` tokens together, the last one cut."""
    kept: Rows = []
    for row in rows:
        if tokens <= 0:
            break
        kept.append(row[:tokens])
        tokens -= len(row)
    return kept


def _partial(store: ArtifactStore, key: dict[str, Any]) -> Path:
    return store.folder("second-moment-unfinished", key).with_suffix(".safetensors")


def _resume(
    host: ModelHost, sites: Sequence[Site], partial: Path | None
) -> tuple[dict[Site, Tensor], int, int]:
    widths = {site: host.weight(site).shape[1] for site in sites}
    sums = {
        site: torch.zeros(
            width,
            width,
            dtype=torch.float64 if width <= 4096 else torch.float32,
            device=host.weight(site).device,
        )
        for site, width in widths.items()
    }
    if partial is None or not partial.is_file():
        return sums, 0, 0
    stored = load_file(partial)
    for site, total in sums.items():
        total.copy_(stored[site.parameter])
    log.info("Continuing after %d tokens.", int(stored["seen"]))
    return sums, int(stored["seen"]), int(stored["chunk"])


def _save_partial(
    partial: Path, sites: Sequence[Site], sums: dict[Site, Tensor], seen: int, chunk: int
) -> None:
    tensors = {site.parameter: sums[site].cpu() for site in sites}
    counts = {"seen": torch.tensor(seen), "chunk": torch.tensor(chunk)}
    with new_file(partial) as temporary:
        save_file(tensors | counts, temporary)
