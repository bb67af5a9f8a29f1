"""The search for settings: what is searched, in which order and budget, and how it is scored."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Self

import pytest
from pydantic import Field, model_validator

from kedit_bench.journal import Journal
from kedit_bench.search import BudgetSpent, Score, Search, space_of
from kedit_bench.trials import NLL, PARTS, Trials, score_of
from kedit_bench.unedited import Asker, SpoiltModelError
from kedit_core import EditCase, EditRequest, HyperParams, MethodSpec
from kedit_core.editing import EditSession
from kedit_core.errors import DataError, EditError, MissingSettingError, SettingError
from kedit_core.hparams import searched, searched_blocks
from kedit_core.plugins import discover
from kedit_core.spec import load_target
from tests.bench.fakes import LAST, WHERE, OnlyTheLast, toy_cases

SINGLE = replace(LAST, max_batch=1)


class Hilly(HyperParams):
    layer: int = Field(ge=0, json_schema_extra=searched_blocks(0.5, 0.0, 1.0))
    lr: float = Field(0.5, gt=0, json_schema_extra=searched(0.1, 0.5, 1.0))
    plain: int = 3
    weight: float = Field(1.0, json_schema_extra=searched(1.0, 10.0))

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.plain == 4 and self.layer:
            raise ValueError("4 goes with layer 0")
        return self


class Windowed(HyperParams):
    layers: tuple[int, ...] = Field(
        max_length=2, json_schema_extra=searched_blocks((0.25, 0.75), (0.5, 0.6), (0.5, 0.5))
    )


class Keyed(HyperParams):
    matrices: dict[str, tuple[int, ...]] = Field(
        json_schema_extra=searched_blocks(
            {"up": (0.5, 1.0)}, {"up": (1.0, 1.0), "down": (0.5, 1.0)}
        )
    )


class Silent(HyperParams):
    layer: int
    steps: int = 1


def spec(cls: type, **options) -> MethodSpec:
    return MethodSpec("hilly", "", "", hparams=f"{__name__}:{cls.__name__}", **options)


def space(cls=Hilly, *, blocks=9, search=None, settings=None, **options):
    how = {"preset": None, "file": None, "settings": settings or {}, "config": None}
    return space_of(spec(cls, **options), search or {}, blocks, **how)


# -- what is searched ------------------------------------------------------------------------


def test_settings_say_themselves_what_is_searched_in_the_order_they_are_declared():
    found = space()

    assert list(found.axes.items()) == [
        ("layer", [4, 0, 8]),
        ("lr", [0.1, 0.5, 1.0]),
        ("weight", [1.0, 10.0]),
    ]
    assert found.hparams({}) == Hilly(layer=4)


def test_what_the_method_or_the_user_gives_is_where_it_begins():
    assert space(defaults={"layer": 7}).hparams({}).layer == 7
    given = space(settings={"layer": 3})
    assert given.hparams({}).layer == 3
    assert "layer" not in given.axes


def test_the_users_candidates_replace_the_methods_and_may_be_of_any_field():
    found = space(search={"plain": [1, 2], "lr": [0.2]}, settings={"lr": 0.3})

    assert found.axes == {"layer": [4, 0, 8], "lr": [0.2], "plain": [1, 2], "weight": [1.0, 10.0]}
    assert found.hparams({}).lr == 0.3


def test_blocks_are_shares_of_the_depth_each_once_and_only_those_that_the_method_takes():
    assert space(Windowed, blocks=5).axes == {"layers": [[2]]}
    assert space(Windowed, blocks=11).axes == {"layers": [[5, 6], [5]]}
    assert space(blocks=1).axes["layer"] == [0]


def test_blocks_by_key_are_shares_of_the_depth_too():
    found = space(Keyed, blocks=5)

    assert found.axes == {"matrices": [{"up": [2, 3, 4]}, {"up": [4], "down": [2, 3, 4]}]}
    assert found.hparams({}).matrices == {"up": (2, 3, 4)}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"search": {"lear": [1]}}, "Did you mean"),
        ({"search": {"lr": [0.1, -1]}}, "'lr' = -1"),
        ({"search": {"lr": ["fast"]}}, "'lr' = 'fast'"),
        ({"settings": {"lr": -2}}, "'lr' = -2"),
        ({"cls": Silent, "settings": {"layer": 1}}, "does not say what to search"),
    ],
)
def test_a_wrong_search_is_one_sentence(wrong, says):
    with pytest.raises(SettingError, match=says) as caught:
        space(**wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "searched_fields"),
    [
        ("grace", ["layer", "eps", "lr"]),
        ("wise", ["layer", "lr", "edited_min", "threshold_ratio"]),
        ("lora", ["layers", "alpha", "lr"]),
        ("adalora", ["layers", "alpha", "lr"]),
        ("qlora", ["layers", "alpha", "lr"]),
        ("kn", ["layers", "threshold", "neurons", "write"]),
        ("ultraedit", ["matrices", "lr"]),
        ("ft-m", ["layers", "lr", "max_change"]),
        ("ft-l", ["layers", "lr", "max_change"]),
    ],
)
def test_installed_methods_say_what_to_search_and_take_all_of_it(name, searched_fields):
    method = discover().method(name)
    hinted = load_target(method.hparams).model_fields
    how = {"preset": None, "file": None, "settings": {}, "config": None}
    found = space_of(method, {}, 30, **how)

    assert list(found.axes) == searched_fields
    for field, values in found.axes.items():
        hints = hinted[field].json_schema_extra
        assert len(values) == len(hints.get("search") or hints["search_blocks"])
        for value in values:
            found.hparams({field: value})


def test_a_field_with_neither_value_nor_candidates_is_asked_for():
    with pytest.raises(MissingSettingError, match="layer"):
        space(Silent, search={"steps": [1, 2]})


# -- the search ------------------------------------------------------------------------------


class Hill:
    """Scores that fall with the distance from a summit; each fact costs a second."""

    def __init__(self, held_out=lambda hparams: 0.5) -> None:
        self.calls: list[tuple[HyperParams, range]] = []
        self.spent = 0.0
        self._held_out = held_out

    def __call__(self, hparams, numbers, until=inf) -> Score:
        if self.spent >= until:
            raise BudgetSpent
        self.calls.append((hparams, numbers))
        self.spent += len(numbers)
        is_held_out = numbers[0] > 0
        return Score(self._held_out(hparams) if is_held_out else height(hparams), cost=len(numbers))


def height(hparams) -> float:
    return 1 - abs(hparams.layer - 8) / 10 - abs(hparams.lr - 0.1) / 10 - (hparams.weight != 10) / 9


def test_each_field_is_climbed_in_turn_to_the_summit():
    found = Search(space(), Hill(), 6, 3).run()

    assert found.best.change == {"layer": 8, "lr": 0.1, "weight": 10.0}
    assert found.best.score.value == 1
    assert found.kept is found.best


def test_few_facts_first_and_all_for_the_better_half():
    hill = Hill()
    layers = space(search={"layer": [0, 1, 7, 8, 5]}, settings={"lr": 0.1, "weight": 1.0})
    Search(layers, hill, 16, 1).run()
    asked = [(hparams.layer, len(numbers)) for hparams, numbers in hill.calls if not numbers[0]]

    assert asked[0] == (0, 16)  # the start, which is no rival of itself
    assert asked[1:5] == [(1, 4), (7, 4), (8, 4), (5, 4)]
    assert asked[5:7] == [(8, 8), (7, 8)]
    assert asked[7] == (8, 16)


def test_the_start_is_kept_where_nothing_beats_it():
    top = space(settings={"layer": 8, "lr": 0.1}, search={"weight": [1.0, 5.0], "lr": [1.0]})
    found = Search(top, Hill(), 6, 3).run()

    assert found.best is found.start
    assert found.kept.change == {}


def test_between_equal_scores_the_neighbours_perplexity_decides():
    def flat(hparams, numbers, until=inf):
        return Score(0.5, nll=abs(hparams.weight - 10))

    found = Search(space(), flat, 6, 3).run()

    assert found.best.change == {"weight": 10.0}


@pytest.mark.parametrize("trials", [1, 2, 4])
def test_no_more_settings_are_tried_than_the_budget_allows(trials):
    hill = Hill()
    search = Search(space(), hill, 16, 1, trials=trials)
    found = search.run()

    assert len(search.tried) == trials
    assert len({repr(hparams) for hparams, _ in hill.calls}) == trials
    assert found.best.score.value >= found.start.score.value
    assert found.best.facts == 16


def test_nothing_begins_after_the_minutes_but_the_check_of_the_best():
    whole = Hill()
    Search(space(), whole, 6, 3).run()
    for seconds in (0, 12, 20, 30):
        hill = Hill()
        found = Search(space(), hill, 6, 3, seconds=seconds).run()

        longest = 6  # what had begun before is finished
        assert hill.spent <= max(seconds, 9) + longest
        assert hill.spent < whole.spent
        assert hill.calls[-1][1] == range(6, 9)
        assert found.best.score.value == max(
            height(h) for h, numbers in hill.calls if not numbers[0]
        )


def test_what_does_worse_on_the_facts_held_out_is_not_kept():
    found = Search(space(), Hill(held_out=lambda hparams: 1 - height(hparams)), 6, 3).run()

    assert found.best.score.value > found.start.score.value
    assert found.keeps_start
    assert found.kept is found.start


def test_settings_that_do_not_go_together_score_nothing_and_are_told():
    layers = space(search={"layer": [0, 1], "plain": [4]})
    search = Search(layers, Hill(), 6, 3)
    found = search.run()
    trial = next(trial for trial in search.tried.values() if "plain" in trial.change)

    assert trial.score.value == 0
    assert "4 goes with layer 0" in trial.score.failures[0]
    assert "plain" not in found.best.change


# -- the score -------------------------------------------------------------------------------


@pytest.fixture
def session(toy_host) -> EditSession:
    """Notes the size of each edit in `sizes`."""
    made = EditSession(toy_host("gpt2"))
    edit, made.sizes = made.edit, []
    made.edit = lambda spec, requests, **kw: (
        made.sizes.append(len(requests)) or edit(spec, requests, **kw)
    )
    return made


def trials(session, cases, journal, method=SINGLE) -> Trials:
    return Trials(Asker(session), method, cases, WHERE, Journal(journal))


class Spoils(OnlyTheLast):
    def edit(self, job):
        next(job.host.model.parameters()).data[0, 0] += 1
        raise EditError("The edit fails.")


def test_a_method_that_spoils_the_model_ends_the_search(session, tmp_path):
    measure = trials(
        session, toy_cases(2, session.host), tmp_path / "j", replace(LAST, method=Spoils)
    )

    with pytest.raises(SpoiltModelError, match="no longer those of the unedited model"):
        measure(HyperParams(), [0, 1])
    assert list(Journal(tmp_path / "j").lines()) == []


def test_the_score_is_the_harmonic_mean_of_its_parts():
    line = {"scores": [], "seconds": 1.0, "cost": 2.0}
    for efficacy, rephrase, neighbours in ((1.0, 0.5, 0.5), (1.0, 0.0, 1.0)):
        values = zip(PARTS.values(), (efficacy, rephrase, neighbours), strict=True)
        line["scores"].append(dict(values))

    found = score_of([line])

    assert found.parts == {"efficacy": 1.0, "rephrase": 0.25, "neighbours": 0.75}
    assert found.value == pytest.approx(3 / (1 / 1 + 1 / 0.25 + 1 / 0.75))
    assert (found.seconds, found.cost) == (0.5, 2.0)


def test_facts_whose_answers_are_too_long_to_be_judged_are_refused(session, tmp_path):
    request = EditRequest(prompt="Mira Voss lives in", subject="Mira Voss", target_new="Lima " * 20)
    measure = trials(session, [EditCase(request=request)], tmp_path / "j")

    with pytest.raises(DataError, match="Tune on facts with short answers"):
        measure(HyperParams(), [0])


def test_a_method_that_answers_everything_alike_is_worth_nothing(session, tmp_path):
    score = trials(session, toy_cases(3, session.host), tmp_path / "j")(HyperParams(), range(3))

    assert score.parts == {"efficacy": 1, "rephrase": 1, "neighbours": 0}
    assert score.value == 0
    assert not session.is_edited


@pytest.mark.parametrize(("max_batch", "sizes"), [(None, [5]), (2, [2, 2, 1]), (1, [1] * 5)])
def test_as_many_facts_are_edited_together_as_the_method_takes(max_batch, sizes, session, tmp_path):
    method = replace(LAST, max_batch=max_batch)
    trials(session, toy_cases(5, session.host), tmp_path / "j", method)(HyperParams(), range(5))

    assert session.sizes == sizes


def test_a_fact_whose_edit_fails_counts_nothing_and_is_told(session, tmp_path):
    failing = EditCase(request=EditRequest(prompt="It fails in", subject="It", target_new="Lima"))
    cases = [failing, *toy_cases(1, session.host)]
    score = trials(session, cases, tmp_path / "j")(HyperParams(), range(2))

    assert score.parts["efficacy"] == 1 / 2
    assert score.failures == ("The edit fails.",)


def test_what_was_measured_is_not_measured_again_but_its_time_counts(session, tmp_path):
    cases = toy_cases(3, session.host)
    few = trials(session, cases, tmp_path / "j")(HyperParams(), range(2))
    session.sizes.clear()

    resumed = trials(session, cases, tmp_path / "j")
    assert resumed(HyperParams(), range(2)) == few
    assert resumed.spent == few.cost > 0
    with pytest.raises(BudgetSpent):
        resumed(HyperParams(), range(3), until=few.cost)
    assert session.sizes == []
    resumed(HyperParams(), range(3))
    assert session.sizes == [1]


def test_settings_that_break_the_model_lose_to_equal_ones():
    parts = dict.fromkeys(PARTS.values(), 0.5)
    whole, broken = (
        score_of([{"scores": [{**parts, NLL: nll}], "seconds": 1.0, "cost": 1.0}])
        for nll in (9.0, "nan")  # as the journal has it
    )

    assert broken.value == whole.value
    assert broken.order < whole.order
