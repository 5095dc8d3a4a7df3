"""``report.html``: one file that stands alone, with figures, tables, answers, settings and the command to repeat it.

A report is what it is given: a part that was not measured is not passed, and does not appear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from subquad.evals.figures import Chart, Point, short, svg
from subquad.evals.needle import NeedleResult
from subquad.evals.perplexity import Perplexity
from subquad.train.checkpoint import write_atomically

STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Table:
    """Cells of text or numbers under named columns; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]
    note: str = ""


@dataclass(frozen=True)
class HeatMap:
    """Shares from 0 to 1 in a grid."""

    title: str
    row_label: str
    column_label: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    note: str = ""


@dataclass(frozen=True)
class Answers:
    """One prompt and what each model said."""

    prompt: str
    answers: Mapping[str, str]


@dataclass(frozen=True)
class Said:
    """One answer of a dialogue.

    Attributes:
        text: of the answer.
        remark: such as its length, shown above it.
        parts_at: characters before it first differs from the answer it is held against, or None where it doesn't.
    """

    text: str
    remark: str = ""
    parts_at: int | None = None


@dataclass(frozen=True)
class Dialogue:
    """What was asked, turn by turn, and each model's answer, side by side."""

    turns: Sequence[tuple[str, Mapping[str, Said]]]


Part = Chart | Table | HeatMap | Answers | Dialogue


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two, and parts in order."""

    title: str
    parts: Sequence[Part]
    text: str = ""


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    Attributes:
        title: of the page.
        summary: what was done and found, in a sentence or two.
        command: what to type to get it again.
        headline: the few figures that matter: name, value as shown, and a remark.
        sections: in order.
        settings: every setting of the run, nested as it is.
    """

    title: str
    summary: str
    command: str
    headline: Sequence[tuple[str, str, str]] = ()
    sections: Sequence[Section] = ()
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


def write_report(report: Report, path: str | Path) -> None:
    """Write the page; an older one stays until the new one is whole."""
    page = render(report).encode()
    write_atomically(Path(path), lambda file: file.write(page))


def render(report: Report) -> str:
    """The page as HTML."""
    charts = 0
    body: list[str] = []
    for section in report.sections:
        parts: list[str] = []
        for part in section.parts:
            if isinstance(part, Chart):
                charts += 1
                parts.append(_chart(part, f"chart{charts}"))
            else:
                parts.append(_RENDER[type(part)](part))
        text = f"<p>{escape(section.text)}</p>" if section.text else ""
        body.append(f"<section><h2>{escape(section.title)}</h2>{text}<div class=parts>{''.join(parts)}</div></section>")
    if report.settings:
        rows = "".join(
            f"<tr><th scope=row>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in _flat(report.settings)
        )
        body.append(f"<section><h2>Settings</h2><table class=settings><tbody>{rows}</tbody></table></section>")
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd><strong>{escape(value)}</strong><span>{escape(remark)}</span></dd></div>"
        for name, value, remark in report.headline
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(report.title)}</h1><p>{escape(report.summary)}</p>"
        f"{f'<dl class=headline>{tiles}</dl>' if tiles else ''}</header>{''.join(body)}"
        f"<section><h2>To repeat it</h2><pre><code>{escape(report.command)}</code></pre></section>"
        "</main></body></html>\n"
    )


def _chart(chart: Chart, key: str) -> str:
    return _framed(chart.title, svg(chart, key), chart.note)


def _framed(title: str, content: str, note: str) -> str:
    remark = f"<span>{escape(note)}</span>" if note else ""
    return f"<figure><figcaption><strong>{escape(title)}</strong>{remark}</figcaption>{content}</figure>"


def _table(table: Table) -> str:
    head = "".join(f"<th scope=col>{escape(column)}</th>" for column in table.columns)
    rows = "".join(
        f"<tr><th scope=row>{_cell(row[0])}</th>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows
    )
    content = f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    return _framed(table.title, content, table.note)


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(f"{value:,}" if isinstance(value, int) else value)


def _heat_map(heat: HeatMap) -> str:
    head = f"<th>{escape(heat.row_label)} \\ {escape(heat.column_label)}</th>"
    head += "".join(f"<th scope=col>{escape(column)}</th>" for column in heat.columns)
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th>"
        + "".join(f'<td class=heat style="--share:{value:.3f}">{value:.0%}</td>' for value in values)
        + "</tr>"
        for name, values in zip(heat.rows, heat.values, strict=True)
    )
    content = f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    return _framed(heat.title, content, heat.note)


def _answers(answers: Answers) -> str:
    said = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in answers.answers.items())
    return f"<article><blockquote>{escape(answers.prompt)}</blockquote><dl class=answers>{said}</dl></article>"


