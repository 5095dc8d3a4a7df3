"""Tables made from result files, so that no figure in a page is typed by hand.

A page asks for a table with two comments; what stands between them is generated::

    <!-- bench: mixers.mamba2.cpu.json fwd.* state -->
    <!-- end bench -->

names a result file and, after it, patterns of the ids wanted (without the bench's name); no pattern means every row.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

from subquad.bench.results import Result, Row, load_result
from subquad.core.errors import ConfigError

BLOCK = re.compile(r"(<!-- bench: (?P<ask>[^\n]*?) -->\n)(?P<body>.*?)(<!-- end bench -->)", re.DOTALL)
HEAD = ("what", "value", "baseline", "ratio", "share of the limit")


def refresh(page: Path, results: Path, *, write: bool) -> bool:
    """Regenerate the tables of `page` and return whether it differed.

    Args:
        page: a Markdown file.
        results: the folder of the result files.
        write: rewrite the page if it differs.

    Raises:
        ConfigError: a block is not closed, names no such file, or its patterns match no row.
    """
    text = page.read_text(encoding="utf-8")
    opened, closed = text.count("<!-- bench: "), len(BLOCK.findall(text))
    if opened != closed:
        raise ConfigError(
            f"{page}: expected every <!-- bench: --> closed, got {opened} opened, {closed} closed; close it"
        )

    def table(match: re.Match[str]) -> str:
        name, *patterns = match["ask"].split()
        path = results / name
        if not path.exists():
            raise ConfigError(f"{page}: expected {path}, got no such file; run the bench or correct the name")
        return f"{match[1]}{markdown_table(load_result(path), patterns, where=str(page))}{match[4]}"

    fresh = BLOCK.sub(table, text)
    if fresh != text and write:
        page.write_text(fresh, encoding="utf-8")
    return fresh != text


def markdown_table(result: Result, patterns: list[str], *, where: str = "") -> str:
    """The rows of `result` that match `patterns`, with the command and the machine under them."""
    rows = [(_short(result, row), row) for row in result.rows]
    if patterns:
        rows = [(id, row) for p in patterns for id, row in rows if fnmatchcase(id, p)]
    if not rows:
        raise ConfigError(
            f"{where}: expected rows that match {patterns}, got none in {result.bench}; correct the pattern"
        )
    wide = [(f"`{id}`", *_cells(row)) for id, row in rows]
    # A column that no row fills is left out.
    kept = [i for i in range(len(HEAD)) if i < 2 or any(cells[i] for cells in wide)]
    lines = [[HEAD[i] for i in kept], ["---" if i == 0 else "---:" for i in kept]]
    lines += [[cells[i] for i in kept] for cells in wide]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    env = result.env
    place = f"{env['device']}, {env['dtype']}, torch {env['versions'].get('torch', '?')}"
    return f"{table}\n\n`{result.command}` on {place}, {env['date'][:10]}, commit {env['commit'][:10]}.\n"


def terminal_table(result: Result) -> str:
    """All rows of `result` in aligned columns."""
    lines = [HEAD, *((_short(result, row), *_cells(row)) for row in result.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    body = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    proved = [f"  {gate['what']}: error {gate['error']:.1e}, allowed {gate['limit']:.1e}" for gate in result.gates]
    return "\n".join([result.bench, *proved, *body])


def _short(result: Result, row: Row) -> str:
    return row.id.removeprefix(f"{result.bench}.")


def _cells(row: Row) -> tuple[str, str, str, str]:
    baseline = "" if row.baseline_value is None else f"{row.baseline}: {_figure(row.baseline_value, row.unit)}"
    value = _figure(row.value, row.unit)
    if row.interval:
        value += f" [{row.interval[0]:.4g}, {row.interval[1]:.4g}]"
    return (
        value,
        baseline,
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if row.limit_share is None else f"{row.limit_share:.0%}",
    )


def _figure(value: float, unit: str) -> str:
    whole = abs(value) >= 1000 or (unit in ("bytes", "tokens") and value == int(value))
    text = f"{value:,.0f}" if whole else f"{value:.4g}"
    return text if unit == "1" else f"{text} {unit}"
