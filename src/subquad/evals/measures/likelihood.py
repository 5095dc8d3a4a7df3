"""Likelihood: perplexity, loss by position, cloze and multiple choice, and what is kept of a teacher's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch

from subquad.core.errors import ConfigError
from subquad.evals.agreement import Divergence, evaluate_divergence
from subquad.evals.figures import Chart
from subquad.evals.perplexity import Perplexity, compare_perplexity, perplexity, spread_windows
from subquad.evals.report import Section, position_chart
from subquad.evals.stats import (
    Interval,
    Paired,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_strata,
    paired_difference,
    sign_flip,
)
from subquad.evals.suite import ROLES, Compare, Line, Score, Suite
from subquad.evals.tasks import ChoiceResult, ClozeResult, Task, evaluate_task
from subquad.evals.text import TextTokens


def text(suite: Suite, name: str, text: TextTokens, context: int) -> None:
    """Perplexity and bits per byte of a text in windows of `context` tokens."""
    found = _windows(suite, name, text, context)
    shape = {"context": context, "windows": found["model"].windows}

    def bytewise(first: Perplexity, second: Perplexity) -> Paired:
        differences_w = (first.nll_wt - second.nll_wt).sum(1) / math.log(2)
        return Paired("difference", bootstrap_ratio(differences_w, first.bytes_w), sign_flip(differences_w))

    label = f"perplexity of {name}, context {context:,}"
    suite.add(f"ppl.{name}", label, "1", "lower", found, lambda r: r.perplexity, shape, compare_perplexity)
    label = f"bits per byte of {name}"
    suite.add(f"bpb.{name}", label, "bit", "lower", found, lambda r: r.bits_per_byte, shape, bytewise)
    suite.sections.append(Section(f"Perplexity of {name}", [_positions(suite, found)]))


def divergence(suite: Suite, name: str, text: TextTokens, context: int) -> None:
    """``KL(teacher || model)`` along a text, in the windows of its perplexity."""
    if "teacher" not in suite.models:
        raise ConfigError("--kl: expected a teacher to be near to, got none; give --teacher")
    teacher, batch = suite.models["teacher"], max(1, suite.batch_tokens // context)
    found = suite.measure(
        f"KL, {name}",
        "tokens",
        Divergence,
        ("divergence", text.ids_n, context, suite.fingerprint("teacher") if suite.memo else ""),
        lambda m, progress: evaluate_divergence(m.model, teacher.model, text, context, batch=batch, progress=progress),
        ("model", "baseline"),
    )
    label, shape = f"KL(teacher || model) on {name}", {"context": context, "windows": len(found["model"].kl_w)}

    def compare(first: Divergence, second: Divergence) -> Paired:
        return paired_difference(first.kl_w, second.kl_w)

    suite.add(f"kl.{name}", label, "nats/token", "lower", found, lambda r: r.kl, shape, compare)


def loss(suite: Suite, name: str, text: TextTokens, context: int, *, windows: int, start: int) -> None:
    """Loss by position in `windows` long windows, spread over a text, and at all positions from `start` on."""
    found = _windows(suite, f"{name} at {context:,}", spread_windows(text, context, windows), context)
    shape = {"context": context, "windows": found["model"].windows}
    edges = [b.start for b in found["model"].by_position()] + [context]
    spans = [(a, b) for a, b in pairwise(edges) if a >= min(256, context // 4)]
    for a, b in dict.fromkeys([*spans, (start, context)]):

        def mean(result: Perplexity, a: int = a, b: int = b) -> Interval:
            return bootstrap_mean(result.nll_w(a, b))

        def difference(first: Perplexity, second: Perplexity, a: int = a, b: int = b) -> Paired:
            return paired_difference(first.nll_w(a, b), second.nll_w(a, b))

        label = f"loss of {name} at positions {a:,} to {b - 1:,}"
        suite.add(f"loss.{name}.{a}-{b - 1}", label, "nats/token", "lower", found, mean, shape, difference)
    suite.sections.append(Section(f"Loss of {name} over {context:,} tokens", [_positions(suite, found)]))


def task(suite: Suite, task: Task) -> None:
    """A cloze or multiple-choice task."""
    kind = ClozeResult if task.kind == "cloze" else ChoiceResult
    found = suite.measure(
        task.name,
        "continuations",
        kind,
        ("task", task),
        lambda m, progress: evaluate_task(
            m.model, suite.tokenizer, task, batch_tokens=suite.batch_tokens, progress=progress
        ),
    )
    suite.tasks[task.name] = found
    id, shape = f"task.{task.name}", {"items": len(task.items)}

    def items(right: str) -> Compare:
        return lambda a, b: paired_difference(getattr(a, right), getattr(b, right))

    def add(kind: str, name: str, score: Score, compare: Compare) -> None:
        suite.add(f"{id}.{kind}", f"{task.name}, {name}", "1", "higher", found, score, shape, compare)

    if task.kind == "cloze":
        add("acc", "exact", lambda r: r.accuracy, items("right_n"))
        label = f"{task.name}, perplexity of a continuation"

        def surprise(first: ClozeResult, second: ClozeResult) -> Paired:
            return paired_difference(-first.logprob_n, -second.logprob_n).map(math.exp, "ratio")

        suite.add(f"{id}.ppl", label, "1", "lower", found, lambda r: r.item_perplexity, shape, surprise)
        return
    shape["chance"] = chance = found["model"].chance
    add("acc", f"by sum (chance {chance:.2f})", lambda r: r.accuracy, items("right_n"))
    add("acc_norm", "by character", lambda r: r.accuracy_normalised, items("right_normalised_n"))
    label = "by character, share above chance"
    add("above", label, lambda r: r.above_chance(r.accuracy_normalised), items("above_n"))


def retention(suite: Suite) -> None:
    """What is kept of the teacher's accuracy above chance, over all cloze and multiple-choice tasks so far.

    ``mean over tasks (model above chance) / mean over tasks (teacher above chance)``, paired over items.
    """
    if not suite.tasks or "teacher" not in suite.models:
        return
    above = {role: [found[role].above_n for found in suite.tasks.values()] for role in suite.models}
    means = {who: bootstrap_strata([(x, torch.ones_like(x)) for x in xs]) for who, xs in above.items()}
    shape = {"tasks": list(suite.tasks), "items": sum(map(len, above["model"]))}
    note = suite.uninformative(means["teacher"])
    suite.lines.append(Line("task.above", "tasks, mean share above chance", "1", "higher", means, {}, note, shape))
    if note:
        return
    theirs = above.pop("teacher")
    kept = {who: bootstrap_strata(list(zip(xs, theirs, strict=True))) for who, xs in above.items()}
    paired: dict[tuple[str, str], Paired] = {}
    if "baseline" in above:
        apart = [x - y for x, y in zip(above["model"], above["baseline"], strict=True)]
        interval = bootstrap_strata(list(zip(apart, theirs, strict=True)))
        p_value = sign_flip(torch.cat([x / len(x) for x in apart]))
        paired["model", "baseline"] = Paired("difference", interval, p_value)
    label = "tasks, kept of the teacher's share above chance"
    suite.lines.append(Line("task.retention", label, "1", "higher", kept, paired, "", shape))


def _windows(suite: Suite, what: str, text: TextTokens, context: int) -> dict[str, Perplexity]:
    batch = max(1, suite.batch_tokens // context)
    return suite.measure(
        what,
        "tokens",
        Perplexity,
        ("perplexity", text.ids_n, text.bytes_n, context),
        lambda m, progress: perplexity(m.model, text, context, batch=batch, progress=progress),
    )


def _positions(suite: Suite, found: Mapping[str, Perplexity]) -> Chart:
    return position_chart({suite.labels[who]: found[who] for who in reversed(ROLES) if who in found})
