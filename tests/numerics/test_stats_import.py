"""Second moments in the files of other implementations: found, checked, and never mixed up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kedit_core.corpus import Corpus
from kedit_core.editing import ModelHost
from kedit_core.errors import ArtifactError
from kedit_core.numerics import stats
from kedit_core.numerics.stats import second_moment, second_moments
from tests.numerics.tiny import job_on, tiny_host

NAME = "{}_float32_mom2_100000.npz"


def sum_of_squares(width: int, seed: int, count: int = 200) -> Tensor:
    """Σ k kᵀ over random keys."""
    keys = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return keys.T @ keys


def write(folder: Path, module: str, total, count=200, name: str = NAME) -> Path:
    """A file as `runningstats.CombinedStat` of a `SecondMoment` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name.format(module)
    arrays = {
        "mom2.constructor": "util.runningstats.SecondMoment()",
        "mom2.count": count,
        "mom2.mom2": total.numpy() if isinstance(total, Tensor) else total,
        "sample_size": 100000,
    }
    np.savez(file, **arrays)
    return file


@pytest.fixture
def given(tmp_path):
    """A folder with one file for each block of a tiny model, in the published layout."""
    host = tiny_host("gpt2")
    folder = tmp_path / "stats" / "gpt2" / "wikipedia_stats"
    for layer in range(len(host.blocks)):
        write(folder, host.mlp_out(layer).module, sum_of_squares(64, layer))
    return host, folder


def moments(host: ModelHost, store: Path, source: Path, **how) -> dict:
    sites = [host.mlp_out(layer) for layer in range(len(host.blocks))]
    return second_moments(job_on(host, store, corpus=Corpus(str(source)), **how), sites)


def test_moment_is_the_sum_over_the_count_of_the_matrix_that_the_file_names(given, tmp_path):
    host, folder = given
    passes: list[int] = []
    host.module(host.blocks[0].path).register_forward_pre_hook(lambda *_: passes.append(1))

    found = moments(host, tmp_path / "store", folder)

    for layer in range(3):
        moment = found[host.mlp_out(layer)]
        assert moment.dtype == torch.float32
        torch.testing.assert_close(moment, sum_of_squares(64, layer) / 200)
    assert not passes  # nothing was collected


@pytest.mark.parametrize(
    "name",
    [
        "{}_float64_mom2_100000.npz",
        "{}_float16_mom2.npz",
        "{}_float32_mean-mom2_500.npz",
        "{}_float32_mom2-norm_mean_500.npz",
        "{}_float32_mom2_t2048_100000.npz",
        "{}_float32_mom2_t{{batch_tokens}}_100000.npz",
    ],
)
def test_names_of_all_settings_of_the_other_code_are_read(name, tmp_path):
    host = tiny_host("llama")
    site = host.mlp_out(1)
    file = write(tmp_path, site.module, sum_of_squares(64, 3).double(), name=name)

    job = job_on(host, tmp_path / "store", corpus=Corpus(str(file)))

    torch.testing.assert_close(second_moment(job, site), sum_of_squares(64, 3) / 200)


def test_checked_moments_are_kept_with_the_number_of_their_tokens(given, tmp_path, monkeypatch):
    host, folder = given
    first = moments(host, tmp_path / "store", folder)
    keys = [p.read_text("utf-8") for p in (tmp_path / "store").glob("second-moment/*/key.json")]
    assert len(keys) == 3
    assert all(json.loads(key)["tokens"] == 200 for key in keys)

    monkeypatch.setattr(stats, "given_moment", None)  # is not asked again
    again = moments(host, tmp_path / "store", folder)

    assert all(torch.equal(again[site], first[site]) for site in first)


def test_given_and_collected_moments_are_never_mixed_up(given, tmp_path):
    """Model, matrix, file and count decide, whatever lies in one store."""
    host, folder = given
    store, site = tmp_path / "store", host.mlp_out(0)
    text = tmp_path / "text.txt"
    text.write_text("many words and more of them " * 40, "utf-8")
    given_job = job_on(host, store, corpus=Corpus(str(folder)))
    first = second_moment(given_job, site)

    collected = second_moment(job_on(host, store, corpus=Corpus(str(text))), site, 200)
    assert not torch.allclose(collected, first, rtol=1e-2)
    assert torch.equal(second_moment(given_job, site), first)

    other = tmp_path / "other"
    write(other, site.module, sum_of_squares(64, 9))
    replaced = second_moment(job_on(host, store, corpus=Corpus(str(other))), site)
    torch.testing.assert_close(replaced, sum_of_squares(64, 9) / 200)

    write(other, site.module, sum_of_squares(64, 9), count=400)
    halved = second_moment(job_on(host, store, corpus=Corpus(str(other))), site)
    torch.testing.assert_close(halved, sum_of_squares(64, 9) / 400)

    entries = len(list((store / "second-moment").iterdir()))
    changed = tiny_host("gpt2")
    with torch.no_grad():
        changed.model.transformer.h[0].mlp.c_proj.weight[0, 0] += 1
    second_moment(job_on(changed, store, corpus=Corpus(str(folder))), site)
    assert entries == 4
    assert len(list((store / "second-moment").iterdir())) == 5  # of another model: its own entry


