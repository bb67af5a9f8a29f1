"""Tables for people say everything once, and what belongs together stands together."""

from types import SimpleNamespace

import pytest

from kedit_bench.report import (
    OTHER_CASES,
    cases_note,
    effort_rows,
    identity_rows,
    kept_note,
    notes,
    plots,
    retention,
    score_rows,
    unscored_notes,
)


def score(metric: str, part: str, moment: str, mean: float, cases: int, probes: int = 1) -> dict:
    return {
        "protocol": {"metric": metric, "part": part, "moment": moment},
        "mean": mean,
        "error": None if cases == 1 else 0.1,
        "cases": cases,
        "probes": probes,
    }


def result(label: str, *scores: tuple, metric: str = "locality@1", **further) -> dict:
    """Of scores as (part, moment, mean, cases, probes)."""
    found = [score(metric, *told) for told in scores]
    return {"label": label, "scores": found, "left_out": {}, "retention": [], **further}


def names(*results: dict) -> list[str]:
    """What stands first in each row."""
    return [row[0] for row in score_rows(results)[1]]


UNEDITED = (("nq", "unedited", 1.0, 4, 4), ("", "unedited", 1.0, 4, 4))
SAME = (("nq", "immediate", 0.5, 4, 4), ("", "immediate", 0.5, 4, 4))


def test_the_only_family_is_not_shown_besides_the_headline():
    assert names(result("a", *UNEDITED, *SAME)) == ["locality@1"]
    assert names(result("a", *UNEDITED, *SAME), result("b", *UNEDITED, *SAME)) == ["locality@1"]


def test_figures_of_the_only_family_are_not_shown_besides_those_of_all():
    figures = [(f"{part}x", "immediate", 9.0, 4, 4) for part in ("", "nq.")]
    other = ("pq", "immediate", 0.7, 4, 4), ("pq.x", "immediate", 3.0, 4, 4)

    assert names(result("a", *SAME, *figures)) == ["locality@1", "locality@1 [x]"]
    assert len(names(result("a", *SAME, *figures, *other))) == 6


def test_a_part_that_differs_anywhere_is_shown():
    both = ["locality@1", "locality@1 [nq]"]
    other = (("nq", "immediate", 0.5, 4, 4), ("", "immediate", 0.75, 4, 4))
    without = (("nq", "immediate", 0.5, 4, 4), ("", "immediate", 0.5, 4, 8))  # nameless probes

    assert names(result("a", *UNEDITED, *other)) == both
    assert names(result("a", *UNEDITED, *without)) == both
    assert names(result("a", *UNEDITED, *SAME), result("b", *UNEDITED, *other)) == both


def test_several_families_are_shown_even_if_they_are_alike():
    several = (*SAME[:1], ("pq", "immediate", 0.5, 4, 4), ("", "immediate", 0.5, 4, 8))

    assert names(result("a", *several)) == ["locality@1", "locality@1 [nq]", "locality@1 [pq]"]


def test_a_metric_without_a_headline_shows_its_part():
    assert names(result("a", ("nq", "immediate", 0.5, 4, 4))) == ["locality@1 [nq]"]


def test_a_family_that_comes_late_stands_with_its_metric():
    first = result("a", ("nq", "immediate", 0.5, 4, 4), ("", "immediate", 0.6, 4, 8))
    other = result("a", ("", "immediate", 0.6, 4, 8), metric="efficacy@1")
    late = result("b", ("pq", "immediate", 0.5, 4, 4))

    assert names(first, other, late) == [
        "locality@1",
        "locality@1 [nq]",
        "locality@1 [pq]",
        "efficacy@1",
    ]


# -- numbers of cases --------------------------------------------------------------------------


def cells(*results: dict) -> list[tuple[str, ...]]:
    """What stands in each row from `unedited` on."""
    return [row[2:] for row in score_rows(results)[1]]


def told(unedited: int, edited: int, moment: str = "immediate") -> tuple[tuple, tuple]:
    return ("", "unedited", 0.25, unedited, 1), ("", moment, 0.5, edited, 1)


def test_the_unedited_mean_says_its_number_of_cases_where_a_method_has_another():
    assert cells(result("a", *told(4, 4))) == [("0.250", "0.500 ± 0.100 (4)")]
    assert cells(result("a", *told(4, 3))) == [("0.250 (4)", "0.500 ± 0.100 (3)")]
    assert cells(result("a", *told(3, 3)), result("b", *told(4, 4))) == [
        ("0.250 (4)", "0.500 ± 0.100 (3)", "0.500 ± 0.100 (4)")
    ]


def test_a_single_case_has_no_standard_error():
    assert cells(result("a", *told(1, 1))) == [("0.250", "0.500 (1)")]


@pytest.mark.parametrize(
    ("other", "note"),
    [
        (result("b", *told(4, 4)), ""),
        (result("b", *told(4, 3)), OTHER_CASES),
        (result("b", *told(4, 4), left_out={"2": "no subject"}), OTHER_CASES),
    ],
)
def test_a_note_says_that_methods_have_other_cases(other, note):
    assert cases_note([result("a", *told(4, 4)), other]) == note


def test_one_method_alone_needs_no_note():
    assert cases_note([result("a", *told(4, 3), left_out={"2": "no subject"})]) == ""


# -- sequences and effort ----------------------------------------------------------------------

METRIC = "efficacy/greedy@1"


