"""Differences between methods, taken case by case."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kedit_bench.results import SCORES
from kedit_bench.scoring import FINAL, IMMEDIATE, UNEDITED
from kedit_core.errors import DataError

RESAMPLES, RESAMPLE_SEED = 1000, 0

Key = tuple[str, str, str]  # metric, part, moment
Scores = dict[Key, dict[str, float]]  # by case


@dataclass(frozen=True)
class Difference:
    """How far a method's scores are above those of what it is compared with.

    Attributes:
        label: of the method.
        metric, part, moment: of the scores; immediate or final.
        mean: over the cases that both have, in the metric's unit.
        low, high: ends of its 95 % percentile interval, by a bootstrap that draws cases.
        cases: how many both have.
    """

    label: str
    metric: str
    part: str
    moment: str
    mean: float
    low: float
    high: float
    cases: int


def differences(cells: Mapping[str, Path], to: str) -> Iterator[Difference]:
    """Differences of all methods but one to that one, or of all to the unedited model.

    Scores of the model as a whole, and values that are no finite numbers, are in none.

    Args:
        cells: folder of each method by its label.
        to: label of a method, or `unedited`.

    Raises:
        DataError: a method's scores by case are missing.
    """
    found = {label: _scores(folder) for label, folder in cells.items()}
    for label, scores in found.items():
        for (metric, part, moment), values in scores.items():
            if moment not in (IMMEDIATE, FINAL) or label == to:
                continue
            base = scores if to == UNEDITED else found[to]
            other = base.get((metric, part, UNEDITED if to == UNEDITED else moment), {})
            moved = np.array([value - other[n] for n, value in values.items() if n in other])
            if len(moved):
                draws = np.random.default_rng(RESAMPLE_SEED)
                means = [draws.choice(moved, len(moved)).mean() for _ in range(RESAMPLES)]
                low, high = np.percentile(means, [2.5, 97.5])
                told = (float(moved.mean()), float(low), float(high), len(moved))
                yield Difference(label, metric, part, moment, *told)


def _scores(folder: Path) -> Scores:
    """What a method's `scores.csv` holds of its cases."""
    found: Scores = {}
    file = folder / SCORES
    if not file.exists():
        raise DataError(f"{file} is missing. `kedit eval rescore {folder.parent}` writes it.")
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["case"] and math.isfinite(value := float(row["value"])):
                key = (row["metric"], row["part"], row["moment"])
                found.setdefault(key, {})[row["case"]] = value
    return found