def test_asking_for_a_number_of_tokens_does_not_change_what_is_given(given, tmp_path):
    host, folder = given
    job = job_on(host, tmp_path / "store", corpus=Corpus(str(folder)))

    first = second_moment(job, host.mlp_out(0), 50)

    assert torch.equal(second_moment(job, host.mlp_out(0), 5000), first)
    assert len(list((tmp_path / "store" / "second-moment").iterdir())) == 1


# -- what is refused ------------------------------------------------------------------------------


def refusal(host: ModelHost, source: Path, tmp_path: Path) -> str:
    store = tmp_path / "refused"
    job = job_on(host, store, corpus=Corpus(str(source)))
    with pytest.raises(ArtifactError) as error:
        second_moment(job, host.mlp_out(0))
    assert not list((store / "second-moment").glob("*"))
    return str(error.value)


def test_moments_of_a_matrix_of_another_width_are_refused(tmp_path):
    host = tiny_host("gpt2")
    write(tmp_path / "s", host.mlp_out(0).module, sum_of_squares(48, 0))

    message = refusal(host, tmp_path / "s", tmp_path)

    assert "is not of this model: it holds 48×48" in message
    assert "needs 64×64" in message


def test_matrices_without_a_file_are_named(given, tmp_path):
    _, folder = given
    stranger = tiny_host("llama")

    message = refusal(stranger, folder, tmp_path)

    assert "no second moment of 'model.layers.0.mlp.down_proj'" in message
    assert "transformer.h.0.mlp.c_proj" in message


def test_several_files_of_one_matrix_are_refused(given, tmp_path):
    host, folder = given
    write(folder, host.mlp_out(0).module, sum_of_squares(64, 0), name="{}_float64_mom2_10.npz")

    assert "holds 2 second moments of" in refusal(host, folder, tmp_path)


def asymmetric() -> Tensor:
    total = sum_of_squares(64, 0)
    total[3, 5] += total.max()
    return total


def infinite() -> Tensor:
    total = sum_of_squares(64, 0)
    total[2, 2] = torch.inf
    return total


@pytest.mark.parametrize(
    ("total", "count", "message"),
    [
        (infinite(), 200, "is not finite"),
        (asymmetric(), 200, "is not symmetric"),
        (sum_of_squares(64, 0).int(), 200, "of type int32"),
        (sum_of_squares(64, 0), 0, "no number of tokens"),
        (sum_of_squares(64, 0), np.nan, "no number of tokens"),
        (sum_of_squares(64, 0), np.array([200, 200]), "no number of tokens"),
    ],
)
def test_what_is_no_second_moment_is_refused(total, count, message, tmp_path):
    host = tiny_host("gpt2")
    write(tmp_path / "s", host.mlp_out(0).module, total, count)

    assert message in refusal(host, tmp_path / "s", tmp_path)


def test_rounding_of_float32_sums_is_no_asymmetry(tmp_path):
    host = tiny_host("gpt2")
    total = sum_of_squares(64, 0)
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    write(tmp_path / "s", host.mlp_out(0).module, total + 1e-5 * total.max() * noise)

    second_moment(
        job_on(host, tmp_path / "store", corpus=Corpus(str(tmp_path / "s"))), host.mlp_out(0)
    )


def test_pickled_arrays_are_not_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    host = tiny_host("gpt2")
    write(tmp_path / "s", host.mlp_out(0).module, np.array([[Trap()]], dtype=object))

    assert "cannot be read as a second moment" in refusal(host, tmp_path / "s", tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("damage", ["cut", "text", "another array"])
def test_damaged_files_are_refused(damage, tmp_path):
    host = tiny_host("gpt2")
    file = write(tmp_path / "s", host.mlp_out(0).module, sum_of_squares(64, 0))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:9000])
    elif damage == "text":
        file.write_text("no archive", "utf-8")
    else:
        np.savez(file, other=np.eye(64))

    assert "cannot be read as" in refusal(host, tmp_path / "s", tmp_path)


def test_a_method_that_wants_text_is_told_that_there_is_none(given):
    _, folder = given

    with pytest.raises(ArtifactError, match="holds second moments and no text"):
        next(Corpus(str(folder)).documents())


def test_folders_and_files_without_moments_are_text_as_before(tmp_path):
    (tmp_path / "text.txt").write_text("a\n\nb", "utf-8")

    assert Corpus(str(tmp_path / "text.txt")).moment_files == []
    assert Corpus(str(tmp_path)).moment_files == []
    assert Corpus().moment_files == []
    assert [t.strip() for t in Corpus(str(tmp_path / "text.txt")).documents()] == ["a", "b"]
