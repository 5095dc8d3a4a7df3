"""Charts made from a result file and written beside it: times over length, speed over rows, quality over bytes."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from subquad.bench.results import Result, Row, load_result
from subquad.evals.figures import Chart, Point, short, standalone

OVER_LENGTH = re.compile(r"(?P<what>\w+)\.t(?P<t>\d+)")
OVER_CONTEXT = re.compile(r"context\.b(?P<b>\d+)\.t(?P<t>\d+)")
# Of a drafter: a model, how it draws, and for how many rows; also the share of its guesses that stood.
OVER_ROWS = re.compile(r"(?P<model>\w+)\.(?P<how>\w+)\.b(?P<b>\d+)(?P<what>|\.accepted)")
TITLES = {"fwd": "Forward", "fwdbwd": "Forward and backward"}
# Of a study: a run's name without what it counts, which several runs share, and a figure that stands for its quality.
OF_RUN = re.compile(r"(?P<kind>[a-z_]*[a-z])_?\d*\.(?P<what>\w+)")
QUALITIES = {"ppl_ratio": "Perplexity", "zeroshot_retention": "Tasks", "needle_retention": "Needles found"}
# Of a task that mixers learn: the run, and the step of its course.
OVER_STEPS = re.compile(r"(?P<run>[\w+]+)\.step(?P<n>\d+)")
# Of models that read more than they were trained at, in times of that length.
OVER_TIMES = re.compile(r"(?P<what>ppl|ppl_mean|passkey)\.x(?P<times>[\d.]+)")
BEYOND = {
    "ppl": ("Perplexity of the last bytes", "of a byte"),
    "ppl_mean": ("Perplexity of all bytes", "of a byte"),
    "passkey": ("Passkeys", "share found"),
}
COURSE = re.compile(r"(?P<run>\w+)\.kl\.t(?P<t>\d+)")


def plots(result: Result) -> dict[str, Chart]:
    """All charts that the rows of a result make, by their short names."""
    charts: dict[str, Chart] = {}
    for made in (_over_length, _over_context, _over_rows, _over_bytes, _over_tokens, _over_steps, _over_times):
        charts |= made(result)
    return charts


def _over_bytes(result: Result) -> dict[str, Chart]:
    """Each of `QUALITIES` over the bytes of state, where at least two kinds of runs have at least two sizes each."""
    rows = {row.id.removeprefix(f"{result.bench}."): row for row in result.rows}
    found: dict[str, dict[str, list[Point]]] = {}
    for id, row in rows.items():
        match = OF_RUN.fullmatch(id)
        size = rows.get(f"{id.partition('.')[0]}.state_bytes")
        if match is not None and match["what"] in QUALITIES and size is not None:
            found.setdefault(match["what"], {}).setdefault(match["kind"], []).append((size.value, row.value))
    charts: dict[str, Chart] = {}
    for what, kinds in found.items():
        series = {kind: sorted(points) for kind, points in kinds.items() if len(points) > 1}
        if len(series) > 1:
            title = f"{QUALITIES[what]} of {result.bench}, over the teacher's"
            sizes = sorted({x for points in series.values() for x, _ in points})
            ticks = [(x, f"{x / 2**20:.0f}") for i, x in enumerate(sizes) if i == 0 or x > 1.2 * sizes[i - 1]]
            charts[what] = Chart(title, "MiB of state", "of the teacher's", series, log_x=True, ticks=ticks)
    return charts


def _over_tokens(result: Result) -> dict[str, Chart]:
    """The KL of every run over the tokens that it was trained on."""
    series: dict[str, list[Point]] = {}
    for row in result.rows:
        match = COURSE.fullmatch(row.id.removeprefix(f"{result.bench}."))
        if match is not None:
            series.setdefault(match["run"], []).append((float(match["t"]), row.value))
    title = f"KL to the teacher in {result.bench}"
    return {"kl": Chart(title, "tokens", "nats a token", series, log_y=True)} if series else {}


def _over_steps(result: Result) -> dict[str, Chart]:
    """The accuracy of every run over its steps and over its minutes, and that of always the commonest answer."""
    rows = {row.id.removeprefix(f"{result.bench}."): row for row in result.rows}
    over: dict[str, dict[str, list[Point]]] = {"steps": {}, "minutes": {}}
    for id, row in rows.items():
        match = OVER_STEPS.fullmatch(id)
        if match is not None:
            over["steps"].setdefault(match["run"], []).append((float(match["n"]), row.value))
            if "minutes" in row.shape:
                over["minutes"].setdefault(match["run"], []).append((row.shape["minutes"], row.value))
    charts: dict[str, Chart] = {}
    for unit, series in over.items():
        most = max((x for points in series.values() for x, _ in points), default=0.0)
        for run in list(series):
            row = rows.get(run)
            if row is not None and row.baseline_value is not None:
                series.setdefault("commonest", [(0.0, row.baseline_value), (most, row.baseline_value)])
        if series:
            name = "accuracy" if unit == "steps" else "accuracy_over_minutes"
            charts[name] = Chart(f"Held-out accuracy in {result.bench}", unit, "share right", series)
    return charts


def _over_times(result: Result) -> dict[str, Chart]:
    """Each of `BEYOND` over the length that was read, in times of the training's."""
    found: dict[str, dict[str, list[Point]]] = {}
    for row in result.rows:
        match = OVER_TIMES.fullmatch(row.id.removeprefix(f"{result.bench}."))
        if match is not None and row.baseline_value is not None:
            for name, y in ((row.baseline, row.baseline_value), (result.bench, row.value)):
                found.setdefault(match["what"], {}).setdefault(name, []).append((float(match["times"]), y))
    charts: dict[str, Chart] = {}
    for what, series in found.items():
        ticks = [(x, f"{x:g}") for x, _ in series[result.bench]]
        title = f"{BEYOND[what][0]} beyond the training's length, on {result.env['device']}"
        charts[what] = Chart(title, "times the training's length", BEYOND[what][1], series, log_x=True, ticks=ticks)
    return charts


