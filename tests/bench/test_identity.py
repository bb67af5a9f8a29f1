"""What tells the data of one run from those of another, and its methods from one another."""

from __future__ import annotations

import hashlib
import os

import pytest

from kedit_bench.results import scorer_of
from kedit_bench.run import Run, digest_of
from kedit_core import DataError

IDENTITY = {
    "model": "m",
    "dtype": "float32",
    "dataset": "starter",
    "data": None,
    "regime": "single",
    "probes": {},
    "probes_per_case": 1,
}
A, B = "a" * 64, "b" * 64


def test_a_file_is_told_by_its_content(tmp_path):
    file = tmp_path / "facts.json"
    file.write_bytes(b"facts " * 1_000_000)  # read in several blocks

    assert digest_of(file) == hashlib.sha256(b"facts " * 1_000_000).hexdigest()


def test_a_folder_is_told_by_the_content_of_its_files(tmp_path):
    inside = tmp_path / "data" / "deep" / "facts.json"
    inside.parent.mkdir(parents=True)
    inside.write_text("one")
    first = digest_of(tmp_path / "data")
    os.utime(inside, (1, 1))
    assert digest_of(tmp_path / "data") == first

    inside.write_text("two")  # as long as before
    second = digest_of(tmp_path / "data")
    inside.rename(inside.with_name("others.json"))

    assert len({first, second, digest_of(tmp_path / "data")}) == 3


def test_a_hub_name_is_told_by_the_revision_of_its_content(tmp_path):
    pytest.importorskip("datasets", reason="the package 'datasets' reads hub: names")
    file = tmp_path / "animals" / "train.jsonl"
    file.parent.mkdir()
    file.write_text('{"name": "tern"}\n')
    name = f"hub:{file.parent}"
    first = digest_of(name)
    assert digest_of(name) == first
    assert digest_of(f"{name}:train") != first

    file.write_text('{"name": "lark"}\n')

    assert digest_of(name) != first


def test_what_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"nothing\.json cannot be read"):
        digest_of(tmp_path / "nothing.json")

    datasets = pytest.importorskip("datasets", reason="the package 'datasets' reads hub: names")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"^'hub:nobody/has-this:dev' cannot be loaded: .*$"):
        digest_of("hub:nobody/has-this:dev")

    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"'hub:a/b' is read with .*: pip install datasets\."):
        digest_of("hub:a/b")


LONG = "simie:base_settings={" + ", ".join(f"k{n}: é{n}" for n in range(60)) + "}"


@pytest.mark.parametrize("label", ["rome", "rome:layer=3,lr=0.1", LONG])
def test_a_method_finds_its_folder_again(label, tmp_path):
    about = {"label": label, "hparams": {"layer": 3}}
    folder = Run(tmp_path).cell_folder(label, about)

    assert Run(tmp_path).cell_folder(label, about) == folder
    assert Run(tmp_path).cells() == [folder]
    assert Run(tmp_path).about(folder) == about
    with pytest.raises(DataError, match="other settings"):
        Run(tmp_path).cell_folder(label, about | {"hparams": {"layer": 4}})


@pytest.mark.parametrize(("one", "other"), [("m:a=1,b=2", "m:a=1:b=2"), (LONG, LONG + " ")])
def test_methods_with_similar_labels_have_folders_of_their_own(one, other, tmp_path):
    run = Run(tmp_path)
    folders = [run.cell_folder(label, {"label": label}) for label in (one, other)]

    assert folders[0] != folders[1]
    assert [run.cell_folder(label, {"label": label}) for label in (one, other)] == folders


@pytest.mark.parametrize("content", ['{"label": "ro', "[1]", "7"])
def test_a_damaged_cell_is_told_with_its_file(content, tmp_path):
    run = Run(tmp_path)
    cell = run.cell_folder("rome", {"label": "rome"})
    (cell / "cell.json").write_text(content)

    for use in (run.about, lambda cell: run.cell_folder("rome", {"label": "rome"})):
        with pytest.raises(DataError, match=r"cell\.json cannot be read: .* Remove its folder"):
            use(cell)


def named(**changed) -> str:
    """How scores name the data of a run."""
    return scorer_of({**IDENTITY, **changed}, []).where["dataset"]


def test_scores_name_the_data_and_the_probes_that_were_added():
    assert named() == "starter"
    assert named(data=A) == f"starter {A[:12]}"
    assert (
        named(probes={"commonsense=piqa.jsonl": B}) == f"starter + commonsense {B[:12]} (1 a case)"
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"data": B},
        {"probes": {}},
        {"probes": {"commonsense=x": B}},
        {"probes": {"commonsense=x": A, "safeedit-detoxify=y": B}},
        {"probes_per_case": 2},
    ],
)
def test_scores_of_other_data_or_probes_have_another_name(changed):
    known = {"data": A, "probes": {"commonsense=x": A}}

    assert named(**{**known, **changed}) != named(**known)
    assert named(**{**known, "probes": {"commonsense=moved": A}}) == named(**known)
