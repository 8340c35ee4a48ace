"""Plots as inline SVG that follows the page: its fonts, its light or dark colours, its width.

Matplotlib draws with stand-in colours; the SVG text then refers to CSS variables of the page instead, so one drawing
serves both colour schemes. Nothing in it points outside the document.
"""

import dataclasses
import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.errors import missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Bin", "Interval", "Plot", "Series", "bar_figure", "calibration_figure", "interval_figure", "line_figure"]

SERIES_COLOURS = 4  # --c1 ... --c4 of the page
_INK, _GRID, _MUTED = "#010101", "#020202", "#030303"
_SERIES = [f"#0a0a0{index + 1}" for index in range(SERIES_COLOURS)]
_VARIABLES = {_INK: "--ink", _GRID: "--grid", _MUTED: "--muted"} | {
    colour: f"--c{index + 1}" for index, colour in enumerate(_SERIES)
}
_STYLE = {
    "axes.edgecolor": _MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": _INK,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.figsize": (5.0, 2.9),
    "font.size": 10,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "text.color": _INK,
    "xtick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "xtick.labelsize": 9,
    "xtick.major.size": 3,
    "ytick.color": _MUTED,
    "ytick.labelcolor": _INK,
    "ytick.labelsize": 9,
    "ytick.major.size": 0,
}


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a plot; points whose y is NaN are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """Lines over a common x axis, at most `SERIES_COLOURS` of them."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    note: str = ""  # what the reader should see in it


@dataclasses.dataclass(frozen=True)
class Interval:
    """A rate in [0, 1] with its 95 % interval."""

    name: str
    rate: float
    low: float
    high: float
    goal: float | None = None


@dataclasses.dataclass(frozen=True)
class Bin:
    """One bin of a reliability diagram: pairs whose predicted probability is near `predicted`."""

    predicted: float  # mean predicted probability
    observed: float  # share of pairs that went that way
    count: int  # pairs in the bin


def line_figure(plot: Plot, *, name: str) -> str:
    """SVG of lines; a noisy series of 30 points or more is drawn thin with its moving mean on top."""

    def draw(axes: "Axes") -> None:
        for index, series in enumerate(plot.series):
            colour = _SERIES[index % SERIES_COLOURS]
            x, y = _finite(series)
            window = moving_window(len(y))
            if window > 1:
                axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
                y = _moving_mean(y, window)
            axes.plot(x, y, color=colour, label=series.name, marker="o" if len(x) == 1 else None)
        if len(plot.series) > 1:
            axes.legend(loc="best", labelspacing=0.3, handlelength=1.2)
        axes.set_xlabel(plot.x_label)
        axes.set_ylabel(plot.y_label)
        axes.margins(x=0.01)

    ends = [f"{s.name} from {_number(y[0])} to {_number(y[-1])}" for s in plot.series if len(y := _finite(s)[1])]
    return _svg(draw, name=name, label=f"{plot.title} over {plot.x_label}: {'; '.join(ends) or 'no points'}.")


def interval_figure(intervals: Sequence[Interval], *, name: str, reference: float = 0.5) -> str:
    """SVG of rates as points with their 95 % intervals, one row each, beside a reference line."""

    def draw(axes: "Axes") -> None:
        rows = np.arange(len(intervals))[::-1]
        for row, interval in zip(rows, intervals, strict=True):
            ends, beside = [interval.low, interval.high], [row - 0.38, row + 0.18]  # the name stands above
            axes.plot([reference] * 2, beside, color=_MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.plot(ends, [row, row], color=_SERIES[0], linewidth=2.2, solid_capstyle="round")
            axes.plot(interval.rate, row, "o", color=_SERIES[0], markersize=7)
            said = f"{interval.name}: {_percent(interval.rate)}"
            axes.text(0.0, row + 0.22, said, va="bottom", fontsize=10)
            if interval.goal is not None:
                axes.plot([interval.goal] * 2, [row - 0.14, row + 0.14], color=_SERIES[1], linewidth=2)
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.6, len(intervals) - 0.35)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)
        axes.xaxis.set_major_formatter(lambda value, _: _percent(value))
        axes.set_xlabel("win rate")

    words = [f"{i.name} {_percent(i.rate)} ({_percent(i.low)} to {_percent(i.high)})" for i in intervals]
    label = f"Win rates with 95 % intervals: {'; '.join(words)}."
    return _svg(draw, name=name, label=label, height=0.58 * len(intervals) + 0.75)


def calibration_figure(bins: Sequence[Bin], *, name: str) -> str:
    """SVG of a reliability diagram: observed against predicted probability, the size of a point the pairs behind it."""

    def draw(axes: "Axes") -> None:
        largest = max((b.count for b in bins), default=1)
        axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.plot([b.predicted for b in bins], [b.observed for b in bins], color=_SERIES[0], linewidth=1.2)
        axes.scatter(
            [b.predicted for b in bins],
            [b.observed for b in bins],
            s=[12 + 90 * b.count / largest for b in bins],
            color=_SERIES[0],
            linewidths=0,
        )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: _percent(value))
        axes.set_xlabel("predicted")
        axes.set_ylabel("observed")

    gap = _percent(expected_calibration_error(bins), 1)
    label = f"Reliability diagram of the reward model: {len(bins)} bins, expected calibration error {gap}."
    return _svg(draw, name=name, label=label, height=3.2)


def bar_figure(values: Mapping[str, float], *, name: str, title: str, reference: float = 0.5) -> str:
    """SVG of rates in [0, 1] as horizontal bars with their values, the first in colour, beside a reference line."""

    def draw(axes: "Axes") -> None:
        rows = np.arange(len(values))[::-1]
        colours = [_SERIES[0]] + [_GRID] * (len(values) - 1)
        axes.barh(rows, list(values.values()), color=colours, height=0.36)
        for row, (label, value) in zip(rows, values.items(), strict=True):
            axes.text(0.0, row + 0.24, label, va="bottom", fontsize=10)
            axes.text(min(value, 0.9) + 0.012, row, _percent(value, 1), va="center", fontsize=10)
        axes.axvline(reference, color=_MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.4, len(values) - 0.3)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)
        axes.xaxis.set_major_formatter(lambda value, _: _percent(value))

    words = ", ".join(f"{label} {_percent(value, 1)}" for label, value in values.items())
    return _svg(draw, name=name, label=f"{title}: {words}.", height=0.6 * len(values) + 0.6)


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance between predicted and observed probability, weighted by pairs (Guo et al. 2017, eq. 3).

    >>> expected_calibration_error([Bin(0.5, 0.6, 30), Bin(0.9, 0.9, 10)])
    0.075
    """
    pairs = sum(b.count for b in bins)
    return sum(b.count * abs(b.predicted - b.observed) for b in bins) / pairs if pairs else math.nan


