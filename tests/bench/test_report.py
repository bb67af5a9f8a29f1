"""Tables for people say everything once, and what belongs together stands together."""

from kedit_bench.report import score_rows


def result(label: str, *scores: tuple, metric: str = "locality@1") -> dict:
    """Of scores as (part, moment, mean, cases, probes)."""
    return {
        "label": label,
        "scores": [
            {
                "protocol": {"metric": metric, "part": part, "moment": moment},
                "mean": mean,
                "error": 0.1,
                "cases": cases,
                "probes": probes,
            }
            for part, moment, mean, cases, probes in scores
        ],
    }


def names(*results: dict) -> list[str]:
    """What stands first in each row."""
    return [row[0] for row in score_rows(results)[1]]


UNEDITED = (("nq", "unedited", 1.0, 4, 4), ("", "unedited", 1.0, 4, 4))
SAME = (("nq", "immediate", 0.5, 4, 4), ("", "immediate", 0.5, 4, 4))


def test_the_only_family_is_not_shown_besides_the_headline():
    assert names(result("a", *UNEDITED, *SAME)) == ["locality@1"]
    assert names(result("a", *UNEDITED, *SAME), result("b", *UNEDITED, *SAME)) == ["locality@1"]


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
