"""Several measurements of a model beside its teacher, as lines of one table and sections of one report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.evals.agreement import evaluate_agreement, prompts_from_text
from subquad.evals.needle import NeedleGrid, evaluate_needles, make_questions, needle_retention
from subquad.evals.perplexity import perplexity, perplexity_ratio
from subquad.evals.report import Section, needle_map, position_chart
from subquad.evals.scoring import Progress
from subquad.evals.stats import Interval
from subquad.evals.tasks import Task, compare_right, evaluate_task
from subquad.evals.text import TextTokens
from subquad.models.teachers import LoadedModel

Score = Callable[[Any], Interval]
Begin = Callable[[str, str], Progress]
"""Called with a name and a unit when a measurement begins; returns what to tell of its progress."""


@dataclass(frozen=True)
class Line:
    """One measure.

    Attributes:
        id: dotted and stable.
        name: in words.
        unit: of the figures.
        better: ``higher`` or ``lower``.
        model, teacher: their figures.
        against: the two compared, paired over what was measured.
        how: what `against` is: ``ratio``, ``difference``, or with a p-value.
        shape: sizes by name.
    """

    id: str
    name: str
    unit: str
    better: str
    model: Interval
    teacher: Interval | None = None
    against: Interval | None = None
    how: str = ""
    shape: dict[str, Any] = field(default_factory=dict[str, Any])


class Suite:
    """Measures `model`, and `teacher` on the same windows, items and questions where there is one."""

    def __init__(self, model: LoadedModel, teacher: LoadedModel | None, begin: Begin, *, batch_tokens: int = 4096):
        """Check that both can be compared.

        Args:
            model: to measure, with its tokenizer.
            teacher: to measure it against, or None.
            begin: see `Begin`.
            batch_tokens: tokens read at once.

        Raises:
            ConfigError: no tokenizer, or two different ones.
        """
        if model.tokenizer is None:
            raise ConfigError(f"{model.spec}: expected a model with its tokenizer, got none; put it beside the model")
        if teacher is not None and (
            teacher.tokenizer is None or teacher.tokenizer.get_vocab() != model.tokenizer.get_vocab()
        ):
            raise ConfigError(f"expected one tokenizer for both, got two; name the teacher of {model.name}")
        self.models = {"model": model} | ({} if teacher is None else {"teacher": teacher})
        self.tokenizer = model.tokenizer
        self.begin, self.batch_tokens = begin, batch_tokens
        self.lines: list[Line] = []
        self.sections: list[Section] = []

    def text(self, name: str, text: TextTokens, context: int) -> None:
        """Perplexity and bits per byte of a text in windows of `context` tokens."""
        batch = max(1, self.batch_tokens // context)
        found = {
            who: perplexity(m.model, text, context, batch=batch, progress=self.begin(f"{name}, {who}", "tokens"))
            for who, m in self.models.items()
        }
        shape = {"context": context, "windows": found["model"].windows}
        ratio = perplexity_ratio(found["model"], found["teacher"]) if "teacher" in found else None
        label = f"perplexity of {name}, context {context:,}"
        self._add(f"ppl.{name}", label, "1", "lower", found, lambda r: r.perplexity, shape, ratio, "ratio")
        self._add(f"bpb.{name}", f"bits per byte of {name}", "bit", "lower", found, lambda r: r.bits_per_byte, shape)
        named = {who if who == "teacher" else self.models[who].name: found[who] for who in reversed(found)}
        self.sections.append(Section(f"Perplexity of {name}", [position_chart(named)]))

    def task(self, task: Task) -> None:
        """A cloze or multiple-choice task."""
        found: dict[str, Any] = {
            who: evaluate_task(
                m.model,
                self.tokenizer,
                task,
                batch_tokens=self.batch_tokens,
                progress=self.begin(f"{task.name}, {who}", "continuations"),
            )
            for who, m in self.models.items()
        }
        id, shape = f"task.{task.name}", {"items": len(task.items)}

        def accuracy(kind: str, name: str, score: Score, right: Callable[[Any], Tensor]) -> None:
            paired = compare_right(right(found["model"]), right(found["teacher"])) if "teacher" in found else None
            how = "" if paired is None else f"difference, p {paired.p_value:.3g}"
            difference = None if paired is None else paired.difference
            self._add(f"{id}.{kind}", f"{task.name}, {name}", "1", "higher", found, score, shape, difference, how)

        if task.kind == "cloze":
            accuracy("acc", "exact", lambda r: r.accuracy, lambda r: r.right_n)
            label = f"{task.name}, perplexity of a continuation"
            self._add(f"{id}.ppl", label, "1", "lower", found, lambda r: r.item_perplexity, shape)
            return
        chance = found["model"].chance
        shape["chance"] = chance
        accuracy("acc", f"by sum (chance {chance:.2f})", lambda r: r.accuracy, lambda r: r.right_n)
        accuracy("acc_norm", "by character", lambda r: r.accuracy_normalised, lambda r: r.right_normalised_n)
        label = f"{task.name}, by character, share above chance"
        self._add(f"{id}.above", label, "1", "higher", found, lambda r: r.above_chance(r.accuracy_normalised), shape)

    def needles(self, hay: str, grid: NeedleGrid, by: str = "generation") -> None:
        """Needle retrieval over lengths and depths."""
        questions = make_questions(self.tokenizer, hay, grid)
        batch = max(1, self.batch_tokens // max(grid.lengths))
        found = {
            who: evaluate_needles(
                m.model, self.tokenizer, questions, by=by, batch=batch, progress=self.begin(f"needles, {who}", "tokens")
            )
            for who, m in self.models.items()
        }
        shape = {"depths": len(grid.depths), "samples": grid.samples, "distractors": grid.distractors}
        for length in grid.lengths:
            label = f"needles by {by}, {length:,} tokens"
            part = {who: r.at(length) for who, r in found.items()}
            # A teacher that finds nothing leaves nothing to retain.
            both = "teacher" in part and bool(part["teacher"].hit_n.any())
            kept = needle_retention(part["model"], part["teacher"]) if both else None
            self._add(f"needle.{by}.{length}", label, "1", "higher", part, lambda r: r.accuracy(), shape, kept, "ratio")
        self.sections.append(Section("Needles", [needle_map(self.models[who].name, r) for who, r in found.items()]))

    def agreement(self, text: TextTokens, prompts: int, *, prompt_tokens: int = 64, new_tokens: int = 32) -> None:
        """How far the model follows the teacher's greedy answers to beginnings from a text."""
        if "teacher" not in self.models:
            raise ConfigError("agreement: expected a teacher to agree with, got none; give --teacher")
        result = evaluate_agreement(
            self.models["model"].model,
            self.models["teacher"].model,
            prompts_from_text(text, prompts, prompt_tokens),
            new_tokens=new_tokens,
            batch_tokens=self.batch_tokens,
            progress=self.begin("agreement", "prompts"),
        )
        shape = {"prompts": prompts, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        one = {"model": result}
        label = "same most likely token, along the teacher's answers"
        self._add("agreement.match", label, "1", "higher", one, lambda r: r.match, shape)
        self._add("agreement.kl", "KL(teacher || model) along them", "nats/token", "lower", one, lambda r: r.kl, shape)
        label = f"tokens before its own answer differs, of {new_tokens}"
        self._add("agreement.same", label, "tokens", "higher", one, lambda r: r.same, shape)

    def _add(
        self,
        id: str,
        name: str,
        unit: str,
        better: str,
        found: Mapping[str, Any],
        score: Score,
        shape: dict[str, Any],
        against: Interval | None = None,
        how: str = "",
    ) -> None:
        teacher = score(found["teacher"]) if "teacher" in found else None
        self.lines.append(Line(id, name, unit, better, score(found["model"]), teacher, against, how, dict(shape)))
