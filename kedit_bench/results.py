"""What came out of a cell: its journal, scored and averaged."""

from __future__ import annotations

import contextlib
import csv
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from kedit_bench.journal import Journal
from kedit_bench.regime import Regime
from kedit_bench.run import ANSWERS, Cases, Run, read_json
from kedit_bench.scoring import (
    FINAL,
    IMMEDIATE,
    Chosen,
    Mean,
    Measurement,
    MetricError,
    MissingAnswerError,
    Protocol,
    Scorer,
    Tally,
)
from kedit_core.ask import Answer, Question, answer_from_json, question_from_json
from kedit_core.errors import DataError
from kedit_core.files import new_file, write_json
from kedit_core.request import EditCase

log = logging.getLogger(__name__)

RESULT, SCORES = "result.json", "scores.csv"
COLUMNS = ("case", "moment", "metric", "part", "value", "probes")

Row = Callable[[int | None, Measurement], object]


@dataclass
class Measured:
    """A journal, scored.

    Attributes:
        scores: means of all moments, those of the unedited model among them.
        cases: how many were edited, or should have been: all but those left out.
        preparation: seconds of what was made once, before the first edit; None where the method
            makes nothing ahead, or it was not timed apart.
        seconds: of each case's edit that did not fail, and made all its targets itself.
        kept_targets: how many cases were edited in steps that took a target kept from earlier ones.
        host_bytes, device_bytes, reserved_bytes: the highest of all edits, see `Effort`; None
            where it was not measured.
        left_out: reason by number of the case.
        failed: the same for edits that failed.
        merged, cut: answers whose first token holds characters of the prompt, and those whose
            prompt was too long.
        undefined: how many values are no finite numbers and in no mean, by protocol.
        by_age: in a sequence, the values of a headline metric at a moment, by bits of the number
            of cases in later steps than the case's own.
    """

    scores: list[Mean] = field(default_factory=list)
    cases: int = 0
    preparation: float | None = None
    seconds: list[float] = field(default_factory=list)
    kept_targets: int = 0
    host_bytes: int | None = None
    device_bytes: int | None = None
    reserved_bytes: int | None = None
    left_out: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    merged: int = 0
    cut: int = 0
    undefined: dict[Protocol, int] = field(default_factory=dict)
    by_age: dict[Protocol, dict[int, Tally]] = field(default_factory=dict)


def score_journal(
    journal: Journal,
    cases: Sequence[EditCase] | Cases,
    scorer: Scorer,
    row: Row = lambda case, measurement: None,
) -> Measured:
    """Score what was kept, one case at a time: neither answers nor scores of cases are held.

    Each score is told to `row`, with the number of its case.

    Raises:
        MissingAnswerError: the journal lacks an answer that a metric needs.
        MetricError: a metric failed.
    """
    found = Measured()
    measurements = _measurements(journal, cases, scorer, found)
    found.scores = scorer.summary(_finite(measurements, found, row))
    for line in map(undefined_note, _undefined(found)):
        log.warning("%s", line)
    return found


def _finite(
    measurements: Iterable[tuple[int | None, Measurement]], found: Measured, row: Row
) -> Iterator[Measurement]:
    """Those that can be averaged; the others are counted in `found`.  All are told to `row`."""
    for case, measurement in measurements:
        row(case, measurement)
        if measurement.is_finite:
            yield measurement
        else:
            known = found.undefined.get(measurement.protocol, 0)
            found.undefined[measurement.protocol] = known + 1


