"""Results for people: a table in the terminal, Markdown, and one HTML page with plots."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from kedit_bench.run import Run
from kedit_bench.scoring import FINAL, IMMEDIATE, UNEDITED
from kedit_core.cli.printing import table
from kedit_core.files import new_file

Result = Mapping[str, Any]
Row = tuple[str, ...]


def terminal(results: Sequence[Result]) -> str:
    """A line for each score: unedited, and each method's mean with its standard error."""
    header, rows = score_rows(results)
    return table(rows, header)


def score_rows(results: Sequence[Result]) -> tuple[Row, list[Row]]:
    """Header and rows: metric and part, moment, unedited, then each method's mean ± s.e. (n).

    A metric's rows stand together, its headline first.  Its only part is left out where it says
    what the headline says: the only family.
    """
    header = ("metric", "moment", UNEDITED, *(r["label"] for r in results))
    keys = dict.fromkeys(
        (s["protocol"]["metric"], s["protocol"]["part"], s["protocol"]["moment"])
        for result in results
        for s in result["scores"]
        if s["protocol"]["moment"] in (IMMEDIATE, FINAL)
    )
    metrics = list(dict.fromkeys(metric for metric, _, _ in keys))
    rows = []
    for metric, part, moment in sorted(keys, key=lambda key: (metrics.index(key[0]), key[1] != "")):
        if part and _is_the_headline_again(results, metric, part):
            continue
        name = f"{metric} [{part}]" if part else metric
        unedited = next(filter(None, (_find(r, metric, part, UNEDITED) for r in results)), None)
        means = (_find(result, metric, part, moment) for result in results)
        rows.append((name, moment, _shown(unedited, False), *(_shown(m, True) for m in means)))
    return header, rows


def _is_the_headline_again(results: Sequence[Result], metric: str, part: str) -> bool:
    """Whether it is the metric's only part, and every figure of it is the headline's."""
    figures: dict[str, list[tuple[Any, ...]]] = {}
    for number, result in enumerate(results):
        for score in result["scores"]:
            p = score["protocol"]
            if p["metric"] == metric:
                told = (score[key] for key in ("mean", "error", "cases", "probes"))
                figures.setdefault(p["part"], []).append((number, p["moment"], *told))
    return set(figures) == {"", part} and sorted(figures[""]) == sorted(figures[part])


def _find(result: Result, metric: str, part: str, moment: str) -> Mapping[str, Any] | None:
    for score in result["scores"]:
        p = score["protocol"]
        if (p["metric"], p["part"], p["moment"]) == (metric, part, moment):
            return dict(score)
    return None


def _shown(score: Mapping[str, Any] | None, with_error: bool) -> str:
    if score is None:
        return "–"
    text = f"{score['mean']:.3f}"
    if with_error and score["error"] is not None:
        text += f" ± {score['error']:.3f}"
    return f"{text} ({score['cases']})" if with_error else text


def write_reports(run: Run, results: Sequence[Result]) -> None:
    """Write `report.md` and `report.html` into the run's folder."""
    with new_file(run.folder / "report.md") as path:
        path.write_text(markdown(run, results), "utf-8")
    with new_file(run.folder / "report.html") as path:
        path.write_text(html(run, results), "utf-8")


def markdown(run: Run, results: Sequence[Result]) -> str:
    """Scores, effort, protocols and what was left out."""
    parts = [f"# {title(run)}", "", *_md_table(*score_rows(results))]
    parts += ["", "Mean ± standard error (cases).", "", "## Effort", ""]
    parts += _md_table(*effort_rows(results))
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


def effort_rows(results: Sequence[Result]) -> tuple[Row, list[Row]]:
    """Seconds and memory of each method's edits."""
    header = ("method", "cases", "s per edit (median)", "s in all", "peak host", "peak device")
    rows: list[Row] = [
        (
            str(r["label"]),
            str(r["cases"]),
            _or_dash(r["seconds_per_edit"], "{:.2f}"),
            f"{r['seconds']:.1f}",
            _or_dash(r["peak_host_bytes"], "{:.0f} MB", 1e-6),
            _or_dash(r["peak_device_bytes"], "{:.0f} MB", 1e-6),
        )
        for r in results
    ]
    return header, rows


def _or_dash(value: float | None, form: str, scale: float = 1.0) -> str:
    return "–" if value is None else form.format(value * scale)


def protocol_rows(results: Sequence[Result]) -> tuple[Row, list[Row]]:
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
    about["metrics"] = ", ".join(about["metrics"])
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
    if flagged:
        found.append(("Flags", flagged))
    return found


def _md_table(header: Row, rows: Sequence[Row]) -> list[str]:
    lines = [header, tuple("---" for _ in header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


# -- plots -----------------------------------------------------------------------------------


def plots(results: Sequence[Result]) -> Iterator[tuple[str, str]]:
    """Title and picture (PNG in base64) of each plot for which there are numbers."""
    from matplotlib.figure import Figure

    drawings: list[tuple[str, Callable[[Any, Sequence[Result]], bool]]] = [
        ("Efficacy against locality", _draw_trade),
        ("Retention by age of the edit", _draw_retention),
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


def _draw_retention(axes: Any, results: Sequence[Result]) -> bool:
    found = False
    for result in results:
        points = [p for p in result["retention"] if p["metric"].startswith("efficacy/")]
        metric = points[0]["metric"] if points else ""
        points = [p for p in points if p["metric"] == metric]
        if points:
            found = True
            axes.plot(
                [p["age"][0] for p in points],
                [p["mean"] for p in points],
                marker="o",
                label=f"{result['label']}: {metric}",
            )
    axes.set_xscale("symlog")
    axes.set_xlabel("cases edited since its own step")
    axes.set_ylim(-0.02, 1.02)
    axes.legend() if found else None
    return found


def _draw_time(axes: Any, results: Sequence[Result]) -> bool:
    timed = [r for r in results if r["seconds_per_edit"] is not None]
    axes.barh([r["label"] for r in timed], [r["seconds_per_edit"] for r in timed])
    axes.set_xlabel("seconds per edit (median)")
    return bool(timed)
