"""Messages that name the nearest word, and the exit code of each kind of error."""

import json

import pytest

from kedit_core import errors
from kedit_core.errors import (
    EditError,
    KEditError,
    did_you_mean,
    last_call,
    nearest,
    reason_of,
)


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


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("one\ntwo"), "one"),
        (OSError("\n one \n"), "one"),
        (OSError(), "OSError()"),
        (ValueError(" "), "ValueError(' ')"),
    ],
)
def test_a_reason_is_the_first_line_or_the_error_itself(error, reason):
    assert reason_of(error) == reason


def test_the_last_call_is_that_of_the_first_packages_that_have_one():
    with pytest.raises(ValueError, match="Expecting") as caught:
        json.loads("{")

    error = caught.value
    package, where = last_call(error, {"nowhere"}, {"tests"}, {"json"})
    assert (package, where.partition(":")[0]) == ("tests", "test_errors.py")
    assert last_call(error, {"nowhere"})[0] == last_call(error)[0] == "json"


def test_only_a_failed_edit_exits_with_one():
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, KEditError)]

    assert {kind for kind in kinds if kind.exit_code == 1} == {EditError}
    assert {kind.exit_code for kind in kinds if kind is not EditError} == {2}
