"""On real questions and the real model."""

from itertools import islice

import pytest
import torch

from kedit_core import EditCase, discover
from kedit_core.editing import EditSession, ModelHost

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def asked(benchmark_data):
    file = benchmark_data / "zsre" / "zsre_mend_eval.json"
    if not file.is_file():
        pytest.skip(f"{file} is missing")
    found = discover().dataset("zsre").load()().cases(file)
    cases = list(islice((case for case in found if isinstance(case, EditCase)), 10))
    return [c.request.text for c in cases], [c.request.ground_truth[0] for c in cases]


@pytest.fixture(scope="module")
def session():
    return EditSession(ModelHost.load("smollm2-135m", device="cpu"))


@pytest.mark.parametrize("method", ["dola", "deco"])
def test_real_questions_are_answered_by_plausible_tokens(session, asked, method):
    prompts, truths = asked
    plain = session.view().logits(prompts).softmax(dim=-1)
    with session.trial(method):
        changed = session.view().logits(prompts)
        texts = session.view().greedy(prompts, max_new_tokens=5)
        alone = [session.view().greedy(prompt, max_new_tokens=5) for prompt in prompts[:3]]
        scores = session.view().score(prompts, truths)

    likely = plain.gather(1, changed.argmax(dim=-1, keepdim=True))[:, 0]
    assert (likely >= 0.1 * plain.amax(dim=-1)).all() or method == "deco"
    assert (likely > 0).all()
    assert not torch.equal(changed.softmax(dim=-1), plain)
    assert texts[:3] == alone
    assert all(torch.tensor(score.logprobs).isfinite().all() for score in scores)