def _over_length(result: Result) -> dict[str, Chart]:
    """A chart for each of `TITLES` that was measured at several lengths: ours, every baseline, and the limit.

    A baseline may stand in a row of its own, ``fwd_<baseline>.t<T>``.
    """
    found: dict[str, dict[str, list[Point]]] = {}
    for row in result.rows:
        match = OVER_LENGTH.fullmatch(row.id.removeprefix(f"{result.bench}."))
        if match is None or row.unit != "ms":
            continue
        what, t = match["what"].partition("_")[0], float(match["t"])
        if what in TITLES:
            for name, ms in _points(row):
                points = found.setdefault(what, {}).setdefault(name, [])
                if all(x != t for x, _ in points):
                    points.append((t, ms))
    charts: dict[str, Chart] = {}
    for what, series in found.items():
        lengths = sorted({x for points in series.values() for x, _ in points})
        if len(lengths) > 1:
            # A baseline at one length only is in the table.
            series = {name: sorted(points) for name, points in series.items() if len(points) > 1}
            title = f"{TITLES[what]} of {result.bench} on {result.env['device']}, {result.env['dtype']}"
            ticks = [(t, short(t)) for t in lengths]
            charts[what] = Chart(title, "tokens", "ms", series, log_x=True, log_y=True, ticks=ticks)
    return charts


def _over_context(result: Result) -> dict[str, Chart]:
    """Tokens a second over the context, a chart for each number of rows measured at several contexts."""
    found: dict[str, dict[str, list[Point]]] = {}
    for row in result.rows:
        match = OVER_CONTEXT.fullmatch(row.id.removeprefix(f"{result.bench}."))
        if match is not None:
            for name, rate in _points(row):
                found.setdefault(match["b"], {}).setdefault(name, []).append((float(match["t"]), rate))
    charts: dict[str, Chart] = {}
    for b, series in found.items():
        series = {name: sorted(points) for name, points in series.items() if len(points) > 1}
        if series:
            title = f"Decoding of {result.bench}, batch {b}, on {result.env['device']}, {result.env['dtype']}"
            ticks = [(t, short(t)) for t in sorted({x for points in series.values() for x, _ in points})]
            charts[f"context_b{b}"] = Chart(title, "tokens of context", "tokens/s", series, log_x=True, ticks=ticks)
    return charts


def _over_rows(result: Result) -> dict[str, Chart]:
    """Of a drafter measured at several batches: speed over plain decoding, and the share of guesses that stood."""
    found: dict[str, dict[str, list[Point]]] = {"speedup": {}, "accepted": {}}
    for row in result.rows:
        match = OVER_ROWS.fullmatch(row.id.removeprefix(f"{result.bench}."))
        y = None if match is None else row.value if match["what"] else row.ratio
        if match is not None and y is not None:
            series = found["accepted" if match["what"] else "speedup"]
            series.setdefault(f"{match['model']}, {match['how']}", []).append((float(match["b"]), y))
    charts: dict[str, Chart] = {}
    labels = {"speedup": "times plain decoding", "accepted": "share of guesses that stood"}
    for what, series in found.items():
        series = {name: sorted(points) for name, points in series.items() if len(points) > 1}
        if series:
            title = f"{result.bench} on {result.env['device']}, {result.env['dtype']}"
            ticks = [(b, f"{b:g}") for b in sorted({x for points in series.values() for x, _ in points})]
            charts[what] = Chart(title, "rows", labels[what], series, log_x=True, ticks=ticks)
    return charts


def refresh_plots(path: Path, *, write: bool = True) -> list[Path]:
    """Draw the charts of the result file `path` as ``<name>.<what>.svg`` beside it.

    Args:
        path: a result file.
        write: draw those that are missing or show other figures; otherwise only name them.

    Returns:
        The pictures that were missing or showed other figures.
    """
    stale: list[Path] = []
    for what, chart in plots(load_result(path)).items():
        target = path.with_suffix(f".{what}.svg")
        # A picture says its figures in words, for those who can't see it.
        if target.exists() and escape(chart.description(), quote=True) in target.read_text(encoding="utf-8"):
            continue
        stale.append(target)
        if write:
            target.write_text(standalone(chart, what), encoding="utf-8")
    return stale


def _points(row: Row) -> list[tuple[str, float]]:
    points: list[tuple[str, float]] = []
    if row.limit_share is not None:
        points.append(("limit", row.value * row.limit_share))
    points.append(("subquad", row.value))
    if row.baseline_value is not None:
        points.append((row.baseline, row.baseline_value))
    return points
