"""Results for people: a table in the terminal, Markdown, and one HTML page with plots."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from kedit_bench.paired import Difference
from kedit_bench.results import ages_of, broken_of, undefined_note, undefined_of
from kedit_bench.run import Run
from kedit_bench.scoring import FINAL, IMMEDIATE, UNEDITED
from kedit_core.cli.printing import table
from kedit_core.files import new_file

Result = Mapping[str, Any]
Row = tuple[str, ...]
Table = tuple[Row, list[Row]]

OTHER_CASES = (
    "Not all methods are scored on the same cases, so a difference between them need not come from "
    "their edits."
)


def terminal(results: Sequence[Result]) -> str:
    """A line for each score: unedited, and each method's mean with its standard error."""
    header, rows = score_rows(results)
    return table(rows, header)


def score_rows(results: Sequence[Result]) -> Table:
    """Header and rows: metric and part, moment, unedited, then each method's mean ± s.e. (n).

    The unedited model's mean is that of the method with the most cases; its n is told where a
    method has another.  A metric's rows stand together, its headline first.  Its only part is left
    out where it says what the headline says: the only family.
    """
    header = ("metric", "moment", UNEDITED, *_labels(results))
    keys = dict.fromkeys(
        (s["protocol"]["metric"], s["protocol"]["part"], s["protocol"]["moment"])
        for result in results
        for s in result["scores"]
        if s["protocol"]["moment"] in (IMMEDIATE, FINAL)
    )
    rows = []
    for metric, part, moment in _headlines_first(keys):
        if part and _is_the_headline_again(results, metric, part):
            continue
        name = f"{metric} [{part}]" if part else metric
        means = [_find(result, metric, part, moment) for result in results]
        unedited = _unedited(results, metric, part)
        first = _shown(unedited, error=False, cases=len(_numbers([unedited, *means])) > 1)
        rows.append((name, moment, first, *map(_shown, means)))
    return header, rows


def difference_rows(found: Sequence[Difference]) -> Table:
    """Header and rows: metric and part, moment, then each method's difference [95 %] (n).

    Rows stand as in `score_rows`; parts that say what their headline says are left out.
    """
    labels = list(dict.fromkeys(d.label for d in found))
    shown: dict[tuple[str, str, str], dict[str, str]] = {}
    for d in found:
        text = f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}] ({d.cases})"
        shown.setdefault((d.metric, d.part, d.moment), {})[d.label] = text
    rows: list[Row] = [
        (
            f"{metric} [{part}]" if part else metric,
            moment,
            *(shown[metric, part, moment].get(label, "–") for label in labels),
        )
        for metric, part, moment in _headlines_first(shown)
        if not part or shown[metric, part, moment] != shown.get((metric, "", moment))
    ]
    return ("metric", "moment", *labels), rows


