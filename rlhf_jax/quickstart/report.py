"""The report of a run: one HTML file that explains itself, opens anywhere and asks nothing of the network.

`Report` is plain data; `write_report` turns it into a page. The page follows the reader's light or dark scheme, reads
on a phone, says in words what its plots show, and holds their numbers in tables.
"""

import base64
import dataclasses
import html
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.quickstart import figures
from rlhf_jax.quickstart.figures import Bin, Interval, Plot, Series

__all__ = ["Bin", "Clip", "Interval", "Plot", "Report", "Result", "Sample", "Series", "StageTime", "write_report"]


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the result table; values are ready to read."""

    name: str
    value: str  # for instance "81.3 %"
    interval: str = ""  # for instance "76.0 to 85.9 %"
    goal: str = ""  # for instance ">= 75 %"
    met: bool | None = None  # None where there is no goal


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prefix with its continuation before and after training, and the judge's scores."""

    prefix: str
    before: str
    after: str
    before_score: float | None = None
    after_score: float | None = None


@dataclasses.dataclass(frozen=True)
class StageTime:
    """How long a stage took."""

    name: str
    seconds: float
    detail: str = ""  # for instance "120 steps"


@dataclasses.dataclass(frozen=True)
class Clip:
    """A moving picture."""

    name: str  # for instance "CartPole, before"
    gif: bytes
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a report shows. Empty parts are left out of the page."""

    title: str
    summary: str = ""  # one or two sentences: what was done and what came out
    results: Sequence[Result] = ()
    plots: Sequence[Plot] = ()  # reward, KL, losses ... over training
    win_rates: Sequence[Interval] = ()
    calibration: Sequence[Bin] = ()
    accuracies: Mapping[str, float] = dataclasses.field(default_factory=dict)  # the reward model first, then baselines
    samples: Sequence[Sample] = ()
    clips: Sequence[Clip] = ()
    stages: Sequence[StageTime] = ()  # never added up: one may be a part of another, or run beside it
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # nested mappings are flattened
    notes: Sequence[str] = ()  # limits, licences, how to resume


def write_report(path: str | Path, report: Report) -> Path:
    """Writes the page under a temporary name and renames it, so that a reader never sees half of it.

    Args:
      path: the file, usually ``RUN/report.html``; its folder is created.
      report: what to show.
    Returns:
      The path written.
    Raises:
      UserError: the file cannot be written, or matplotlib is not installed.
    """
    path = Path(path)
    page = render(report)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"The report cannot be written to {path}: {error.strerror or error}.") from error
    finally:
        if temporary.exists():
            temporary.unlink()
    return path


def render(report: Report) -> str:
    """The page as a string; the same report gives the same bytes."""
    sections = [
        _section("Results", _results(report.results), wide=True) if report.results else "",
        _section("Win rate", _win_rates(report.win_rates)) if report.win_rates else "",
        *(_section(plot.title, _plot(plot, f"plot{index}")) for index, plot in enumerate(report.plots)),
        _section("Reward model against baselines", _accuracies(report.accuracies)) if report.accuracies else "",
        _section("Reward model calibration", _calibration(report.calibration)) if report.calibration else "",
        _section("Before and after", _samples(report.samples), wide=True) if report.samples else "",
        *(_section(clip.name, _clip(clip)) for clip in report.clips),
        _section("Time per stage", _stages(report.stages)) if report.stages else "",
        _section("Configuration", _config(report.config)) if report.config else "",
        _section("Notes", _notes(report.notes), wide=True) if report.notes else "",
    ]
    summary = f"<p class='summary'>{_text(report.summary)}</p>" if report.summary else ""
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        "<meta name='color-scheme' content='light dark'>\n"
        f"<title>{_text(report.title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f"<header><h1>{_text(report.title)}</h1>{summary}</header>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


# --- parts ------------------------------------------------------------------------------------------------------------


def _section(title: str, body: str, *, wide: bool = False) -> str:
    return f"<section{' class=wide' if wide else ''}><h2>{_text(title)}</h2>{body}</section>"


def _results(results: Sequence[Result]) -> str:
    goals = any(result.goal for result in results)
    rows = []
    for result in results:
        row = [_text(result.name), f"<strong>{_text(result.value)}</strong>", _text(result.interval)]
        rows.append([*row, _text(result.goal), _verdict(result.met)] if goals else row)
    titles = ["", "measured", "95 % interval", "goal", ""] if goals else ["", "measured", "95 % interval"]
    return _table(titles, rows, kind="results")


def _verdict(met: bool | None) -> str:
    if met is None:
        return ""
    return "<span class='met'>&#10003; met</span>" if met else "<span class='missed'>&#10007; missed</span>"


def _win_rates(intervals: Sequence[Interval]) -> str:
    figure = figures.interval_figure(intervals, name="wins")
    goals = any(i.goal is not None for i in intervals)
    rows = [[_text(i.name), *map(_percent, (i.rate, i.low, i.high)), _percent(i.goal)] for i in intervals]
    titles = ["", "win rate", "from", "to", "goal"]
    if not goals:
        titles, rows = titles[:-1], [row[:-1] for row in rows]
    caption = "Points are win rates, bars their 95 % intervals; the dashed line is a coin toss."
    caption += " An upright mark is the goal." if goals else ""
    return _figure(figure, caption, titles, rows)


def _plot(plot: Plot, name: str) -> str:
    longest = max((len(series.y) for series in plot.series), default=0)
    window = figures.moving_window(longest)
    caption = plot.note + (f" The thick line is the mean of the last {window} points." if window > 1 else "")
    shown = _spread({x for series in plot.series for x in series.x})
    values = [dict(zip(series.x, series.y, strict=True)) for series in plot.series]
    rows = [[f"{x:g}", *(_number(value.get(x)) for value in values)] for x in shown]
    titles = [_text(plot.x_label), *(_text(series.name) for series in plot.series)]
    return _figure(figures.line_figure(plot, name=name), caption.strip(), titles, rows)


def _accuracies(accuracies: Mapping[str, float]) -> str:
    figure = figures.bar_figure(accuracies, name="accuracy", title="Accuracy on held-out pairs")
    rows = [[_text(name), _percent(value, 2)] for name, value in accuracies.items()]
    return _figure(
        figure, "Share of held-out pairs put in the order that people gave them.", ["", "pair accuracy"], rows
    )


def _calibration(bins: Sequence[Bin]) -> str:
    error = figures.expected_calibration_error(bins)
    rows = [[_percent(b.predicted, 1), _percent(b.observed, 1), f"{b.count:,}"] for b in bins]
    caption = (
        "How often the text that the reward model preferred with a given probability was preferred by people. "
        "Larger points stand for more pairs; the dashed line is perfect calibration. "
        f"Expected calibration error {_percent(error, 1)}."
    )
    figure = figures.calibration_figure(bins, name="calibration")
    return _figure(figure, caption, ["predicted", "observed", "pairs"], rows)


def _samples(samples: Sequence[Sample]) -> str:
    def continuation(text: str, score: float | None) -> str:
        judged = "" if score is None else f"<span class='score'>judge {_number(score)}</span>"
        return f"<div class='text'>{_text(text.strip(' '))}</div>{judged}"

    rows = [
        [
            f"<div class='text'>{_text(sample.prefix)}</div>",
            continuation(sample.before, sample.before_score),
            continuation(sample.after, sample.after_score),
        ]
        for sample in samples
    ]
    return _table(["prefix", "before", "after"], rows, kind="samples")


def _clip(clip: Clip) -> str:
    data = base64.b64encode(clip.gif).decode("ascii")
    picture = f"<img alt='{_text(clip.name)}' src='data:image/gif;base64,{data}' style='width:100%;max-width:20rem'>"
    return f"<figure>{picture}<figcaption>{_text(clip.note)}</figcaption></figure>"


def _stages(stages: Sequence[StageTime]) -> str:
    longest = max(stage.seconds for stage in stages) or 1.0
    rows = [
        [
            _text(stage.name) + (f" <small>{_text(stage.detail)}</small>" if stage.detail else ""),
            duration(stage.seconds),
            f"<span class='share' style='width:{100 * stage.seconds / longest:.1f}%'></span>",
        ]
        for stage in stages
    ]
    return _table(["stage", "time", ""], rows, kind="stages")


def _config(config: Mapping[str, Any]) -> str:
    rows = [[f"<code>{_text(name)}</code>", f"<code>{_text(value)}</code>"] for name, value in _flat(config)]
    return f"<details><summary>{len(rows)} settings</summary>{_table(['setting', 'value'], rows)}</details>"


def _notes(notes: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(note)}</li>" for note in notes) + "</ul>"


# --- pieces -----------------------------------------------------------------------------------------------------------


def _figure(svg: str, caption: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    numbers = f"<details><summary>numbers</summary>{_table(titles, rows)}</details>"
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>{numbers}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "plain") -> str:
    """A table of cells that are HTML already; on a narrow screen each cell is labelled with its column's title."""
    head = "".join(f"<th scope='col'>{title}</th>" if title else "<td></td>" for title in titles)
    body = "".join(
        "<tr>" + "".join(_cell(titles[index], cell, index) for index, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f"<table class='{kind}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(title: str, cell: str, index: int) -> str:
    label = f" data-title='{title}'" if title and cell else ""
    return f"<td{label}>{cell}</td>" if index else f"<th scope='row'{label}>{cell}</th>"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def printable(text: str) -> str:
    """The text with control characters replaced, so that what a model writes cannot drive a terminal.

    >>> printable("good\\x1b[31m\\nbad")
    'good�[31m\\nbad'
    """
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _text(value: Any) -> str:
    """Escaped for HTML; percent signs stay with their numbers."""
    return html.escape(re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", printable(str(value))), quote=True)


def _percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %" if math.isfinite(value) else "n/a"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if math.isfinite(value) else "n/a"


def _spread(values: Iterable[float], most: int = 12) -> list[float]:
    """At most `most` of the values, evenly spread, first and last among them."""
    ordered = sorted(values)
    if len(ordered) <= most:
        return ordered
    return [ordered[round(index * (len(ordered) - 1) / (most - 1))] for index in range(most)]


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(4.21), duration(75), duration(3725)
    ('4.2 s', '1 min 15 s', '1 h 2 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


_CSS = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #ffffff; --ink: #1c1e21; --soft: #5b6068; --muted: #8a9099;
  --grid: #dcdfe3; --c1: #1f66b1; --c2: #b9501a; --c3: #257a55; --c4: #87479c; --met: #1d6f47; --missed: #a3341f; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --card: #1e2125; --ink: #e7e9ec; --soft: #a5acb5; --muted: #7d858f; --grid: #383d44;
    --c1: #6fb0f2; --c2: #f29a63; --c3: #62c79b; --c4: #cb97e0; --met: #6fd09f; --missed: #f28f7a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 3rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.05rem; margin: 0 0 .7rem; }
.summary { color: var(--soft); margin: 0 0 1.4rem; max-width: 46rem; }
main { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; align-items: start; }
section { background: var(--card); border: 1px solid var(--grid); border-radius: .6rem; padding: 1rem 1.1rem;
  min-width: 0; }
.wide { grid-column: 1 / -1; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; font-family: inherit; stroke-linejoin: round; }
figcaption { color: var(--soft); font-size: .875rem; margin-top: .5rem; }
details { margin-top: .6rem; font-size: .9rem; }
summary { cursor: pointer; color: var(--soft); }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .4rem .7rem .4rem 0; border-bottom: 1px solid var(--grid);
  font-weight: normal; overflow-wrap: anywhere; }
thead th { color: var(--soft); font-size: .85rem; }
tbody tr:last-child > * { border-bottom: 0; }
.met { color: var(--met); white-space: nowrap; }
.missed { color: var(--missed); white-space: nowrap; font-weight: 600; }
.results tr > :nth-child(2) { white-space: nowrap; }
.samples { table-layout: fixed; }
.samples th[scope=row] { color: var(--soft); }
.text { white-space: pre-wrap; }
.score, small { color: var(--soft); font-size: .85rem; }
.stages td:nth-child(2) { white-space: nowrap; } .stages td:nth-child(3), .stages thead th:nth-child(3) { width: 40%; }
.share { display: inline-block; height: .6rem; border-radius: .2rem; background: var(--c1); min-width: 2px; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: .85em; }
ul { margin: 0; padding-left: 1.2rem; }
@media (max-width: 44rem) {
  body { padding: 1rem .6rem 2rem; } section { padding: .9rem .8rem; }
  figure svg text { font-size: 12px !important; }
  main { grid-template-columns: minmax(0, 1fr); }
  .results thead, .samples thead { position: absolute; clip-path: inset(50%); width: 1px; height: 1px;
    overflow: hidden; }
  .results tr, .samples tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--grid); }
  .results tr:last-child, .samples tr:last-child { border-bottom: 0; }
  .results td, .results th, .samples td, .samples th { display: block; border: 0; padding: .1rem 0; }
  .results td:empty { display: none; }
  .results td[data-title]::before, .samples [data-title]::before { content: attr(data-title) ": "; color: var(--soft);
    font-size: .85rem; font-weight: normal; }
  .samples [data-title]::before { display: block; content: attr(data-title); }
  .results th[scope=row] { font-weight: 600; } }
@media print { body { background: none; } section { break-inside: avoid; } }
"""
