"""Charts as inline SVG that takes its colours from the page, so that they follow light, dark and print."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

Point = tuple[float, float]

# matplotlib needs real colours: these stand for the page's variables, which replace them in the SVG.
STANDINS = {
    "#000001": "var(--text)",
    "#000002": "var(--muted)",
    "#000003": "var(--line)",
    **{f"#00010{i}": f"var(--series-{i})" for i in range(5)},
}
TEXT, MUTED, LINE, *SERIES = STANDINS
# A series differs from the others by more than its colour.
DASHES = ("-", "-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")

# A picture of its own has no page to take its colours from.
STYLE = """<style>
:root { --text: #1b1f24; --muted: #59636e; --line: #d5dae0; font-family: system-ui, sans-serif;
  --series-0: #59636e; --series-1: #1f6feb; --series-2: #c2410c; --series-3: #15803d; --series-4: #8b3fd1; }
@media (prefers-color-scheme: dark) { :root { --text: #e6eaef; --muted: #a3adb8; --line: #38414b;
  --series-0: #a3adb8; --series-1: #58a6ff; --series-2: #fb923c; --series-3: #4ade80; --series-4: #c792f5; } }
</style>"""


@dataclass(frozen=True)
class Chart:
    """Series over one axis.

    Attributes:
        title: what is shown.
        x_label, y_label: of the axes, with units.
        series: name to points, in the order of the legend; the teacher first.
        kind: ``line`` or ``bar``; bars at one x stand side by side.
        log_x, log_y: logarithmic axes.
        ticks: x values to name, with their names; empty leaves the choice to the chart.
        note: a sentence under the chart.
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[Point]]
    kind: str = "line"
    log_x: bool = False
    log_y: bool = False
    ticks: Sequence[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    note: str = ""

    def description(self) -> str:
        """The chart in words, for those who can't see it."""
        parts: list[str] = []
        for name, points in self.series.items():
            ys = [y for _, y in points]
            (x0, y0), (x1, y1) = points[0], points[-1]
            parts.append(
                f"{name}: {y0:.4g} at {x0:.6g}, {y1:.4g} at {x1:.6g}, lowest {min(ys):.4g}, highest {max(ys):.4g}"
            )
        shape = "Bar" if self.kind == "bar" else "Line"
        return f"{shape} chart, {self.title}: {self.y_label} over {self.x_label}. {'; '.join(parts)}."


def short(n: float, digits: int = 3) -> str:
    """A count as people write it, with so many digits: 900, 1k for 1,024, 2.5M."""
    if n >= 1024 and n % 1024 == 0 and n < 2**20:
        return f"{n / 1024:g}k"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.{digits}g}{unit}"
    return f"{n:.{digits}g}"


def _names(axis: Any) -> Callable[[float, int | None], str]:
    """Names of an axis's ticks, with as many digits as tell them apart."""

    def name(value: float, _: int | None) -> str:
        ticks = axis.get_majorticklocs()
        digits = next((d for d in range(3, 9) if len({short(x, d) for x in ticks}) == len(ticks)), 3)
        return short(value, digits)

    return name


def draw(chart: Chart) -> Any:
    """The chart as a matplotlib figure, in stand-in colours."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    places = [x for points in chart.series.values() for x, _ in points]
    # Series that never meet need no room beside each other.
    abreast = 1 if len(set(places)) == len(places) else len(chart.series)
    # A lone series is no teacher: it takes the colour of the student.
    for i, (name, points) in enumerate(chart.series.items(), start=int(len(chart.series) == 1)):
        xs, ys = [x for x, _ in points], [y for _, y in points]
        colour = SERIES[i % len(SERIES)]
        if chart.kind == "bar":
            width = 0.8 / abreast
            xs = [x + width * (i % abreast - (abreast - 1) / 2) for x in xs]
            axes.bar(xs, ys, width * 0.92, color=colour, label=name)
        else:
            # With more series than colours, a colour that comes again has another marker and dash.
            style = i + 2 * (i // len(SERIES))
            marker = MARKERS[style % len(MARKERS)] if len(points) <= 16 else ""
            dash = DASHES[style % len(DASHES)]
            axes.plot(xs, ys, color=colour, linestyle=dash, linewidth=1.8, marker=marker, markersize=5, label=name)
    if chart.log_x:
        axes.set_xscale("log")
    if chart.log_y:
        axes.set_yscale("log")
    for axis, logarithmic in ((axes.xaxis, chart.log_x), (axes.yaxis, chart.log_y)):
        axis.set_major_formatter(FuncFormatter(_names(axis)))
        if logarithmic:
            _few_decades(axis, LogLocator, NullFormatter)
    if chart.ticks:
        axes.set_xticks([x for x, _ in chart.ticks], [name for _, name in chart.ticks], minor=False)
        axes.set_xticks([], minor=True)
    axes.set_xlabel(chart.x_label, color=TEXT)
    axes.set_ylabel(chart.y_label, color=TEXT)
    axes.tick_params(which="both", colors=MUTED, length=3)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("bottom", "left"))
        spine.set_color(LINE)
    if len(chart.series) > 1:
        figure.legend(
            loc="outside upper left", ncols=min(4, len(chart.series)), frameon=False, labelcolor=TEXT, fontsize=10
        )
    return figure


def _few_decades(axis: Any, locator: Any, no_names: Any) -> None:
    """Name 1, 2 and 5 of each decade where fewer than two decades are shown, else the decades."""
    low, high = axis.get_view_interval()
    narrow = low > 0 and math.log10(high / low) < 2
    axis.set_major_locator(locator(subs=(1, 2, 5) if narrow else (1,)))
    axis.set_minor_formatter(no_names())


def svg(chart: Chart, key: str) -> str:
    """The chart as an ``<svg>`` element for a page that defines ``--text``, ``--muted``, ``--line`` and ``--series-i``.

    Args:
        chart: what to draw.
        key: set before every id, so that several charts share a page.
    """
    from html import escape

    from matplotlib import rc_context

    out = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.family": "sans-serif"}):
        draw(chart).savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for standin, variable in STANDINS.items():
        text = text.replace(standin, variable)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'href="#', f'href="#{key}-', text)
    text = text.replace("url(#", f"url(#{key}-")
    # The page's own font and width rule.
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(chart.description(), quote=True)}"', 1)


def standalone(chart: Chart, name: str) -> str:
    """The chart as an SVG file of its own, with its colours in it."""
    head, tag, rest = svg(chart, name).partition(">")
    return f"{head}{tag}\n{STYLE}{rest}"
