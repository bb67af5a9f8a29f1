"""Figures of causal traces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit_core.files import new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from kedit_core.numerics.causal import Averages, TraceResult

FORMATS = (".png", ".svg")
TITLES = {"block": "single block", "mlp": "MLP", "attn": "attention"}
PANEL, LINE = 3.3, 0.27  # inches
MARKED = "#b3005e"
CURVES = {"last subject token": MARKED, "last token": "#2b5c8a"}
VISIBLE = str.maketrans({"\n": "↵", "\r": "↵", "\t": "⇥"})


def draw_traces(results: Sequence[TraceResult], path: Path) -> None:
    """One fact, a panel for each kind: tokens down, layers across, the answer's probability."""
    from matplotlib.figure import Figure

    first = results[0]
    tokens = range(len(first.tokens))
    size = (2.2 + PANEL * len(results), 1.7 + LINE * len(tokens))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    lowest = min(first.low, *(float(result.scores.min()) for result in results))
    highest = max(first.high, *(float(result.scores.max()) for result in results))
    for axis, result in zip(axes, results, strict=True):
        image = _heat(axis, result, result.scores.T, lowest, highest)
        axis.set_xlabel("layer")
    names = [shown(first, number) for number in tokens]
    axes[0].set_yticks(tokens, names, parse_math=False)
    for label in axes[0].get_yticklabels()[slice(*first.subject)]:
        label.set(color=MARKED, weight="bold")
    bar = figure.colorbar(image, ax=axes, pad=0.015)
    bar.ax.set_ylabel(f"probability of “{first.answer.strip()}”", parse_math=False)
    for value, style in ((first.high, "-"), (first.low, ":")):
        bar.ax.axhline(value, color="black", linewidth=1.5, linestyle=style)
    prompt = (first.prompt + first.answer).translate(VISIBLE)
    numbers = f"clean run {first.high:.2f} (—), subject* hidden {first.low:.2f} (···)"
    figure.suptitle(f"{prompt}\n{numbers}", fontsize=11, parse_math=False)
    _save(figure, path)


def draw_averages(averages: Sequence[Averages], path: Path) -> None:
    """Average indirect effects by place and layer; below, two places with 95 % intervals."""
    from matplotlib.figure import Figure

    from kedit_core.numerics.causal import PLACES

    first = averages[0]
    figure = Figure(figsize=(3.0 + PANEL * len(averages), 5.6), layout="constrained")
    axes = figure.subplots(2, len(averages), sharey="row", squeeze=False)
    lowest = min(float(found.effects.nan_to_num().min()) for found in averages)
    highest = max(float(found.effects.nan_to_num().max()) for found in averages)
    for (heat, curves), found in zip(axes.T, averages, strict=True):
        image = _heat(heat, found, found.effects, lowest, highest)
        curves.axhline(0, color="0.7", linewidth=0.8)
        for place, colour in CURVES.items():
            number = PLACES.index(place)
            mean, error = found.effects[number].numpy(), found.errors[number].numpy()
            curves.plot(mean, color=colour, label=place)
            curves.fill_between(
                range(len(mean)), mean - error, mean + error, color=colour, alpha=0.2, linewidth=0
            )
        curves.set_xlim(-0.5, len(mean) - 0.5)
        curves.set_xlabel("layer")
    names = [f"{place} ({count})" for place, count in zip(PLACES, first.counts, strict=True)]
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[1, 0].set_ylabel("average indirect effect")
    axes[1, 0].legend(fontsize=8)
    figure.colorbar(image, ax=list(axes[0]), pad=0.015, label="average indirect effect")
    figure.suptitle(
        f"{max(first.counts)} facts, average total effect {first.total_effect:.2f}", fontsize=11
    )
    _save(figure, path)


def shown(result: TraceResult, token: int) -> str:
    """A token's text on one line, with a star if it is the subject's."""
    text = result.tokens[token].translate(VISIBLE).strip() or "␣"
    return text + "*" * (result.subject[0] <= token < result.subject[1])


def _heat(
    axis: Any, result: TraceResult | Averages, values: Tensor, lowest: float, highest: float
) -> Any:
    several = "" if result.kind == "block" else f", {result.window} layers about it"
    axis.set_title(TITLES[result.kind] + several, fontsize=10)
    axis.xaxis.get_major_locator().set_params(integer=True)
    return axis.imshow(
        values.numpy(),
        cmap="BuPu",
        vmin=lowest,
        vmax=highest,
        aspect="auto",
        interpolation="nearest",
    )


def _save(figure: Figure, path: Path) -> None:
    with new_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)
