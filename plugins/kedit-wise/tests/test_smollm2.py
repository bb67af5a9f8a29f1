"""Ten ZsRE records in a row on a real pretrained model."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import pytest
import torch

from kedit_core import EditCase, discover
from kedit_core.editing import EditSession, ModelHost, ModelView

pytestmark = pytest.mark.real

DATA = Path(os.environ.get("KEDIT_DATA", "../shared/data")) / "zsre" / "zsre_mend_eval.json"


@pytest.fixture(scope="module")
def cases() -> list[EditCase]:
    if not DATA.is_file():
        pytest.skip(f"{DATA} is not there; KEDIT_DATA names the folder with the data sets")
    dataset = discover().dataset("zsre").load()()
    found = (case for case in dataset.cases(DATA) if isinstance(case, EditCase))
    return list(islice(found, 10))


def share(view: ModelView, prompts: list[str], targets: list[str]) -> float:
    """Of the targets' tokens, those that are most probable."""
    scores = view.score(prompts, targets)
    hits = [
        sum(a == b for a, b in zip(s.tokens, s.predicted, strict=True)) / len(s.tokens)
        for s in scores
    ]
    return sum(hits) / len(hits)


def test_ten_edits_in_a_row_are_there_and_unrelated_answers_stay(cases):
    session = EditSession(ModelHost.load("smollm2-135m", device="cpu"))
    view = session.view()
    prompts = [case.request.text for case in cases]
    targets = [case.request.target_new for case in cases]
    unrelated = [p.prompt for case in cases for p in case.probes if p.kind == "locality"]
    former = share(view, prompts, targets)
    before, logits = view.greedy(unrelated, 5), view.logits(unrelated)

    session.edit("wise", [case.request for case in cases])

    assert share(view, prompts, targets) > max(0.8, former + 0.3)
    kept = [a == b for a, b in zip(before, view.greedy(unrelated, 5), strict=True)]
    assert sum(kept) >= 9
    session.rollback()
    assert torch.equal(view.logits(unrelated), logits)
