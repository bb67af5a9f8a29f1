"""Names with settings are taken apart, and what they point to is made with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from kedit_core import DatasetSpec, SettingError
from kedit_core.named import create, split_named


@dataclass
class Adapter:
    """Takes one setting of every kind."""

    column: str
    also: str | None = None
    times: int = 1
    share: float = 0.5
    strict: bool = False
    rest: Any = None


class Evaluated:
    """The same, with annotations as in modules that do not postpone their evaluation."""

    def __init__(self, column, also=None, times=1, share=0.5, strict=False, rest=None):
        self.made = Adapter(column, also, times, share, strict, rest)


KINDS = {"column": str, "also": str | None, "times": int, "share": float, "strict": bool}
Evaluated.__init__.__annotations__.update(KINDS)


def refuses(count: int) -> None:
    raise ValueError(f"{count} are too many")


def spec_of(target: Any, monkeypatch) -> DatasetSpec:
    """A spec that points to the target."""
    monkeypatch.setattr("kedit_core.spec.load_target", lambda _: target)
    return DatasetSpec(name="jsonl", target="here:TARGET", summary="")


@pytest.fixture(params=["texts", "types"])
def make(request, monkeypatch):
    """Makes an adapter of settings, whichever way its module writes annotations."""
    spec = spec_of(Adapter if request.param == "texts" else Evaluated, monkeypatch)

    def made(**given: str) -> Adapter:
        found = create(spec, given)
        return found if isinstance(found, Adapter) else found.made

    return made


NESTED = {"a": "[[1,2],[3]]", "b": "{c: [4,5], d: 6}", "e": "7"}

# -- taking apart ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "given"),
    [
        ("zsre", "zsre", {}),
        ("zsre:", "zsre", {}),
        (" zsre : ", "zsre", None),
        ("jsonl:prompt=question", "jsonl", {"prompt": "question"}),
        ("jsonl: prompt = question , n = 3,", "jsonl", {"prompt": "question", "n": "3"}),
        ("jsonl:file=C:/x=y.json", "jsonl", {"file": "C:/x=y.json"}),
        ("jsonl:prompt=", "jsonl", {"prompt": ""}),
        ("efficacy/greedy@1:a=b", "efficacy/greedy@1", {"a": "b"}),
        ("ft-m:layers=[20,21],n=5", "ft-m", {"layers": "[20,21]", "n": "5"}),
        ("x:a=[[1,2],[3]],b={c: [4,5], d: 6},e=7", "x", NESTED),
        ("x:a='b,c',d=\"e, f=g\"", "x", {"a": "'b,c'", "d": '"e, f=g"'}),
        ("x:a=who's,b=what's", "x", {"a": "who's", "b": "what's"}),
        ("x:a=[1,b=2", "x", {"a": "[1", "b": "2"}),
    ],
)
def test_a_name_is_parted_from_its_settings(text, name, given):
    if given is None:  # only blanks after the colon are no setting
        with pytest.raises(SettingError, match="is no setting"):
            split_named(text)
    else:
        assert split_named(text) == (name, given)


@pytest.mark.parametrize("pair", ["x", "=3", " =3", "x,y=1"])
def test_a_setting_without_key_or_value_is_refused(pair):
    with pytest.raises(SettingError, match=r"is no setting\. Write zsre:KEY=VALUE\."):
        split_named(f"zsre:{pair}")


def test_a_setting_that_is_given_twice_is_refused():
    with pytest.raises(SettingError, match=r"^'x' is given twice in 'zsre:x=1, x=1'\.$"):
        split_named("zsre:x=1, x=1")


# -- making ------------------------------------------------------------------------------------


def test_values_become_what_the_parameters_are(make):
    assert make(column="c") == Adapter("c")
    assert make(column="c", times="3", share="1e-3", strict="true", rest="[1]") == Adapter(
        "c", times=3, share=0.001, strict=True, rest=[1]
    )


@pytest.mark.parametrize("text", ["7", "true", "null", "2024-01-01", "1e5", "no", ""])
def test_a_text_stays_one_whatever_it_looks_like(make, text):
    found = make(column=text, also=text)

    assert (found.column, found.also) == (text, text)


def test_quotes_keep_a_comma_in_a_text(make):
    assert make(**split_named("x:column='a,b',also=c'")[1]) == Adapter("a,b", also="c'")


@pytest.mark.parametrize("text", ["2024-13-45", "[a", "{", "!odd x", "="])
def test_what_is_no_yaml_is_a_text(make, text):
    assert make(column="c", rest=text).rest == text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("times", "many"),
        ("times", "1.5"),
        ("times", ""),
        ("share", "half"),
        ("strict", "flase"),
        ("strict", "1"),
        ("strict", ""),
    ],
)
def test_a_value_of_another_kind_is_refused(make, key, value):
    with pytest.raises(SettingError, match=rf"^'jsonl' refuses its settings: .*'{value}'"):
        make(column="c", **{key: value})


def test_an_unknown_setting_is_answered_with_the_nearest(make):
    with pytest.raises(SettingError) as caught:
        make(colum="c")
    assert str(caught.value) == "'jsonl' has no setting 'colum'. Did you mean 'column'?"


def test_an_unknown_setting_of_what_has_none_is_said(monkeypatch):
    with pytest.raises(SettingError, match=r"'jsonl' has no setting 'x'\. None are known\."):
        create(spec_of(lambda: None, monkeypatch), {"x": "1"})


def test_a_missing_setting_is_named_with_how_to_give_it(make):
    with pytest.raises(SettingError) as caught:
        make(times="2")
    assert str(caught.value) == "'jsonl' needs the setting 'column': jsonl:column=…"


def test_what_the_target_refuses_is_the_users_mistake(monkeypatch):
    with pytest.raises(SettingError) as caught:
        create(spec_of(refuses, monkeypatch), {"count": "9"})
    assert str(caught.value) == "'jsonl' refuses its settings: 9 are too many."
    assert caught.value.__cause__.__traceback__.tb_next.tb_frame.f_code.co_name == "refuses"


def test_settings_of_a_variant_can_be_given_too(monkeypatch):
    spec = spec_of(partial(Adapter, column="fixed", times=2), monkeypatch)

    assert create(spec, {}) == Adapter("fixed", times=2)
    assert create(spec, {"times": "5"}) == Adapter("fixed", times=5)
