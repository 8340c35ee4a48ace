"""report.py and figures.py: a page that is whole, true to its data, safe, self-contained and readable by everybody."""

import dataclasses
import html.parser
import math
import re
import sys

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.quickstart import figures
from rlhf_jax.quickstart.report import (
    Bin,
    Clip,
    Interval,
    Plot,
    Report,
    Result,
    Sample,
    Series,
    StageTime,
    duration,
    render,
    write_report,
)

HOSTILE = "<script>alert('x')</script> & \"quoted\" \x1b[31m\x07"
STEPS = list(range(1, 61))
STUDENT = Series("student", [1, 2, 3], [0.5, math.nan, 0.75])
REPORT = Report(
    title="Learning from ratings",
    summary="AC-HF wins 81 % of comparisons.",
    results=[
        Result("AC-HF against base", "81.3 %", "76.0 to 85.9 %", "≥ 75 %", True),
        Result("distinct-2", "55 %", goal="≥ 60 %", met=False),
        Result("pairs", "1,234"),
    ],
    plots=[
        Plot(
            title="Reward",
            x_label="update",
            y_label="mean reward",
            series=[Series("actor", STEPS, [s / 60 for s in STEPS]), STUDENT],
            note="Higher is better.",
        ),
        Plot(title="KL", x_label="update", y_label="nats", series=[Series("KL", [1, 2], [0.0, 4.25])]),
    ],
    win_rates=[Interval("judge", 0.813, 0.76, 0.859, 0.75), Interval("lexicon", 0.95, 0.9, 0.98)],
    calibration=[Bin(0.25, 0.35, 100), Bin(0.75, 0.71, 300)],
    accuracies={"reward model": 0.7142, "longer wins": 0.531},
    samples=[Sample("The battery", HOSTILE, " lasts all day", -0.5, 1.25), Sample("I think", "a\nb", "c")],
    stages=[StageTime("Reward model", 75.2, "200 steps"), StageTime("Judging", 3725.0)],
    config={"seed": 7, "actor": {"clip": 0.2, "name": HOSTILE}},
    notes=["Resume with: rlhf-jax quickstart --resume"],
)
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(html.parser.HTMLParser):
    """Checks nesting while it collects elements, ids and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self):
        return re.sub(r"\s+", " ", " ".join(self.text).replace("\N{NO-BREAK SPACE}", " "))


@pytest.fixture(scope="module")
def text():
    return render(REPORT)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.mark.parametrize(
    "words",
    [
        "Learning from ratings",
        "AC-HF wins 81 % of comparisons.",
        "81.3 % 76.0 to 85.9 % ≥ 75 % ✓ met",
        "✗ missed",
        "Higher is better. The thick line is the mean of the last 6 points.",
        "judge 81.3 % 76.0 % 85.9 % 75.0 %",
        "reward model 71.42 %",
        "25.0 % 35.0 % 100",
        "Expected calibration error 5.5 %",
        "lasts all day judge 1.25",
        "Reward model 200 steps 1 min 15 s",
        "Judging 1 h 2 min",
        "seed 7",
        "actor.clip 0.2",
        "rlhf-jax quickstart --resume",
    ],
)
def test_the_page_says_what_the_report_holds(page, words):
    assert words in page.words


def test_it_asks_nothing_of_the_network_and_runs_nothing(text, page):
    assert not re.search(r"https?:|//[a-z]|@import|data:|src=", text)
    assert not {"script", "link", "iframe", "img", "object", "embed"} & {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all(attributes["href"].startswith("#") for _, attributes in page.elements if "href" in attributes)


def test_samples_and_settings_are_escaped_and_unprintable_characters_replaced(text, page):
    assert "<script" not in text
    assert "\x1b" not in text
    assert "\x07" not in text
    assert page.words.count("<script>alert('x')</script> & \"quoted\" �[31m�") == 2


def test_every_plot_has_words_for_those_who_cannot_see_it(page):
    plots = page.all("svg")
    assert len(plots) == 5
    assert all(plot["role"] == "img" for plot in plots)
    labels = "\n".join(plot["aria-label"] for plot in plots)
    assert "Reward over update: actor from 0.0167 to 1; student from 0.5 to 0.75." in labels
    assert "judge 81 % (76 % to 86 %)" in labels
    assert "2 bins, expected calibration error 5.5 %" in labels
    assert "reward model 71.4 %, longer wins 53.1 %" in labels
    assert len(page.all("figcaption")) == 5


def test_references_inside_the_page_are_unique_and_resolve(text, page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]*)\)", text)) | {a["href"][1:] for _, a in page.elements if "href" in a}
    assert used
    assert used <= set(ids)


def test_it_follows_light_and_dark_and_small_screens(text, page):
    assert "prefers-color-scheme: dark" in text
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}", drawings)  # every colour is one of the page's
    assert "font-family" not in drawings
    declared = set(re.findall(r"(--\w+):", text))
    assert set(re.findall(r"var\((--\w+)\)", text)) <= declared
    dark = text[text.index("prefers-color-scheme: dark") :].split("} }")[0]
    assert set(re.findall(r"(--\w+):", dark)) == declared


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_the_background(text, scheme):
    """WCAG 2.2: 4.5 for text, 3 for what a plot shows."""
    blocks = re.findall(r":root \{([^}]*)\}", text)
    colours = dict(re.findall(r"(--\w+): (#[0-9a-f]{6})", blocks[scheme]))
    for name in ("--ink", "--soft", "--met", "--missed"):
        assert min(contrast(colours[name], colours[ground]) for ground in ("--card", "--page")) >= 4.5, name
    for index in range(figures.SERIES_COLOURS):
        assert contrast(colours[f"--c{index + 1}"], colours["--card"]) >= 3


def test_the_same_report_gives_the_same_bytes(text):
    assert render(dataclasses.replace(REPORT)) == text


def test_empty_parts_are_left_out():
    page = Page(render(Report(title="Nothing yet")))
    assert not page.all("section")
    assert not page.all("svg")
    assert "<p" not in render(Report(title="Nothing yet"))
    whole = dataclasses.replace(REPORT, clips=[Clip("before", b"GIF89a")])
    for field in dataclasses.fields(Report):
        if field.name not in ("title", "summary"):
            one = Report(title="t", **{field.name: getattr(whole, field.name)})
            assert len(Page(render(one)).all("section")) == (2 if field.name == "plots" else 1), field.name


def test_goals_are_shown_only_where_there_are_any():
    page = Page(render(Report(title="t", results=[Result("a", "1")], win_rates=[Interval("b", 0.5, 0.4, 0.6)])))
    assert "goal" not in page.words


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, math.nan], [0.5], [0.5, 0.5]])
def test_plots_of_nothing_and_of_what_is_not_finite(values):
    plot = Plot(title="Loss", x_label="step", y_label="nats", series=[Series("loss", range(len(values)), values)])
    page = Page(render(Report(title="t", plots=[plot], win_rates=[Interval("w", math.nan, math.nan, math.nan)])))
    finite = [v for v in values if math.isfinite(v)]
    assert ("no points" in page.all("svg")[1]["aria-label"]) == (not finite)
    assert "n/a" in page.words


def test_tables_of_long_plots_are_thinned_to_their_first_and_last():
    plot = Plot(title="t", x_label="step", y_label="y", series=[Series("y", range(1000), [i / 8 for i in range(1000)])])
    page = Page(render(Report(title="t", plots=[plot])))
    assert len(page.all("tr")) == 13
    assert "0 0 91 11.38" in page.words
    assert "999 124.9" in page.words


def test_calibration_error_is_the_weighted_gap():
    assert figures.expected_calibration_error(REPORT.calibration) == pytest.approx((100 * 0.1 + 300 * 0.04) / 400)
    assert math.isnan(figures.expected_calibration_error([]))


@pytest.mark.parametrize("points", [1, 29, 30, 200])
def test_moving_mean_equals_a_loop(points):
    y = [math.sin(i) for i in range(points)]
    window = figures.moving_window(points)
    assert window == (1 if points < 30 else points // 10)
    expected = [sum(y[max(0, i - window + 1) : i + 1]) / len(y[max(0, i - window + 1) : i + 1]) for i in range(points)]
    assert figures._moving_mean(y, window).tolist() == pytest.approx(expected)


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = write_report(tmp_path / "run" / "report.html", REPORT)
    before = path.read_text(encoding="utf-8")
    assert before == render(REPORT)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(UserError, match=r"report.html: No space left on device"):
        write_report(path, Report(title="Another"))
    assert path.read_text(encoding="utf-8") == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_missing_matplotlib_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(UserError, match=r"`matplotlib` is needed to draw the report: pip install 'rlhf_jax\[quick"):
        render(REPORT)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0.0 s"), (59.9, "59.9 s"), (59.97, "1 min 0 s"), (7261, "2 h 1 min")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words
