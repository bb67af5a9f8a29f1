"""Multi-hop accuracy: what counts of what is written after demonstrations."""

from pathlib import Path

import pytest
from kedit_mquake.dataset import MQuake
from kedit_mquake.metric import chain, few_shot

from kedit_core import SettingError, discover
from kedit_core.ask import Text
from kedit_core.named import create

FILE = Path(__file__).parent / "files" / "mquake.json"
QUESTION = "In which country does the builder of Kestrel 463 have its headquarters?"


@pytest.fixture(scope="module")
def cases():
    """One whose two questions are answered by Ghana, Republic of Ghana or GH, and one without."""
    first, *_, last = MQuake().cases(FILE)
    return first, last


def score(metric, case, *replies):
    asked = metric.questions(case)
    after = {q: Text(q.prompt, reply, ()) for q, reply in zip(asked, replies, strict=True)}
    return {part: (s.value, s.probes) for part, s in metric.score(case, {}, after).items()}


@pytest.mark.parametrize(
    ("make", "begins", "ends", "tokens"),
    [
        (few_shot, "Q:", f"\n\nQ: {QUESTION}\nA:", 50),
        (chain, "Question:", f"\n\nQuestion: {QUESTION}\nThoughts:", 200),
    ],
)
def test_a_question_follows_eight_demonstrations(make, begins, ends, tokens, cases):
    question, _ = make().questions(cases[0])

    assert question.prompt.endswith(ends)
    blocks = question.prompt.split("\n\n")
    assert len(blocks) == 8 + 1
    assert all(block.startswith(begins) for block in blocks)
    assert question.new_tokens == tokens


def test_both_ways_of_asking_show_the_same_questions_and_answers(cases):
    shown = []
    for make, asks, answers in ((few_shot, "Q: ", "A: "), (chain, "Question: ", "Answer: ")):
        lines = make().questions(cases[0])[0].prompt.splitlines()
        shown.append([line.partition(" ")[2] for line in lines if line.startswith((asks, answers))])

    assert shown[0] == shown[1]
    assert len(shown[0]) == 2 * 8 + 1


@pytest.mark.parametrize(
    ("replies", "value"),
    [
        ((" Sweden", " the Republic of Ghana.\n\nQ: Who?"), 1),
        ((" Sweden\n\nQ: And Accra?\nA: Ghana", " Norway"), 0),
        (("", " Ghanaian"), 0),
    ],
)
def test_the_first_line_of_any_reply_may_have_the_answer(replies, value, cases):
    assert score(few_shot(), cases[0], *replies) == {"": (value, 1)}


@pytest.mark.parametrize(
    ("replies", "value", "unanswered"),
    [
        ((" It is in Accra.\nAnswer: Ghana\n\nQuestion: Who?", " I do not know."), 1, 0.5),
        ((" Ghana.\nAnswer: Sweden", " So.\nAnswer: Norway"), 0, 0),
        ((" Ghana.\n\nQuestion: Where is Accra?\nAnswer: Ghana", " Ghana"), 0, 1),
        ((" So.\nAnswer:\n\nQuestion: Where?", " So.\nAnswer: Norway\nGhana"), 0, 0.5),
    ],
)
def test_of_thoughts_only_the_line_behind_answer_counts(replies, value, unanswered, cases):
    found = score(chain(), cases[0], *replies)

    assert found == {"": (value, 1), "unanswered": (unanswered, 2)}


@pytest.mark.parametrize("make", [few_shot, chain])
def test_a_case_without_multi_hop_questions_has_no_score(make, cases):
    assert make().questions(cases[1]) == []
    assert make().score(cases[1], {}, {}) == {}


def test_demonstrations_of_ones_own_have_questions_and_answers_in_one_line(tmp_path, cases):
    file = tmp_path / "own.txt"
    file.write_text("Q: Where is Accra? A: Ghana\nQ: Who sings? A: Mira\n")
    metric = create(discover().metric("multi-hop/few-shot@1"), {"demonstrations": str(file)})

    question, _ = metric.questions(cases[0])

    assert question.prompt == (
        f"Q: Where is Accra? A: Ghana\nQ: Who sings? A: Mira\nQ: {QUESTION} A:"
    )


def test_scores_tell_which_demonstrations_were_shown(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("Q: Where is Accra?\nA: Ghana")

    assert few_shot().details == few_shot().details != chain().details
    assert few_shot(str(file)).details not in (few_shot().details, chain().details)


@pytest.mark.parametrize(("make", "mark"), [(few_shot, "Q:"), (chain, "Thoughts:")])
def test_a_file_without_such_demonstrations_is_refused(make, mark, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("Question: Where is Accra?\nAnswer: Ghana")

    with pytest.raises(SettingError, match=rf"own\.txt' has no '{mark}'"):
        make(str(file))
    with pytest.raises(SettingError, match=r"none\.txt' cannot be read"):
        make(str(tmp_path / "none.txt"))
