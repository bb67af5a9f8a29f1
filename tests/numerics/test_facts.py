"""Facts as rows of tokens."""

from __future__ import annotations

import logging
from dataclasses import replace

from kedit_core import EditRequest
from kedit_core.numerics.facts import FactRows
from kedit_core.targets import ValueHyperParams
from tests.numerics.tiny import job_on, tiny_host


def test_key_at_the_first_token_is_told(tmp_path, caplog):
    subjects = ("Q", "Qu")  # of one token and of two
    requests = tuple(EditRequest(prompt="{} is", subject=s, target_new="b") for s in subjects)
    job = replace(job_on(tiny_host("llama"), tmp_path), requests=requests)

    with caplog.at_level(logging.WARNING):
        facts = FactRows.of(job, ValueHyperParams(contexts=()))

    assert [row.mark for row in facts.clean] == [0, 1]
    (record,) = caplog.records
    assert "The key of 'Q is' is read at the first token" in record.getMessage()
