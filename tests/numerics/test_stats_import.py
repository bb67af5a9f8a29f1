"""Second moments in the files of other implementations: found, checked, and never mixed up."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kedit_core.corpus import Corpus
from kedit_core.editing import ModelHost
from kedit_core.errors import ArtifactError
from kedit_core.numerics import given as given_files
from kedit_core.numerics import stats
from kedit_core.numerics.stats import collect, second_moment, second_moments
from kedit_core.testing.toys import TOYS, load_toy, toy_corpus
from tests.numerics.tiny import job_on, plain_output, tiny_host

NAME = "{}_float32_mom2_100000.npz"


def sum_of_squares(host: ModelHost, layer: int, seed: int = 0) -> Tensor:
    """Σ k kᵀ over what an MLP's output matrix reads at 200 random tokens."""
    generator = torch.Generator().manual_seed(seed)
    module, total = host.mlp_out(layer).module, torch.zeros(64, 64)
    for _ in range(10):
        ids = torch.randint(5, 99, (20,), generator=generator).tolist()
        keys = plain_output(host, module, tuple(ids), side="input")
        total += keys.T @ keys
    return total


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
        write(folder, host.mlp_out(layer).module, sum_of_squares(host, layer))
    return host, folder


def moments(host: ModelHost, store: Path, source: Path, **how) -> dict:
    sites = [host.mlp_out(layer) for layer in range(len(host.blocks))]
    return second_moments(job_on(host, store, corpus=Corpus(str(source)), **how), sites)


def test_moment_is_the_sum_over_the_count_of_the_matrix_that_the_file_names(
    given, tmp_path, monkeypatch
):
    host, folder = given
    monkeypatch.setattr(stats, "collect", None)  # is not needed

    found = moments(host, tmp_path / "store", folder)

    for layer in range(3):
        moment = found[host.mlp_out(layer)]
        assert moment.dtype == torch.float32
        torch.testing.assert_close(moment, sum_of_squares(host, layer) / 200)


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
    file = write(tmp_path, site.module, sum_of_squares(host, 1).double(), name=name)

    job = job_on(host, tmp_path / "store", corpus=Corpus(str(file)))

    torch.testing.assert_close(second_moment(job, site), sum_of_squares(host, 1) / 200)


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
    write(other, site.module, sum_of_squares(host, 0, seed=9))
    replaced = second_moment(job_on(host, store, corpus=Corpus(str(other))), site)
    torch.testing.assert_close(replaced, sum_of_squares(host, 0, seed=9) / 200)

    write(other, site.module, sum_of_squares(host, 0, seed=9), count=400)
    halved = second_moment(job_on(host, store, corpus=Corpus(str(other))), site)
    torch.testing.assert_close(halved, sum_of_squares(host, 0, seed=9) / 400)

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
    write(tmp_path / "s", host.mlp_out(0).module, torch.eye(48))

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
    write(folder, host.mlp_out(0).module, sum_of_squares(host, 0), name="{}_float64_mom2_10.npz")

    assert "holds 2 second moments of" in refusal(host, folder, tmp_path)


@contextlib.contextmanager
def of_another_model(host: ModelHost):
    """Inside the block every matrix of the model has other numbers of the same spread."""
    generator = torch.Generator().manual_seed(5)
    matrices = [p for p in host.model.parameters() if p.ndim > 1]
    saved = [matrix.detach().clone() for matrix in matrices]
    with torch.no_grad():
        for matrix in matrices:
            matrix.normal_(0.0, float(matrix.std()), generator=generator)
    yield
    with torch.no_grad():
        for matrix, before in zip(matrices, saved, strict=True):
            matrix.copy_(before)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_moments_of_another_model_of_the_same_shape_are_refused(family, tmp_path):
    host = tiny_host(family)
    with of_another_model(host):
        total = sum_of_squares(host, 0)
    write(tmp_path / "s", host.mlp_out(0).module, total)

    message = refusal(host, tmp_path / "s", tmp_path)

    assert f"second moment of '{host.mlp_out(0).module}' in '{tmp_path / 's'}'" in message
    assert "is of another model. It fits " in message


