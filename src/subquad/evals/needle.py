"""Needle and passkey retrieval: a number hidden at a depth of a text of an exact length, asked for at the end.

A needle is a sentence *The special magic number for KEY is VALUE.*; the question names the key. With distractors, other
keys with other values stand elsewhere in the text (RULER's multi-key, arXiv 2404.06654, section 3). A passkey is the
one number in a text that says the same few sentences over and over (arXiv 2305.16300, section 4.2). The answer is begun
for the model (*The special magic number for KEY mentioned in the text is*), so that models without instructions
can be asked as well.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.engine.generate import Limits, generate
from subquad.engine.prefill import prefill
from subquad.evals.scoring import Progress, score_hidden
from subquad.evals.stats import Interval, paired_ratio, wilson
from subquad.evals.text import begin_tokens
from subquad.models.stack import Stack

WORDS = (
    "amber anchor apple arrow autumn banjo barrel basil beacon birch bottle bridge bronze butter cactus camel candle "
    "canyon carpet castle cedar cherry clover cobalt comet copper coral cotton crane crystal desert dragon eagle ember "
    "falcon feather fern forest fountain garden garlic ginger glacier granite harbor hazel helmet honey island ivory "
    "jasmine jungle kettle ladder lantern lemon lily lizard magnet maple marble meadow mirror mountain"
)
KEYS = tuple(WORDS.split())
MARK = "\N{SYMBOL FOR NULL}"


@dataclass(frozen=True)
class Wording:
    """How a number is hidden and asked for; ``{key}`` and ``{value}`` are filled in.

    Attributes:
        intro: said before the text.
        needle: the sentence in the text.
        question: said behind the text.
        answer: the beginning of the answer, which the model continues.
    """

    intro: str
    needle: str
    question: str
    answer: str


NUMBERS = Wording(
    intro="Some special magic numbers are hidden in the following text. Remember them: one is asked for afterwards.",
    needle="The special magic number for {key} is {value}.",
    question="What is the special magic number for {key} mentioned in the text?",
    answer="The special magic number for {key} mentioned in the text is",
)
PASSKEY = Wording(
    intro="A passkey is hidden in the following text, which else says little. Remember it: it is asked for.",
    needle="The passkey is {value}. Keep it in mind: {value} is the passkey.",
    question="What is the passkey?",
    answer="The passkey is",
)
FILLER = "The road is long. The river is wide. The wind comes and goes. We walk on, and we rest, and we walk on again. "


@dataclass(frozen=True)
class NeedleGrid:
    """What to ask.

    Attributes:
        lengths: tokens of the whole prompt, question and chat template included.
        depths: where the needle stands, from 0 (beginning of the text) to 1 (its end).
        samples: questions a cell, each with its own key, value and stretch of text.
        distractors: further needles with other keys.
        digits: of a value.
        seed: of keys, values and stretches; the same questions come for every model with the same tokenizer.
    """

    lengths: tuple[int, ...] = (900,)
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    samples: int = 4
    distractors: int = 0
    digits: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a grid that asks nothing."""
        if not self.lengths or not self.depths or self.samples < 1 or not 0 <= self.distractors < len(KEYS):
            raise ConfigError(
                f"expected lengths, depths, samples and at most {len(KEYS) - 1} distractors, got {self}; change them"
            )
        if any(not 0 <= depth <= 1 for depth in self.depths) or self.digits < 1:
            raise ConfigError(f"expected depths from 0 to 1 and digits >= 1, got {self}; give depths as fractions")
        if 10**self.digits < 4 * (1 + self.distractors):
            raise ConfigError(
                f"expected digits for {1 + self.distractors} different numbers, got {self}; use more digits"
            )


@dataclass(frozen=True)
class Question:
    """One prompt with its answer, and the other numbers that stand in the text."""

    length: int
    depth: float
    tokens: tuple[int, ...]
    value: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class NeedleResult:
    """What a model found.

    Attributes:
        by: ``generation`` (the greedy answer contains the number, nothing else counts) or ``likelihood`` (the number
            is likelier than nine others of as many digits, those of the distractors first: cheaper, and easier).
        length_n, depth_n: cell of each question.
        hit_n: bool, whether it was found.
    """

    by: str
    length_n: tuple[int, ...]
    depth_n: tuple[float, ...]
    hit_n: Tensor

    def at(self, length: int | None = None, depth: float | None = None) -> NeedleResult:
        """The questions of a length, a depth or a cell."""
        cells = list(zip(self.length_n, self.depth_n, strict=True))
        mine = [i for i, cell in enumerate(cells) if length in (None, cell[0]) and depth in (None, cell[1])]
        return NeedleResult(
            self.by, tuple(cells[i][0] for i in mine), tuple(cells[i][1] for i in mine), self.hit_n[mine]
        )

    def accuracy(self, length: int | None = None, depth: float | None = None) -> Interval:
        """Share found, of everything or of a length, a depth or a cell, with Wilson's interval."""
        hit_n = self.at(length, depth).hit_n
        return wilson(int(hit_n.sum()), len(hit_n))

    @property
    def chance(self) -> float:
        """What guessing gives."""
        return 0.1 if self.by == "likelihood" else 0.0