def _dialogue(dialogue: Dialogue) -> str:
    turns = "".join(
        f"<blockquote>{escape(asked)}</blockquote><dl class=side>"
        + "".join(
            f"<div><dt>{escape(name)}<span>{escape(said.remark)}</span></dt><dd>{_said(said)}</dd></div>"
            for name, said in answers.items()
        )
        + "</dl>"
        for asked, answers in dialogue.turns
    )
    return f"<article class=dialogue>{turns}</article>"


def _said(said: Said) -> str:
    if said.parts_at is None:
        return escape(said.text)
    same, rest = said.text[: said.parts_at], said.text[said.parts_at :]
    # The first word that differs is marked; a text that ends before the other does is marked at its end.
    word = len(rest) - len(rest.lstrip()) + len((rest.split() or [""])[0])
    mark = f"<mark>{escape(rest[:word])}</mark>" if rest.strip() else "<mark>(ends)</mark>"
    return f"{escape(same)}{mark}{escape(rest[word:])}"


_RENDER: dict[type, Callable[[Any], str]] = {
    Table: _table,
    HeatMap: _heat_map,
    Answers: _answers,
    Dialogue: _dialogue,
}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and text."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            rows.append((prefix + key, ", ".join(map(str, value))))
        else:
            rows.append((prefix + key, str(value)))
    return rows


def loss_chart(title: str, curves: Mapping[str, Sequence[Point]], *, y_label: str, note: str = "") -> Chart:
    """Losses over training tokens."""
    return Chart(title, "tokens", y_label, curves, note=note)


def alignment_chart(errors: Mapping[str, Mapping[int, float]], *, note: str = "") -> Chart:
    """An error per layer, such as before and after training: name to layer to error."""
    layers = sorted({layer for by_layer in errors.values() for layer in by_layer})
    at = {layer: i for i, layer in enumerate(layers)}
    series = {
        name: [(float(at[layer]), by_layer[layer]) for layer in sorted(by_layer)] for name, by_layer in errors.items()
    }
    ticks = [(float(i), str(layer)) for i, layer in enumerate(layers)]
    return Chart("Alignment by layer", "layer", "error", series, kind="bar", ticks=ticks, note=note)


def position_chart(measured: Mapping[str, Perplexity]) -> Chart:
    """Perplexity over the position in the context, in buckets that double."""
    series = {
        name: [(math.sqrt(b.start * (b.stop - 1)), math.exp(b.nll)) for b in result.by_position() if b.start >= 4]
        for name, result in measured.items()
    }
    first = next(iter(measured.values()))
    ticks = [(float(b.start), short(b.start)) for b in first.by_position() if b.start >= 4]
    note = f"{first.windows} windows of {first.context:,} tokens; a point is the mean between two ticks."
    return Chart("Perplexity by position", "position, tokens", "perplexity", series, log_x=True, ticks=ticks, note=note)


def memory_chart(states: Mapping[str, Mapping[int, int]], *, batch: int = 1) -> Chart:
    """State bytes over the context: name to context to bytes."""
    series = {name: [(float(n), b / 2**20) for n, b in by_context.items()] for name, by_context in states.items()}
    title = "Memory of the state" + (f", batch {batch}" if batch > 1 else "")
    return Chart(title, "context, tokens", "MiB", series, log_x=True, log_y=True, ticks=_contexts(series))


def speed_chart(speeds: Mapping[str, Mapping[int, float]], *, batch: int) -> Chart:
    """Decoding speed over the context: name to context to tokens per second."""
    series = {name: [(float(n), s) for n, s in by_context.items()] for name, by_context in speeds.items()}
    return Chart(
        f"Decoding speed, batch {batch}", "context, tokens", "tokens/s", series, log_x=True, ticks=_contexts(series)
    )


def _contexts(series: Mapping[str, Sequence[Point]]) -> list[tuple[float, str]]:
    return [(x, short(x)) for x in sorted({x for points in series.values() for x, _ in points})]


def needle_map(name: str, result: NeedleResult) -> HeatMap:
    """Share of needles found by length and depth."""
    lengths, depths = sorted(set(result.length_n)), sorted(set(result.depth_n))
    values = [[result.accuracy(length, depth).value for depth in depths] for length in lengths]
    samples = len(result.length_n) // (len(lengths) * len(depths))
    note = f"By {result.by}, {samples} a cell; all: {result.accuracy().format('.2f')}; guessing: {result.chance:.0%}."
    return HeatMap(
        f"Needles found: {name}",
        "length",
        "depth",
        [f"{length:,}" for length in lengths],
        [f"{depth:.0%}" for depth in depths],
        values,
        note,
    )
