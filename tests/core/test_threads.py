"""Several threads at one model: whoever asks and whoever edits wait for each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from kedit_core.editing import EditSession
from tests.core.edits import bits, same, shift_patch, weight_patch

PROMPTS = ["Mira Voss lives in", "Tamsin speaks", "The capital of Brannia is"]


def at_once(*work: Callable[[], object], times: int = 8) -> list[list[object]]:
    """What each returns, called again and again in a thread of its own."""
    torch.set_num_threads(1)
    with ThreadPoolExecutor(len(work)) as pool:
        running = [pool.submit(lambda w=w: [w() for _ in range(times)]) for w in work]
        return [future.result() for future in running]


def scores(session: EditSession, prompts: Sequence[str]) -> list[tuple[float, ...]]:
    found = session.view().score(prompts, ["Bern"] * len(prompts))
    return [tuple(round(x, 3) for x in score.logprobs) for score in found]


def test_questions_of_several_threads_are_answered_as_one_after_the_other(toy_host):
    session = EditSession(toy_host("llama"))
    session.apply(shift_patch(session.host, "model.layers.1.mlp"))
    work = [
        lambda: scores(session, PROMPTS),
        lambda: scores(session, PROMPTS[:1]),
        lambda: session.view().greedy(PROMPTS[1:], max_new_tokens=4),
    ]
    expected = [w() for w in work]

    for found, wanted in zip(at_once(*work), expected, strict=True):
        assert all(answer == wanted for answer in found)


def test_answers_are_of_the_model_before_or_after_an_edit_never_of_one_in_between(toy_host):
    session = EditSession(toy_host("llama"))
    untouched, before = bits(session.model), scores(session, PROMPTS)
    patches = [weight_patch(session.host, layer) for layer in (0, 1)]

    def swap() -> None:
        with session.host.lock:
            for patch in patches:
                session.apply(patch)
                time.sleep(0.01)
        session.rollback()

    with session.host.lock:
        for patch in patches:
            session.apply(patch)
        after = scores(session, PROMPTS)
        session.rollback()
    found, _ = at_once(lambda: scores(session, PROMPTS), swap, times=20)

    assert before != after
    assert all(answer in (before, after) for answer in found)
    assert same(bits(session.model), untouched)