def make_questions(tokenizer: Any, hay: str, grid: NeedleGrid, wording: Wording = NUMBERS) -> list[Question]:
    """The questions of `grid`, each of exactly its length in tokens.

    Args:
        tokenizer: a Hugging Face tokenizer; its chat template is used where it has one.
        hay: any text; taken around again where it is too short. ``FILLER`` for passkeys.
        grid: what to ask.
        wording: how it is said.

    Raises:
        ConfigError: a length that has no room for text around the needles, or distractors without keys.
    """
    if grid.distractors and "{key}" not in wording.question:
        raise ConfigError(f"passkeys: expected no distractors, got {grid.distractors}; hide needles, which have keys")
    hay_n: list[int] = tokenizer.encode(hay, add_special_tokens=False, verbose=False)
    ends = {i for i in set(hay_n) if tokenizer.decode([i]).rstrip(" ").endswith((".", "!", "?", "\n"))}
    starts = [0] + [i + 1 for i, token in enumerate(hay_n) if token in ends and i + 1 < len(hay_n)]
    rng = random.Random(grid.seed)
    questions: list[Question] = []
    for length in grid.lengths:
        for depth in grid.depths:
            for _ in range(grid.samples):
                keys = rng.sample(KEYS, 1 + grid.distractors)
                values = _values(rng, grid)
                needles = [
                    tokenizer.encode(" " + wording.needle.format(key=k, value=v), add_special_tokens=False)
                    for k, v in zip(keys, values, strict=True)
                ]
                head, tail = _frame(tokenizer, wording, keys[0])
                room = length - len(head) - len(tail) - sum(map(len, needles))
                if room < 16:
                    raise ConfigError(
                        f"needle length {length}: expected room for at least 16 tokens of text beside question and "
                        f"needles, got {room}; use a length of at least {length - room + 16}"
                    )
                start = rng.choice(starts) if hay_n else 0
                text = [hay_n[(start + i) % len(hay_n)] for i in range(room)]
                depths = [depth] + [rng.random() for _ in keys[1:]]
                body = _insert(text, needles, depths, ends)
                questions.append(Question(length, depth, (*head, *body, *tail), values[0], tuple(values[1:])))
    return questions


def _values(rng: random.Random, grid: NeedleGrid) -> list[str]:
    """Different numbers: a distractor that held the answer would count as found."""
    values: list[str] = []
    while len(values) < 1 + grid.distractors:
        value = str(rng.randrange(10 ** (grid.digits - 1), 10**grid.digits))
        values += [value] if value not in values else []
    return values


def _frame(tokenizer: Any, wording: Wording, key: str) -> tuple[list[int], list[int]]:
    """What stands before and behind the text."""
    asked = f"{wording.intro}\n\n{MARK}\n\n{wording.question.format(key=key)}"
    answer = wording.answer.format(key=key)
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": asked}]
        begin, whole = [], tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        whole += answer
    else:
        begin, whole = begin_tokens(tokenizer), f"{asked}\n{answer}"
    before, _, behind = whole.partition(MARK)
    head, tail = (tokenizer.encode(part, add_special_tokens=False) for part in (before, behind))
    return begin + head, tail


def _insert(text: list[int], needles: list[list[int]], depths: list[float], ends: set[int]) -> list[int]:
    """Put each needle at the sentence end nearest to its depth."""
    places = [0] + [i + 1 for i, token in enumerate(text) if token in ends]
    at = [min(places, key=lambda place: abs(place - depth * len(text))) for depth in depths]
    body, last = list[int](), 0
    for place, needle in sorted(zip(at, needles, strict=True), key=lambda pair: pair[0]):
        body += text[last:place] + needle
        last = place
    return body + text[last:]


