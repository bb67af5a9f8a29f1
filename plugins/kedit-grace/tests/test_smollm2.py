"""GRACE on the real model, with the preset that ships."""

from __future__ import annotations

import json

import pytest
import torch

from kedit_core import EditRequest
from kedit_core.editing import EditSession, ModelHost

pytestmark = pytest.mark.real

TOWER = EditRequest(prompt="The Eiffel Tower is located in the city of", target_new="Rome")
OTHERS = (
    "The Louvre is located in the city of",
    "The capital of Japan is",
    "Water boils at a temperature of",
)


@pytest.fixture(scope="module")
def host():
    return ModelHost.load("smollm2-135m", device="cpu")


@pytest.fixture
def session(host):
    session = EditSession(host)
    yield session
    session.rollback()


@pytest.fixture(scope="module")
def records(benchmark_data):
    """The first ZsRE records whose questions differ."""
    file = benchmark_data / "zsre" / "zsre_mend_eval.json"
    if not file.is_file():
        pytest.skip(f"{file} is missing; KEDIT_DATA says where the benchmarks' files are")
    return json.loads(file.read_text("utf-8"))[:10]


def test_an_edit_is_answered_and_other_prompts_keep_their_bits(session):
    before = session.view().logits(OTHERS)
    assert session.view().greedy(TOWER.text, 8).strip().startswith("Paris")
    session.edit("grace", TOWER)
    assert session.view().greedy(TOWER.text, 8).strip().startswith("Rome")
    assert torch.equal(session.view().logits(OTHERS), before)


def test_zsre_records_one_after_another_are_all_there_at_the_end(session, records):
    """And one of them can go without the others."""
    asked = [EditRequest(prompt=r["src"], target_new=r["alt"]) for r in records]
    unrelated = [r["loc"] for r in records]
    before = session.view().greedy(unrelated, 8)
    for request in asked:
        session.edit("grace", request)

    def right():
        scores = session.view().score([r.text for r in asked], [r.target_new for r in asked])
        return [score.predicted == score.tokens for score in scores]

    written = session.view().greedy([r.text for r in asked], 24)
    assert all(right())
    assert all(w.strip().startswith(r.target_new) for w, r in zip(written, asked, strict=True))
    same = session.view().greedy(unrelated, 8)
    assert sum(a == b for a, b in zip(before, same, strict=True)) >= 9

    session.remove(3)
    assert right() == [n != 3 for n in range(len(asked))]