def _headlines_first(keys: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Metric, part and moment: a metric's together, its headline before its parts."""
    listed = list(keys)
    metrics = list(dict.fromkeys(metric for metric, _, _ in listed))
    return sorted(listed, key=lambda key: (metrics.index(key[0]), key[1] != ""))


def cases_note(results: Sequence[Result]) -> str:
    """A sentence where methods that stand side by side have other cases; or nothing."""
    keys = dict.fromkeys(
        (s["protocol"]["metric"], s["protocol"]["part"], s["protocol"]["moment"])
        for result in results
        for s in result["scores"]
        if s["protocol"]["moment"] != UNEDITED
    )
    rows = ([_find(result, *key) for result in results] for key in keys)
    same = len({frozenset(result["left_out"]) for result in results}) <= 1
    return "" if same and all(len(_numbers(row)) == 1 for row in rows) else OTHER_CASES


def unscored_notes(results: Sequence[Result]) -> list[str]:
    """Sentences about metrics of which no method has a score, by the kind of their probes."""
    scored = {score["protocol"]["metric"] for result in results for score in result["scores"]}
    kinds: dict[str, dict[str, None]] = {}
    for result in results:
        for metric, kind in result.get("unscored", {}).items():  # an earlier version did not tell
            if metric not in scored:
                kinds.setdefault(kind, {})[metric] = None
    return [
        f"{', '.join(metrics)}: no case has "
        + (f"a probe of kind {kind} that can be scored." if kind else "anything that it scores.")
        for kind, metrics in kinds.items()
    ]


def _labels(results: Sequence[Result]) -> Row:
    return tuple(str(result["label"]) for result in results)


def _unedited(results: Sequence[Result], metric: str, part: str) -> Mapping[str, Any] | None:
    """The unedited model's score over the most cases."""
    found = filter(None, (_find(result, metric, part, UNEDITED) for result in results))
    return max(found, key=lambda score: score["cases"], default=None)


def _numbers(scores: Sequence[Mapping[str, Any] | None]) -> set[int]:
    """Numbers of cases that scores are taken over."""
    return {score["cases"] for score in scores if score is not None}


def _is_the_headline_again(results: Sequence[Result], metric: str, part: str) -> bool:
    """Whether it is of the metric's only family, and says what stands there without the family."""
    figures: dict[str, list[tuple[Any, ...]]] = {}
    for number, result in enumerate(results):
        for score in result["scores"]:
            p = score["protocol"]
            if p["metric"] == metric:
                told = (score[key] for key in ("mean", "error", "cases", "probes"))
                figures.setdefault(p["part"], []).append((number, p["moment"], *told))
    family, _, figure = part.partition(".")
    made = {name.partition(".")[2] for name in figures}  # figures of a family, and of all of them
    others = {name for name in figures if "." not in name} - made - {family}
    return not others and sorted(figures.get(figure, ())) == sorted(figures[part])


def _find(result: Result, metric: str, part: str, moment: str) -> Mapping[str, Any] | None:
    for score in result["scores"]:
        p = score["protocol"]
        if (p["metric"], p["part"], p["moment"]) == (metric, part, moment):
            return dict(score)
    return None


def _shown(score: Mapping[str, Any] | None, error: bool = True, cases: bool = True) -> str:
    if score is None:
        return "–"
    text = f"{score['mean']:.3f}"
    if error and score["error"] is not None:
        text += f" ± {score['error']:.3f}"
    return f"{text} ({score['cases']})" if cases else text


def retention(results: Sequence[Result]) -> list[tuple[str, Table]]:
    """What is left of the edits of a sequence: tables that have rows, after their headings."""
    tables = [
        ("Retention at the end, by age of the edit", age_rows(results)),
        ("Retention by number of edits", checkpoint_rows(results)),
    ]
    return [(heading, table) for heading, table in tables if table[1]]


def age_rows(results: Sequence[Result]) -> Table:
    """Header and rows: metric, age of the edit, then each method's mean after all edits."""
    found = [{(p["protocol"]["metric"], *p["age"]): p for p in _at_the_end(r)} for r in results]
    rows: list[Row] = []
    for metric, low, high in _by_metric(key for points in found for key in points):
        age = f"{low}" if low == high else f"{low}–{high}"
        rows.append((metric, age, *(_shown(points.get((metric, low, high))) for points in found)))
    return ("metric", "cases edited later", *_labels(results)), rows


def _at_the_end(result: Result) -> list[dict[str, Any]]:
    """Means by age, on the model with all edits."""
    return [point for point in ages_of(result) if point["protocol"]["moment"] == FINAL]


def checkpoint_rows(results: Sequence[Result]) -> Table:
    """Header and rows: metric, cases edited so far, then each method's mean over them."""
    found = [{(s["protocol"]["metric"], t): s for t, s in _checkpoints(r)} for r in results]
    rows: list[Row] = [
        (metric, str(t), *(_shown(points.get((metric, t))) for points in found))
        for metric, t in _by_metric(key for points in found for key in points)
    ]
    return ("metric", "cases edited so far", *_labels(results)), rows


def _checkpoints(result: Result) -> list[tuple[int, Mapping[str, Any]]]:
    """Headline scores with the number of cases edited so far; none without a checkpoint."""
    found = []
    for score in result["scores"]:
        moment = score["protocol"]["moment"]
        if not score["protocol"]["part"] and moment.startswith("after "):
            found.append((int(moment.split()[1]), score))
        elif not score["protocol"]["part"] and moment == FINAL:
            found.append((result["cases"] + len(result["left_out"]), score))
    return found if any(score["protocol"]["moment"] != FINAL for _, score in found) else []


def _by_metric(keys: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Keys that begin with a metric, each once; metrics as they come, the rest in order."""
    listed = list(dict.fromkeys(keys))
    metrics = list(dict.fromkeys(metric for metric, *_ in listed))
    return sorted(listed, key=lambda key: (metrics.index(key[0]), key[1:]))


def write_reports(run: Run, results: Sequence[Result]) -> None:
    """Write `report.md` and `report.html` into the run's folder."""
    with new_file(run.folder / "report.md") as path:
        path.write_text(markdown(run, results), "utf-8")
    with new_file(run.folder / "report.html") as path:
        path.write_text(html(run, results), "utf-8")


def markdown(run: Run, results: Sequence[Result]) -> str:
    """Scores, effort, protocols and what was left out."""
    parts = [f"# {title(run)}", "", *_md_table(*score_rows(results))]
    parts += ["", f"Mean ± standard error (cases). {cases_note(results)}".strip(), ""]
    for heading, rows in retention(results):
        parts += [f"## {heading}", "", *_md_table(*rows), ""]
    parts += ["## Effort", "", *_md_table(*effort_rows(results))]
    parts += ["", "## How it was measured", "", *_md_table(*protocol_rows(results))]
    parts += ["", "## The run", "", *_md_table(("", ""), identity_rows(run)), ""]
    for heading, lines in notes(run, results):
        parts += [f"## {heading}", "", *(f"- {line}" for line in lines), ""]
    return "\n".join(parts)


def html(run: Run, results: Sequence[Result]) -> str:
    """The same as one page that needs no other file, with plots."""
    import jinja2

    source = (files("kedit_bench") / "report.html.jinja").read_text("utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(source)
    return template.render(
        title=title(run),
        scores=score_rows(results),
        note=cases_note(results),
        retention=retention(results),
        effort=effort_rows(results),
        protocols=protocol_rows(results),
        identity=identity_rows(run),
        notes=notes(run, results),
        plots=list(plots(results)),
    )


def title(run: Run) -> str:
    """What was evaluated, in a line."""
    about = run.identity
    return f"{about['model']} on {about['dataset']}, {about['regime']}"


def effort_rows(results: Sequence[Result]) -> Table:
    """Seconds of each method's preparation, and seconds and memory of its edits."""
    header = (
        *("method", "cases", "s of preparation", "s per edit (median)", "s of all edits"),
        *("peak host", "peak device", "peak reserved"),
    )
    rows: list[Row] = [
        (
            str(r["label"]),
            str(r["cases"]),
            _or_dash(r.get("preparation_seconds"), "{:.1f}"),
            _or_dash(r["seconds_per_edit"], "{:.2f}"),
            _or_dash(None if r["seconds_per_edit"] is None else r["seconds"], "{:.1f}"),
            _or_dash(r["peak_host_bytes"], "{:.0f} MB", 1e-6),
            _or_dash(r["peak_device_bytes"], "{:.0f} MB", 1e-6),
            _or_dash(r.get("peak_reserved_bytes"), "{:.0f} MB", 1e-6),
        )
        for r in results
    ]
    return header, rows


def _or_dash(value: float | None, form: str, scale: float = 1.0) -> str:
    return "–" if value is None else form.format(value * scale)


def protocol_rows(results: Sequence[Result]) -> Table:
    """How each metric asks and scores."""
    header = ("metric", "probe", "decoding", "scorer", "reference", "form")
    rows = dict.fromkeys(
        tuple(score["protocol"][key] for key in header)
        for result in results
        for score in result["scores"]
    )
    return header, list(rows)


def identity_rows(run: Run) -> list[Row]:
    """What the run is."""
    about = {k: v for k, v in run.identity.items() if v not in (None, {}, [])}
    about["metrics"] = ", ".join(about.get("metrics", ()))
    return [(key, str(value)) for key, value in about.items()]


def notes(run: Run, results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """Settings, and what is not in the scores."""
    found = []
    settings = [f"`{r['label']}` ({r['plugin']}): {r['hparams']}" for r in results]
    found.append(("Settings", settings))
    rows = [str(item) for item in run.left_out()]
    if rows:
        found.append(("Rows of the data that made no case", rows))
    for result in results:
        for key, heading in (("left_out", "left out"), ("failed", "failed, scored without it")):
            if result[key]:
                lines = [f"case {n}: {reason}" for n, reason in result[key].items()]
                found.append((f"{result['label']}: {heading}", lines))
    flagged = [
        f"`{r['label']}`: {r['merged_answers']} answers whose first token holds characters of the "
        f"prompt, {r['cut_prompts']} prompts that lost their beginning."
        for r in results
        if r["merged_answers"] or r["cut_prompts"]
    ]
    flagged += [
        f"`{r['label']}`: {undefined_note(item)}" for r in results for item in undefined_of(r)
    ]
    flagged += [kept_note(r) for r in results if r.get("kept_targets")]
    flagged += [f"`{r['label']}`: {why}" for r in results for why in broken_of(r).values()]
    flagged += unscored_notes(results)
    if flagged:
        found.append(("Flags", flagged))
    return found


def kept_note(result: Result) -> str:
    """That some of its edits do not tell how long an edit takes."""
    return (
        f"{result['label']}: {result['kept_targets']} cases were edited in steps that took targets "
        f"kept from earlier edits, so their seconds do not count."
    )


def _md_table(header: Row, rows: Sequence[Row]) -> list[str]:
    lines = [header, tuple("---" for _ in header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


# -- plots -----------------------------------------------------------------------------------


def plots(results: Sequence[Result]) -> Iterator[tuple[str, str]]:
    """Title and picture (PNG in base64) of each plot for which there are numbers."""
    from matplotlib.figure import Figure

    drawings: list[tuple[str, Callable[[Any, Sequence[Result]], bool]]] = [
        ("Efficacy against locality", _draw_trade),
        ("Retention at the end, by age of the edit", _draw_ages),
        ("Retention by number of edits", _draw_checkpoints),
        ("Seconds per edit", _draw_time),
    ]
    for heading, draw in drawings:
        figure = Figure(figsize=(6, 4), layout="constrained")
        if draw(figure.subplots(), results):
            data = io.BytesIO()
            figure.savefig(data, format="png", dpi=110)
            yield heading, base64.b64encode(data.getvalue()).decode()


def _draw_trade(axes: Any, results: Sequence[Result]) -> bool:
    found = False
    for result in results:
        x = _first(result, "locality-agreement/greedy@1", "locality-agreement/teacher-forced@1")
        y = _first(result, "efficacy/greedy@1", "efficacy/teacher-forced@1")
        if x is None or y is None:
            continue
        found = True
        axes.errorbar(
            x["mean"], y["mean"], xerr=x["error"], yerr=y["error"], fmt="o", label=result["label"]
        )
        axes.set_xlabel(x["protocol"]["metric"])
        axes.set_ylabel(y["protocol"]["metric"])
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.legend() if found else None
    return found


def _first(result: Result, *metrics: str) -> Mapping[str, Any] | None:
    """The first of these metrics that there is: after all edits, or else after its own."""
    found = (_find(result, name, "", moment) for name in metrics for moment in (FINAL, IMMEDIATE))
    return next(filter(None, found), None)


def _draw_ages(axes: Any, results: Sequence[Result]) -> bool:
    axes.set_xlabel("cases edited since its own step")
    curves = [[(p["age"][0], p) for p in _at_the_end(result)] for result in results]
    return _draw_efficacy(axes, results, curves)


def _draw_checkpoints(axes: Any, results: Sequence[Result]) -> bool:
    axes.set_xlabel("cases edited so far")
    return _draw_efficacy(axes, results, [_checkpoints(result) for result in results])


def _draw_efficacy(
    axes: Any,
    results: Sequence[Result],
    curves: Sequence[Sequence[tuple[int, Mapping[str, Any]]]],
) -> bool:
    """Each method's first metric of efficacy, against a number of cases."""
    found = False
    for result, curve in zip(results, curves, strict=True):
        named = [(x, s["protocol"]["metric"], s["mean"]) for x, s in curve]
        metric = next((name for _, name, _ in named if name.startswith("efficacy/")), None)
        points = sorted((x, mean) for x, name, mean in named if name == metric)
        if points:
            found = True
            label = f"{result['label']}: {metric}"
            axes.plot([x for x, _ in points], [mean for _, mean in points], marker="o", label=label)
    axes.set_xscale("symlog")
    axes.set_ylim(-0.02, 1.02)
    axes.legend() if found else None
    return found


def _draw_time(axes: Any, results: Sequence[Result]) -> bool:
    timed = [r for r in results if r["seconds_per_edit"] is not None]
    axes.barh([r["label"] for r in timed], [r["seconds_per_edit"] for r in timed])
    axes.set_xlabel("seconds per edit (median)")
    return bool(timed)
