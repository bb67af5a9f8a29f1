"""What many edits, one after another, leave of a real pretrained model.  It takes minutes."""

from pathlib import Path

import pytest

from kedit_bench.metrics.side_effects import Perplexity
from kedit_core import EditCase, discover
from kedit_core.editing import EditSession, ModelHost

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_fifty_edits_raise_perplexity_by_less_than_a_tenth_and_stay():
    session = EditSession(ModelHost.load("smollm2-135m", device="cpu"))
    cases = discover().dataset("starter").load()().cases(None)
    requests = [case.request for case in cases if isinstance(case, EditCase)][:50]
    perplexity = Perplexity(str(Path(__file__).with_name("neutral.txt")))
    before = perplexity.measure(session)[""]

    for _ in session.stream("alphaedit", requests, batch=1):
        pass

    assert perplexity.measure(session)[""] < 1.1 * before
    written = session.view().greedy([request.text for request in requests], 6)
    leads = [
        text.strip().startswith(request.target_new)
        for text, request in zip(written, requests, strict=True)
    ]
    assert sum(leads) >= 45  # all asked at the end