def evaluate_needles(
    model: Stack,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    by: str = "generation",
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> NeedleResult:
    """Ask `questions` and count what is found; a warning where they are longer than the model was made for.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        questions: from `make_questions`.
        by: ``generation`` or ``likelihood``; see `NeedleResult`.
        batch_tokens: tokens of prompts read at once; prompts of like length share a batch.
        progress: called with tokens done and in all.
    """
    if by not in ("generation", "likelihood"):
        raise ConfigError(f"needle score: expected generation or likelihood, got {by!r}; choose one")
    longest = max(question.length for question in questions)
    if longest > model.config.max_positions:
        warnings.warn(
            f"needle length {longest} is beyond the {model.config.max_positions} positions the model was made for",
            stacklevel=2,
        )
    find = _generated if by == "generation" else _likelier
    hit_n = torch.zeros(len(questions), dtype=torch.bool)
    done, total = 0, sum(question.length for question in questions)
    order = sorted(range(len(questions)), key=lambda i: -questions[i].length)
    while order:
        rows = max(1, batch_tokens // questions[order[0]].length)
        part, order = order[:rows], order[rows:]
        hit_n[part] = torch.tensor(find(model, tokenizer, [questions[i] for i in part]))
        done += sum(questions[i].length for i in part)
        if progress is not None:
            progress(done, total)
    return NeedleResult(by, tuple(q.length for q in questions), tuple(q.depth for q in questions), hit_n)


def _generated(model: Stack, tokenizer: Any, questions: Sequence[Question]) -> list[bool]:
    longest = max(len(tokenizer.encode(f" {q.value}", add_special_tokens=False)) for q in questions)
    # One token more shows whether the number goes on, one more leaves room for a stray space. A prompt is read in one
    # piece: reading it against a part of itself needs a mask, and no fast kernel takes one.
    limits = Limits(max_new_tokens=longest + 2, allow_long=True, chunk=max(len(q.tokens) for q in questions))
    answers = generate(model, [q.tokens for q in questions], limits=limits)
    texts = tokenizer.batch_decode([answer.tokens for answer in answers], skip_special_tokens=True)
    return [re.search(rf"(?<!\d){q.value}(?!\d)", text) is not None for q, text in zip(questions, texts, strict=True)]


def _likelier(model: Stack, tokenizer: Any, questions: Sequence[Question]) -> list[bool]:
    logprobs = answer_logprobs(model, tokenizer, questions, others=9)
    return [int(row.argmax()) == 0 for row in logprobs]


@torch.no_grad()
def answer_logprobs(model: Stack, tokenizer: Any, questions: Sequence[Question], *, others: int = 0) -> Tensor:
    """Log-probability of each question's number, and of `others` wrong ones, as float64 ``[questions, 1 + others]``.

    Wrong are those of other keys in the text, as far as there are any: a number that stands nowhere is no rival of one
    that was read. The prompt is read once; its state is forked for the candidates.
    """
    candidates: list[list[int]] = []
    for question in questions:
        rng = random.Random(question.value)
        values = [question.value, *question.others][: 1 + others]
        while len(values) < 1 + others:
            other = str(rng.randrange(10 ** (len(question.value) - 1), 10 ** len(question.value)))
            values += [other] if other not in values else []
        candidates += [tokenizer.encode(f" {value}", add_special_tokens=False) for value in values]
    width = max(map(len, candidates))
    lengths_c = torch.tensor([len(c) for c in candidates], device=model.device)
    tokens_cm = torch.tensor([c + [0] * (width - len(c)) for c in candidates], device=model.device)
    longest = max(len(q.tokens) for q in questions)
    pool = model.init_state(len(questions), longest)
    last_bd = prefill(model, [q.tokens for q in questions], pool, chunk=longest)
    hidden_cmd = last_bd.repeat_interleave(1 + others, 0)[:, None]
    if width > 1:
        read_cmd, _ = model.read(tokens_cm[:, :-1], pool.fork(1 + others), lengths_c - 1)
        hidden_cmd = torch.cat((hidden_cmd, read_cmd), 1)
    logprob_cm = score_hidden(model, hidden_cmd.flatten(0, 1), tokens_cm.flatten()).logprob_n.view(-1, width)
    real_cm = torch.arange(width) < lengths_c.cpu()[:, None]
    return (logprob_cm * real_cm).sum(1).view(len(questions), 1 + others)


def needle_retention(student: NeedleResult, teacher: NeedleResult) -> Interval:
    """``found by the student / found by the teacher`` on the same questions, with a paired interval.

    Raises:
        ConfigError: different questions, or a teacher that found nothing.
    """
    if (student.by, student.length_n, student.depth_n) != (teacher.by, teacher.length_n, teacher.depth_n):
        raise ConfigError("expected the same questions for both, got different ones; use one grid, seed and score")
    if not bool(teacher.hit_n.any()):
        raise ConfigError("expected a teacher that finds something, got none; use shorter lengths or a larger teacher")
    return paired_ratio(student.hit_n, teacher.hit_n).interval