def toy_moments(name: str, corpus: Corpus) -> tuple[ModelHost, list[Tensor]]:
    host = ModelHost(*load_toy(name), name)
    sites = [host.mlp_out(layer) for layer in range(len(host.blocks))]
    found = collect(host, sites, corpus, 1000, seed=3)
    return host, [found[site] for site in sites]


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("source", [toy_corpus(), "self", __file__])
def test_moments_of_any_text_are_taken(name, source, tmp_path, caplog):
    host, right = toy_moments(name, Corpus(str(source)))
    for layer, moment in enumerate(right):
        write(tmp_path / "s", host.mlp_out(layer).module, 200 * moment)

    with caplog.at_level(logging.WARNING):
        found = moments(host, tmp_path / "store", tmp_path / "s")

    for layer, moment in enumerate(right):
        torch.testing.assert_close(found[host.mlp_out(layer)], moment)
    assert not caplog.records


@pytest.mark.parametrize("name", TOYS)
def test_one_moment_of_another_matrix_is_refused_and_none_is_kept(name, tmp_path):
    """A model's other blocks are as strange to a block as another model is."""
    host, right = toy_moments(name, Corpus(str(toy_corpus())))
    for layer, moment in enumerate([*right[:3], right[0]]):
        write(tmp_path / "s", host.mlp_out(layer).module, 200 * moment)

    with pytest.raises(ArtifactError, match="is of another model") as error:
        moments(host, tmp_path / "store", tmp_path / "s")

    assert host.mlp_out(3).module in str(error.value)
    assert not list((tmp_path / "store").glob("second-moment/*"))


def test_doubtful_moments_are_taken_with_a_warning(given, tmp_path, monkeypatch, caplog):
    host, folder = given
    monkeypatch.setattr(given_files, "DOUBTED", 1.1)  # more than any share

    found = moments(host, tmp_path / "store", folder)

    assert len(found) == 3
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 3
    assert "may be of another model" in caplog.text


def test_moments_are_compared_with_the_model_before_any_edit(given, tmp_path):
    host, folder = given
    right, edited = sum_of_squares(host, 0) / 200, contextlib.ExitStack()

    @contextlib.contextmanager
    def unedited():
        edited.close()
        yield

    job = job_on(host, tmp_path / "store", corpus=Corpus(str(folder)))
    edited.enter_context(of_another_model(host))
    found = second_moment(replace(job, unedited=unedited), host.mlp_out(0))

    torch.testing.assert_close(found, right)


def asymmetric() -> Tensor:
    total = 2 * torch.eye(64)
    total[3, 5] += total.max()
    return total


def infinite() -> Tensor:
    total = torch.eye(64)
    total[2, 2] = torch.inf
    return total


@pytest.mark.parametrize(
    ("total", "count", "message"),
    [
        (infinite(), 200, "is not finite"),
        (asymmetric(), 200, "is not symmetric"),
        (-torch.eye(64), 200, "zero or not positive semidefinite"),
        (torch.zeros(64, 64), 200, "zero or not positive semidefinite"),
        (torch.eye(64).int(), 200, "of type int32"),
        (torch.eye(64), 0, "no number of tokens"),
        (torch.eye(64), np.nan, "no number of tokens"),
        (torch.eye(64), np.array([200, 200]), "no number of tokens"),
    ],
)
def test_what_is_no_second_moment_is_refused(total, count, message, tmp_path):
    host = tiny_host("gpt2")
    write(tmp_path / "s", host.mlp_out(0).module, total, count)

    assert message in refusal(host, tmp_path / "s", tmp_path)


def test_rounding_of_float32_sums_is_no_asymmetry(tmp_path):
    host = tiny_host("gpt2")
    total = sum_of_squares(host, 0)
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
    file = write(tmp_path / "s", host.mlp_out(0).module, sum_of_squares(host, 0))
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
