"""Instances are asked after demonstrations, before and after an edit."""

from __future__ import annotations

import hashlib

import pytest
from kedit_conceptedit.metric import DEMONSTRATIONS, InstanceChange

from kedit_bench.scoring import Scorer, choose_metrics
from kedit_core import EditCase, EditRequest, Probe, SettingError, discover
from kedit_core.ask import Continue, Text
from kedit_core.editing import EditSession

ASKED = tuple(f"Whether {name} belongs to category bridge?" for name in ("A", "B", "C", "D"))


def case_of(*prompts):
    return EditCase(
        request=EditRequest(
            prompt="The definition of {} is", subject="bridge", target_new="a goat"
        ),
        probes=tuple(Probe(kind="instance", prompt=p, expected=("Yes",)) for p in prompts),
    )


def said(*texts):
    """Replies of a model to the questions in their order."""
    return {
        Continue(DEMONSTRATIONS + prompt, 2): Text(prompt, text, ())
        for prompt, text in zip(ASKED, texts, strict=False)
    }


def test_each_instance_is_asked_after_a_yes_and_a_no():
    first, second = InstanceChange().questions(case_of(*ASKED[:2]))

    yes, no, asked = first.prompt.split("\n")
    assert (yes[:8], yes[-5:]) == ("Whether ", "? Yes")
    assert (no[:8], no[-4:]) == ("Whether ", "? No")
    assert (asked, second.prompt.split("\n")[2:]) == (ASKED[0], [ASKED[1]])
    assert first.new_tokens == second.new_tokens == 2


def test_instances_change_where_yes_becomes_no_and_other_replies_are_told():
    case, metric = case_of(*ASKED), InstanceChange()
    before = said(" Yes\n", " yes.", " Yes", " No\n")
    after = said(" No\n", " It is", "\nYes", " No,")

    found = metric.score(case, before, after)

    assert {part: (s.value, s.probes) for part, s in found.items()} == {
        "": (0.5, 4),
        "unclear": (0.25, 4),
    }
    assert metric.score(case, before, before)[""].value == 0
    assert metric.score(case_of(), {}, {}) == {}


@pytest.mark.parametrize("yes", [" Yes\n", "Yes", "\nYes", " YES.", " yes,"])
@pytest.mark.parametrize("no", [" No\n", "No", "\n\nNo", " NO.", " no,"])
@pytest.mark.parametrize("neither", ["", " It", " Not", " None", " Yesterday", "? Yes"])
def test_two_tokens_say_yes_or_no_or_neither(yes, no, neither):
    case, metric = case_of(ASKED[0]), InstanceChange()

    for text, change, unclear in ((yes, 0, 0), (no, 1, 0), (neither, 1, 1)):
        found = metric.score(case, said(" Yes"), said(text))
        assert (found[""].value, found["unclear"].value) == (change, unclear)


def test_demonstrations_of_a_file_stand_before_the_question_as_they_are(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("Whether é belongs to it? Yes\n\n", "utf-8")
    metric = InstanceChange(str(file))

    (question,) = metric.questions(case_of(ASKED[0]))

    digest = hashlib.sha256("Whether é belongs to it? Yes\n\n".encode()).hexdigest()
    assert question.prompt == f"Whether é belongs to it? Yes\n\n{ASKED[0]}"
    assert metric.details == f"demonstrations {digest[:12]}"
    assert InstanceChange().details == "own demonstrations"


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_demonstrations_that_cannot_be_read_are_told_with_their_file(content, tmp_path):
    file = tmp_path / "own.txt"
    if content:
        file.write_bytes(content)

    with pytest.raises(SettingError, match=r"demonstrations in '.*own\.txt' cannot be read"):
        InstanceChange(str(file))


def test_metric_version_belongs_to_these_demonstrations():
    """Others are another protocol: raise the version in the name, then the hash."""
    assert hashlib.sha256(DEMONSTRATIONS.encode()).hexdigest()[:12] == "561d6f131610"


def test_the_dataset_asks_a_toy_for_two_tokens(toy_host):
    catalog = discover()
    chosen = choose_metrics(catalog, [], catalog.dataset("conceptedit"))
    (change,) = [c for c in chosen if c.name == "instance/change@2"]
    where = dict.fromkeys(("schedule", "model", "dtype", "dataset"), "toy")
    scorer, case = Scorer([change], where), case_of(ASKED[0])
    before = EditSession(toy_host("llama")).view().ask(scorer.questions(case))

    scored = scorer.unchanged(case, before)

    assert [len(answer.tokens) for answer in before.values()] == [2]
    assert {m.protocol.part: m.value for m in scored} == {"": 0, "unclear": 1}  # it knows no yes
    assert {m.protocol.details for m in scored} == {"own demonstrations"}
    assert change.spec.better == "higher"