def moving_window(points: int) -> int:
    """How many points the thick line averages: one below 30 points, a tenth of them from there on."""
    return 1 if points < 30 else points // 10


def _moving_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Mean over the window ending at each point; shorter at the start, so that no point is invented."""
    sums = np.concatenate([[0.0], np.cumsum(y)])
    ends = np.arange(1, len(y) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _finite(series: Series) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)
    kept = np.isfinite(x) & np.isfinite(y)
    return x[kept], y[kept]


def _percent(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %" if math.isfinite(value) else "n/a"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _svg(draw: Callable[["Axes"], Any], *, name: str, label: str, height: float | None = None) -> str:
    """Draws on fresh axes and returns an `<svg>` element to stand inside an HTML page."""
    try:
        import matplotlib.style
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "quickstart", "draw the report") from error
    with matplotlib.style.context(["default", _STYLE | {"svg.hashsalt": name}]):
        figure = Figure(layout="constrained")
        FigureCanvasSVG(figure)
        if height is not None:
            figure.set_figheight(height)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_page(buffer.getvalue(), name=name, label=label)


def _for_page(svg: str, *, name: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'\bd="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path.group()).replace("\n", " "), svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    box = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg role="img" aria-label="{html.escape(label)}" {box.group(0) if box else ""}>'
    return re.sub(r"^<svg[^>]*>", lambda _: opening, svg).strip()