def _measurements(
    journal: Journal, cases: Sequence[EditCase] | Cases, scorer: Scorer, found: Measured
) -> Iterator[tuple[int | None, Measurement]]:
    """The scores of each line of a journal with its case; what else it says is noted in `found`."""
    size = Regime.parse(scorer.where["schedule"]).size
    first: dict[int, int] = {}  # where a case's answers of both sides are
    figures: set[str] = set()  # metrics of the whole model
    for place in journal.places():
        line = journal.at(place)
        if "figures" in line:
            for chosen, _ in scorer.of_models():
                if chosen.name not in line["figures"]:
                    raise MissingAnswerError(chosen.name)
                told = line["figures"][chosen.name]
                figures.add(chosen.name)
                for measurement in scorer.figures(chosen, told, line["moment"]):
                    yield line["case"], measurement
        elif "preparation" in line:
            found.preparation = line["preparation"]
        elif "left_out" in line:
            found.left_out[line["n"]] = line["left_out"]
        else:
            n = line["n"]
            both = line if first.setdefault(n, place) == place else journal.at(first[n])
            scored = _scored(line, both, cases[n], scorer, found)
            yield from ((n, measurement) for measurement in scored)
            if line["moment"] != IMMEDIATE:
                edits = _edits(line["moment"], len(cases))
                own = min(edits, (n // size + 1) * size)  # edited with it or before it
                _note_age(found, edits - own, scored)
    for chosen, _ in scorer.of_models():
        if chosen.name not in figures:
            raise MissingAnswerError(chosen.name)


def _scored(
    line: Mapping[str, Any],
    both: Mapping[str, Any],
    case: EditCase,
    scorer: Scorer,
    found: Measured,
) -> list[Measurement]:
    """The scores of a line; `both` is the case's first one, which holds both sides."""
    before, after, moment = _answers(both, "before"), _answers(line, "after"), line["moment"]
    if line is not both:
        before.update(_answers(line, "before"))  # about what was answered at this moment
    scored = []
    if moment == IMMEDIATE:
        scored += scorer.unchanged(case, before)
        found.cases += 1
        if line.get("kept_targets"):
            found.kept_targets += 1
        elif "failed" not in line:
            found.seconds.append(line["seconds"])
        for peak in ("host_bytes", "device_bytes", "reserved_bytes"):
            setattr(found, peak, _higher(getattr(found, peak), line.get(peak)))
    if "failed" in line:
        found.failed[line["n"]] = line["failed"]
    scored += scorer.score(case, before, after, moment)
    found.merged += sum(getattr(answer, "merged", False) for answer in after.values())
    found.cut += sum(getattr(answer, "cut", False) for answer in after.values())
    return scored


def _edits(moment: str, cases: int) -> int:
    """How many cases had been edited then, of so many."""
    return cases if moment == FINAL else int(moment.split()[1])


def _answers(line: Mapping[str, Any], side: str) -> dict[Question, Answer]:
    """The answers of one side that a line holds."""
    answers: dict[Question, Answer] = {}
    for item in line["answers"]:
        if side in item:
            question = question_from_json(item["question"])
            answers[question] = answer_from_json(question, item[side])
    return answers


def _higher(known: int | None, new: int | None) -> int | None:
    return max((peak for peak in (known, new) if peak is not None), default=None)


def _note_age(found: Measured, age: int, scored: Iterable[Measurement]) -> None:
    for measurement in scored:
        protocol = measurement.protocol
        if not protocol.part and measurement.is_finite:
            ages = found.by_age.setdefault(protocol, {})
            ages.setdefault(age.bit_length(), Tally(protocol)).add(measurement)


def write_result(
    folder: Path, about: Mapping[str, Any], cases: Sequence[EditCase] | Cases, scorer: Scorer
) -> dict[str, Any]:
    """Score a cell's journal, write `result.json` and `scores.csv`, and return the former.

    Scores of other metrics that were written before stay in both.  A metric whose code fails is
    passed over; the result says why.

    Args:
        folder: of the cell.
        about: what the cell is: method, label, plugin, hparams.
        cases: of the run.
        scorer: the metrics.

    Raises:
        MissingAnswerError: the journal lacks an answer that a metric needs.
        DataError: what was written before is damaged.
    """
    earlier = read_result(folder)
    try:
        anew = {chosen.name for chosen in scorer.chosen} - scorer.broken.keys()
        with _rows(folder / SCORES, anew) as row:
            found = score_journal(Journal(folder / ANSWERS), cases, scorer, row)
    except MetricError as error:
        scorer.broken[error.metric] = error
        return write_result(folder, about, cases, scorer)
    result = {**about, **_figures(found)}
    if earlier is not None:
        scores = [s for s in earlier["scores"] if s["protocol"]["metric"] not in anew]
        retention = [r for r in ages_of(earlier) if r["protocol"]["metric"] not in anew]
        result["scores"] = [*scores, *result["scores"]]
        undefined = [u for u in undefined_of(earlier) if u["protocol"]["metric"] not in anew]
        result["retention"] = [*retention, *result["retention"]]
        result["undefined"] = [*undefined, *result["undefined"]]
    before = broken_of(earlier or {})
    result["broken"] = {name: why for name, why in before.items() if name not in anew}
    result["broken"] |= {name: str(error) for name, error in scorer.broken.items()}
    kinds = {**(earlier or {}).get("unscored", {}), **{c.name: c.spec.probe for c in scorer.chosen}}
    seen = {item["protocol"]["metric"] for item in (*result["scores"], *result["undefined"])}
    seen |= result["broken"].keys()
    unscored = {metric: kind for metric, kind in kinds.items() if metric not in seen}
    result["unscored"] = unscored if found.cases else {}
    write_json(folder / RESULT, result)
    return result


@contextlib.contextmanager
def _rows(file: Path, anew: Collection[str]) -> Iterator[Row]:
    """Write scores by case; rows of metrics that are not scored `anew` stay in the file."""
    with new_file(file) as path, path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(COLUMNS)
        if file.exists():
            with file.open(encoding="utf-8", newline="") as before:
                rows = csv.reader(before)
                if tuple(next(rows, ())) != COLUMNS:
                    raise DataError(f"{file} cannot be read. Remove it and try again.")
                writer.writerows(row for row in rows if row[2] not in anew)

        def write(case: int | None, measurement: Measurement) -> None:
            p = measurement.protocol
            told = (p.moment, p.metric, p.part, measurement.value, measurement.probes)
            writer.writerow((case, *told))

        yield write


def read_result(folder: Path) -> dict[str, Any] | None:
    """What `write_result` wrote for a cell; None where nothing was written yet.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    return read_json(path, "Remove it and try again.")


def ages_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The means by age of a result; what an earlier version wrote mixes moments and is not one."""
    return [point for point in result["retention"] if "protocol" in point]


def undefined_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Values of a result that are in no mean; an earlier version did not count them."""
    return list(result.get("undefined", ()))


def broken_of(result: Mapping[str, Any]) -> dict[str, str]:
    """Why metrics of a result have no scores; an earlier version did not tell."""
    return dict(result.get("broken", {}))


def undefined_note(item: Mapping[str, Any]) -> str:
    """A sentence about one of `undefined_of`."""
    protocol, values = item["protocol"], item["values"]
    part = f" [{protocol['part']}]" if protocol["part"] else ""
    return (
        f"{protocol['metric']}{part}, {protocol['moment']}: the mean leaves out {values} values "
        f"that are no finite numbers."
    )


def results_of(run: Run) -> list[dict[str, Any]]:
    """The results of all methods of a run that were evaluated to the end, by name."""
    return [result for cell in run.cells() if (result := read_result(cell)) is not None]


def scorer_of(identity: Mapping[str, Any], chosen: Sequence[Chosen]) -> Scorer:
    """The scorer of a run: its scores say on what model, data and regime they were made."""
    return Scorer(
        chosen,
        {
            "schedule": identity["regime"],
            "model": identity["model"],
            "dtype": identity["dtype"],
            "dataset": _data(identity),
        },
    )


def _data(identity: Mapping[str, Any]) -> str:
    """The dataset and the probes asked besides, each with a digest of its file."""
    named = [(identity["dataset"], identity["data"])]
    probes = identity.get("probes") or {}
    named += [(pair.partition("=")[0], digest) for pair, digest in probes.items()]
    text = " + ".join(f"{name} {digest[:12]}" if digest else name for name, digest in named)
    return f"{text} ({identity['probes_per_case']} a case)" if probes else text


def _figures(found: Measured) -> dict[str, Any]:
    """Means with protocols, effort, and what was left out."""
    return {
        "cases": found.cases,
        "left_out": {str(n): reason for n, reason in found.left_out.items()},
        "failed": {str(n): reason for n, reason in found.failed.items()},
        "merged_answers": found.merged,
        "cut_prompts": found.cut,
        "preparation_seconds": found.preparation,
        "seconds_per_edit": median(found.seconds) if found.seconds else None,
        "seconds": sum(found.seconds),
        "timed": len(found.seconds),
        "kept_targets": found.kept_targets,
        "peak_host_bytes": found.host_bytes,
        "peak_device_bytes": found.device_bytes,
        "peak_reserved_bytes": found.reserved_bytes,
        "scores": [_mean(m) for m in found.scores],
        "retention": _retention(found.by_age),
        "undefined": _undefined(found),
    }


def _mean(mean: Mean) -> dict[str, Any]:
    return {**asdict(mean), "protocol": asdict(mean.protocol)}


def _undefined(found: Measured) -> list[dict[str, Any]]:
    return [{"protocol": asdict(p), "values": number} for p, number in found.undefined.items()]


def _retention(by_age: Mapping[Protocol, Mapping[int, Tally]]) -> list[dict[str, Any]]:
    """Means by protocol and age of the edit, in ages that double: 0, 1, 2-3, 4-7, …"""
    return [
        {**_mean(tally.mean()), "age": [(1 << bits) // 2, (1 << bits) - 1]}
        for ages in by_age.values()
        for bits, tally in sorted(ages.items())
    ]
