"""A job tells of requests that can hardly be written together."""

from __future__ import annotations

import logging

from kedit_core.editing import EditSession
from tests.core.edits import fact

SETTINGS = {"layers": [1], "steps": 1}


def test_requests_of_a_batch_that_disagree_are_told_once_for_any_method(toy_host, caplog):
    session = EditSession(toy_host("llama"))
    torn = fact(1).model_copy(update={"target_new": "Oslo"})

    def told(*requests):
        caplog.clear()
        with caplog.at_level(logging.WARNING), session.trial("ft-m", requests, hparams=SETTINGS):
            return [record.getMessage() for record in caplog.records]

    assert told(fact(0), fact(1)) == []
    assert told(fact(0), fact(1), fact(0), torn) == [
        f"Requests that stand several times in one batch: 1, first {fact(0).text!r}.",
        f"Prompts with several targets in one batch: 1, first {fact(1).text!r}.",
    ]
