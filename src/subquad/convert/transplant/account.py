"""The report of a conversion: losses, alignment by layer, perplexity by position, memory and speed over context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subquad.convert.transplant.conversion import describe
from subquad.convert.transplant.settings import Conversion
from subquad.evals.perplexity import perplexity_ratio
from subquad.evals.report import (
    Report,
    Section,
    alignment_chart,
    loss_chart,
    memory_chart,
    position_chart,
    speed_chart,
    write_report,
)
from subquad.evals.speed import attention_kept, measure_speed, state_bytes
from subquad.train.checkpoint import RunFolder

CURVE_POINTS = 300
# Where the share of attention that is kept is counted.
KEPT_CONTEXT = 8192
MEMORY_CONTEXTS: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)


def account(conversion: Conversion, out: Path, *, command: str, batch: int = 8, steps: int = 5) -> None:
    """Write ``report.html`` into the folder of a conversion, and its speeds and bytes of state into ``run.json``.

    Args:
        conversion: what `convert` returned.
        out: its folder.
        command: what was typed.
        batch: rows of the decoding speed.
        steps: timed steps at each context.
    """
    folder = RunFolder(out)
    models = {"teacher": conversion.teacher.model, "student": conversion.student}
    scores = {"teacher": conversion.teacher_perplexity, "student": conversion.student_perplexity}
    context = scores["student"].context
    contexts = sorted({max(context // 4, 1), context})
    speeds: dict[str, dict[int, float]] = {name: {} for name in models}
    for n in contexts:
        for name, speed in measure_speed(models, n, batch=batch, steps=steps).items():
            speeds[name][n] = speed.decode_tokens_per_s
    folder.note(speed={"batch": batch, "tokens_per_s": speeds})
    states: dict[str, dict[int, int]] = {
        name: dict(zip(MEMORY_CONTEXTS, state_bytes(m, MEMORY_CONTEXTS), strict=True)) for name, m in models.items()
    }
    kept = attention_kept(models["student"], models["teacher"], KEPT_CONTEXT)
    folder.note(state={"context": KEPT_CONTEXT, "bytes": {n: s[KEPT_CONTEXT] for n, s in states.items()}, "kept": kept})
    ratio = perplexity_ratio(scores["student"], scores["teacher"])
    placed = describe(conversion.placement, len(conversion.student.blocks))
    summary = f"{conversion.teacher.name}: {placed}."
    largest = MEMORY_CONTEXTS[-1]
    headline = [
        (
            "perplexity",
            f"{scores['student'].perplexity.value:.2f}",
            f"teacher {scores['teacher'].perplexity.value:.2f}",
        ),
        ("of the teacher's", f"{ratio.value:.3f} x", f"held-out text, context {context:,}"),
        (
            "attention kept",
            f"{kept:.1%}",
            f"of its keys and values at {KEPT_CONTEXT // 1024}k",
        ),
        (
            f"state at {largest // 1024}k",
            f"{states['student'][largest] / 2**20:.1f} MiB",
            f"teacher {states['teacher'][largest] / 2**20:.1f} MiB",
        ),
        (
            f"decoding at {context:,}",
            f"{speeds['student'][context]:,.0f} tokens/s",
            f"teacher {speeds['teacher'][context]:,.0f}, batch {batch}",
        ),
    ]
    facts = folder.facts()
    spent = facts["training"]
    price = f"{spent['minutes']:,.1f} minutes" + (f", cost {spent['cost']:,.2f}" if "cost" in spent else "")
    headline.append(("trained on", f"{spent['tokens']:,} tokens", price))
    quality = Section("Quality", [position_chart(scores)], "Held-out documents, which no training has seen.")
    cost = Section("Cost", [memory_chart(states), speed_chart(speeds, batch=batch)])
    sections = [*training(folder.lines(), sorted(conversion.placement)), quality, cost]
    title = f"Conversion of {conversion.teacher.name}"
    settings = {"settings": facts["settings"], "versions": facts["versions"]}
    write_report(Report(title, summary, command, headline, sections, settings), out / "report.html")


def training(lines: Sequence[Mapping[str, Any]], layers: Sequence[int]) -> list[Section]:
    """What the log tells of each stage: its loss over tokens, and, of align, the error of each layer.

    Args:
        lines: of ``log.jsonl``.
        layers: the converted layers, in the order of the log's vectors.
    """
    sections: list[Section] = []
    for stage in dict.fromkeys(line["stage"] for line in lines):
        mine = [line for line in lines if line["stage"] == stage]
        figures = [name for name in ("kl", "cross_entropy") if name in mine[0]] or ["loss"]
        curves = {name: smooth([(line["tokens"], line[name]) for line in mine]) for name in figures}
        # Stages that learn layer by layer log an error of each, and all others a loss of the whole.
        label = "relative error" if "layers" in mine[0] else "nats a token"
        parts: list[Any] = [loss_chart(f"Loss of {stage}", curves, y_label=label)]
        if "layers" in mine[0]:
            few = max(1, len(mine) // 10)
            ends = {"first tenth": mine[:few], "last tenth": mine[-few:]}
            errors = {
                name: {layer: sum(line["layers"][at] for line in part) / len(part) for at, layer in enumerate(layers)}
                for name, part in ends.items()
            }
            parts.append(alignment_chart(errors, note="Share of what is compared that is off: |x - x*|² / |x*|²."))
        sections.append(Section(f"Stage {stage}", parts))
    return sections


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `CURVE_POINTS` points, each the mean of its neighbours."""
    width = -(-len(points) // CURVE_POINTS)
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
