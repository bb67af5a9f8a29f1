"""Messages that name the nearest word, and the exit code of each kind of error."""

import pytest

from kedit_core import errors
from kedit_core.errors import EditError, KEditError, did_you_mean, nearest


@pytest.mark.parametrize(
    ("word", "expected"),
    [("subjct", "subject"), ("ROME", "rome"), ("r_rome", "r-rome"), ("xyzzy", None), ("", None)],
)
def test_nearest_is_the_closest_word_in_any_case(word, expected):
    assert nearest(word, ["subject", "rome", "r-rome", "memit"]) == expected


def test_nearest_keeps_the_known_spelling():
    assert nearest("efficacy", ["Efficacy"]) == "Efficacy"


def test_a_word_like_nothing_is_answered_with_what_there_is():
    assert did_you_mean("xyzzy", ["rome", "memit"]) == "Known: memit, rome."


def test_nothing_known_is_said():
    assert did_you_mean("rome", []) == "None are known."


def test_a_generator_of_words_is_enough():
    assert did_you_mean("rom", (word for word in ("rome", "memit"))) == "Did you mean 'rome'?"


def test_only_a_failed_edit_exits_with_one():
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, KEditError)]

    assert {kind for kind in kinds if kind.exit_code == 1} == {EditError}
    assert {kind.exit_code for kind in kinds if kind is not EditError} == {2}