def sequence(label: str = "a") -> dict:
    """Twelve cases, of which one was left out; asked after 1, after 10, and at the end."""
    ages = [((0, 0), 1.0, 1), ((1, 1), 0.5, 2), ((2, 3), 0.25, 3)]
    points = [
        {**score(METRIC, "", moment, mean, cases), "age": list(age)}
        for moment in ("after 10", "final")
        for age, mean, cases in (ages if moment == "final" else ages[:1])
    ]
    moments = [("unedited", 0.0, 11), ("immediate", 1.0, 11), ("after 10", 0.75, 9)]
    moments += [("after 1", 1.0, 1), ("final", 0.5, 11)]
    scores = [("", moment, mean, cases, 1) for moment, mean, cases in moments]
    mixed = {"metric": METRIC, "age": [0, 0], "mean": 0.9, "n": 7}  # of an earlier version
    further = {"cases": 11, "left_out": {"3": "no subject"}, "retention": [mixed, *points]}
    return result(label, *scores, metric=METRIC, **further)


def test_what_is_left_of_a_sequence_is_told_at_its_end_by_age_and_at_each_checkpoint():
    tables = dict(retention([sequence()]))

    assert tables["Retention at the end, by age of the edit"] == (
        ("metric", "cases edited later", "a"),
        [
            (METRIC, "0", "1.000 (1)"),
            (METRIC, "1", "0.500 ± 0.100 (2)"),
            (METRIC, "2–3", "0.250 ± 0.100 (3)"),
        ],
    )
    assert tables["Retention by number of edits"] == (
        ("metric", "cases edited so far", "a"),
        [
            (METRIC, "1", "1.000 (1)"),
            (METRIC, "10", "0.750 ± 0.100 (9)"),
            (METRIC, "12", "0.500 ± 0.100 (11)"),
        ],
    )


def test_where_nothing_was_asked_later_there_is_nothing_about_it():
    ended = result("a", *told(4, 4, "final"))

    assert retention([result("a", *told(4, 4))]) == []
    assert [heading for heading, _ in retention([{**ended, "cases": 4}])] == []


def test_a_sequence_has_a_plot_of_each():
    effort = {"seconds_per_edit": None}

    assert [heading for heading, _ in plots([{**sequence(), **effort}])] == [
        "Retention at the end, by age of the edit",
        "Retention by number of edits",
    ]
    assert list(plots([{**result("a", *told(4, 4)), **effort}])) == []


def test_preparation_is_told_apart_if_it_was_measured():
    effort = {
        "cases": 4,
        "seconds_per_edit": 0.5,
        "seconds": 2.0,
        "peak_host_bytes": 0,
        "peak_device_bytes": None,
    }
    before = result("before", **effort)  # as an earlier version wrote it
    header, rows = effort_rows([before, {**before, "label": "a", "preparation_seconds": 12.34}])

    assert header[2:5] == ("s of preparation", "s per edit (median)", "s of all edits")
    assert rows == [
        ("before", "4", "–", "0.50", "2.0", "0 MB", "–", "–"),
        ("a", "4", "12.3", "0.50", "2.0", "0 MB", "–", "–"),
    ]


def test_values_that_are_in_no_mean_are_told():
    protocol = {"metric": "efficacy/nll@1", "part": "hop", "moment": "final"}
    told = {"plugin": "p", "hparams": {}, "failed": {}, "merged_answers": 0, "cut_prompts": 0}
    broken = result("b", **told, undefined=[{"protocol": protocol, "values": 3}])

    found = dict(notes(SimpleNamespace(left_out=list), [result("a", **told), broken]))

    assert found["Flags"] == [
        "`b`: efficacy/nll@1 [hop], final: the mean leaves out 3 values that are no finite numbers."
    ]


def test_metrics_that_no_method_has_a_score_of_are_told_by_the_kind_of_their_probes():
    kinds = {"locality@1": "locality", "hops@1": "portability", "steps@1": "portability"}
    without = result("a", unscored=kinds)

    assert unscored_notes([without, result("b", *told(4, 4))]) == [
        "hops@1, steps@1: no case has a probe of kind portability that can be scored."
    ]


def test_a_metric_that_names_no_probes_may_have_nothing_to_score():
    assert unscored_notes([result("a", unscored={"mine@1": ""})]) == [
        "mine@1: no case has anything that it scores."
    ]


def test_a_metric_that_failed_is_told():
    told = {"plugin": "p", "hparams": {}, "failed": {}, "merged_answers": 0, "cut_prompts": 0}
    broken = result("a", **told, broken={"mine@1": "The metric mine@1 failed."})

    found = dict(notes(SimpleNamespace(left_out=list), [broken]))

    assert found["Flags"] == ["`a`: The metric mine@1 failed."]


def test_where_no_edit_was_timed_there_are_no_seconds():
    effort = {"cases": 6, "seconds_per_edit": None, "seconds": 0, "kept_targets": 6}
    effort |= {"peak_host_bytes": 0, "peak_device_bytes": None}

    assert effort_rows([result("a", **effort)])[1][0][2:5] == ("–", "–", "–")
    assert kept_note(result("a", **effort)) == (
        "a: 6 cases were edited in steps that took targets kept from earlier edits, so their "
        "seconds do not count."
    )


def test_a_run_of_an_earlier_version_may_have_no_metric():
    run = SimpleNamespace(identity={"model": "m", "metrics": [], "data": None})

    assert dict(identity_rows(run)) == {"model": "m", "metrics": ""}
