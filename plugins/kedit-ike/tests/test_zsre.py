"""On real records and the real model."""

from itertools import islice

import pytest

from kedit_core import EditCase, discover
from kedit_core.editing import EditSession, ModelHost

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def cases(benchmark_data):
    file = benchmark_data / "zsre" / "zsre_mend_eval.json"
    if not file.is_file():
        pytest.skip(f"{file} is missing")
    found = discover().dataset("zsre").load()().cases(file)
    return list(islice((case for case in found if isinstance(case, EditCase)), 10))


@pytest.fixture(scope="module")
def session():
    return EditSession(ModelHost.load("smollm2-135m", device="cpu"))


def accuracy(score):
    pairs = list(zip(score.predicted, score.tokens, strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def test_real_records_are_answered_from_the_context(session, cases):
    before, after = [], []
    for case in cases:
        asked = [case.request.text], [case.request.target_new]
        before.append(accuracy(session.view().score(*asked)[0]))
        with session.trial("ike", case.request):
            after.append(accuracy(session.view().score(*asked)[0]))

    assert sum(after) / 10 >= 0.85
    assert sum(after) > sum(before) + 3


def test_each_of_ten_real_facts_is_found_by_its_rephrasing(session, cases):
    rephrasings = [next(p.prompt for p in c.probes if p.kind == "rephrase") for c in cases]
    unrelated = [next(p.prompt for p in c.probes if p.kind == "locality") for c in cases]
    with session.trial("ice", [case.request for case in cases]):
        (memory,) = session._changes.calls()
        near, far = memory.chosen(rephrasings), memory.chosen(unrelated)

    # Some subjects are edited twice.
    subjects = [case.request.subject for case in cases]
    found = [None if number is None else subjects[number] for number in near]
    assert sum(a == b for a, b in zip(found, subjects, strict=True)) >= 9
    assert sum(number is None for number in far) >= 9
