"""Cloze and multiple-choice tasks from local JSONL files, scored by log-likelihood.

One JSON object a line, one kind a file, ``.jsonl``, also with ``.gz`` or ``.xz`` behind it:

- cloze: ``{"context": str, "continuation": str}``
- multiple choice: ``{"query": str, "choices": [str, ...], "gold": int}``, gold counted from 0

What is scored is ``context + delimiter + continuation``; the delimiter is one space unless the task is given another,
such as ``"\\nAnswer: "``. Other keys are ignored.
"""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subquad.core.errors import DataError
from subquad.data.sources import OPENERS
from subquad.evals.scoring import Progress, TokenScores, score_continuations
from subquad.evals.stats import Interval, bootstrap_mean, bootstrap_ratio, wilson
from subquad.evals.text import begun
from subquad.models.stack import Stack

CLOZE = ("context", "continuation")
CHOICE = ("query", "choices", "gold")


@dataclass(frozen=True)
class Item:
    """A context, the continuations to compare, and which is right; a cloze item has one."""

    context: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """Items of one kind under a name."""

    name: str
    kind: str
    items: tuple[Item, ...]
    delimiter: str = " "


@dataclass(frozen=True)
class ClozeResult:
    """Scores of a cloze task.

    Attributes:
        right_n: bool, whether greedy decoding gives the continuation exactly.
        logprob_n: summed log-probability of each continuation, in nats.
        tokens_n: tokens of each continuation.
    """

    name: str
    right_n: Tensor
    logprob_n: Tensor
    tokens_n: Tensor

    @property
    def accuracy(self) -> Interval:
        """Share of continuations that greedy decoding gives exactly, with Wilson's interval."""
        return wilson(int(self.right_n.sum()), len(self.right_n))

    @property
    def above_n(self) -> Tensor:
        """What each item counts above chance, which is 0 for a continuation."""
        return self.right_n.double()

    @property
    def item_perplexity(self) -> Interval:
        """``exp(-mean log p(continuation))``: for LAMBADA the perplexity of the last word, however many tokens."""
        return bootstrap_mean(-self.logprob_n).map(math.exp)

    @property
    def token_perplexity(self) -> Interval:
        """``exp(-sum log p / sum tokens)``."""
        return bootstrap_ratio(-self.logprob_n, self.tokens_n).map(math.exp)


@dataclass(frozen=True)
class ChoiceResult:
    """Scores of a multiple-choice task.

    Attributes:
        right_n: bool, whether the gold choice has the highest summed log-likelihood.
        right_normalised_n: the same with each sum divided by the choice's characters.
        chance: mean of 1 / choices.
    """

    name: str
    right_n: Tensor
    right_normalised_n: Tensor
    chance: float

    @property
    def accuracy(self) -> Interval:
        """By summed log-likelihood, with Wilson's interval."""
        return wilson(int(self.right_n.sum()), len(self.right_n))

    @property
    def accuracy_normalised(self) -> Interval:
        """By log-likelihood per character of the choice (lm-eval's ``acc_norm``)."""
        return wilson(int(self.right_normalised_n.sum()), len(self.right_normalised_n))

    @property
    def above_n(self) -> Tensor:
        """What each item counts above chance, by character; see `above_chance`."""
        return (self.right_normalised_n.double() - self.chance) / (1 - self.chance)

    def above_chance(self, accuracy: Interval) -> Interval:
        """``(accuracy - chance) / (1 - chance)``: 0 is guessing, 1 is all right."""
        return accuracy.map(lambda a: (a - self.chance) / (1 - self.chance))


def load_task(path: str | Path, *, delimiter: str = " ", limit: int | None = None) -> Task:
    """Read a task file; its name is the file's, without endings.

    Args:
        path: the file.
        delimiter: between context and continuation.
        limit: use only the first so many items.

    Raises:
        DataError: no such file, a line that is no JSON object of either kind, mixed kinds, or a gold out of range.
    """
    items: list[Item] = []
    kinds: set[str] = set()
    for where, record in islice(read_records(path), limit):
        kind, item = _parse(record, where)
        kinds.add(kind)
        items.append(item)
    if len(kinds) != 1:
        raise DataError(f"{path}: expected items of one kind, got {sorted(kinds) or 'none'}; one kind a file")
    return Task(task_name(path), kinds.pop(), tuple(items), delimiter)


def task_name(path: str | Path) -> str:
    """The name of a task file: without folder and endings."""
    return Path(path).name.split(".")[0]


def read_records(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Place and content of every line that is not blank; the file may be packed with gzip or xz.

    Raises:
        DataError: no such file, damage, or a line that is no JSON.
    """
    try:
        with OPENERS.get(Path(path).suffix, open)(path, "rt", encoding="utf-8") as stream:
            lines = [(number, line) for number, line in enumerate(stream, 1) if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise DataError(f"{path}: expected a readable UTF-8 file, got {error}; check path and ending") from error
    for number, line in lines:
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: expected a JSON object, got {error}; write one object a line") from error


def _parse(record: Any, where: str) -> tuple[str, Item]:
    fields: dict[str, Any] = record if isinstance(record, dict) else {}
    if fields.keys() >= set(CLOZE):
        kind, context, choices, gold = "cloze", fields["context"], [fields["continuation"]], 0
    elif fields.keys() >= set(CHOICE):
        kind, context, choices, gold = "choice", fields["query"], fields["choices"], fields["gold"]
    else:
        raise DataError(
            f"{where}: expected the keys {', '.join(CLOZE)} or {', '.join(CHOICE)}, got {', '.join(sorted(fields))}; "
            "rename the fields"
        )
    if not all(isinstance(text, str) and text for text in (context or " ", *choices)) or not isinstance(gold, int):
        raise DataError(f"{where}: expected text, non-empty choices and an integer gold, got other values; correct it")
    if not 0 <= gold < len(choices) or (kind == "choice" and len(choices) < 2):
        raise DataError(
            f"{where}: expected at least two choices and a gold among them, got {len(choices)} choices and gold "
            f"{gold}; count gold from 0"
        )
    return kind, Item(context, tuple(choices), gold)


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of what follows it, encoded together and split where they part.

    White space at the end of the context goes to the continuation, as byte-level tokenizers write words. Where a token
    spans the boundary, it belongs to the continuation, so that a token's probability is never taken under a prefix
    that the tokenizer would not have written. The context begins with the token that the tokenizer puts before any
    text, if it does; an empty context is the begin-of-text (or else end-of-text) token, since something must precede
    what is scored.
    """
    kept = context.rstrip()
    whole: list[int] = tokenizer.encode(context + continuation, add_special_tokens=False)
    prefix: list[int] = tokenizer.encode(kept, add_special_tokens=False) if kept else []
    shared = 0
    while shared < min(len(prefix), len(whole) - 1) and prefix[shared] == whole[shared]:
        shared += 1
    context_tokens = begun(tokenizer, whole[:shared])
    if not context_tokens:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise DataError("expected a context to score after, got none and no begin-of-text token; add a context")
        context_tokens = [start]
    return context_tokens, whole[shared:]


def evaluate_task(
    model: Stack, tokenizer: Any, task: Task, *, batch_tokens: int = 8192, progress: Progress | None = None
) -> ClozeResult | ChoiceResult:
    """Score every item of `task`.

    Contexts that exceed the model's positions lose their beginning.

    Args:
        model: the model.
        tokenizer: its Hugging Face tokenizer.
        task: from `load_task`.
        batch_tokens: padded tokens in a batch.
        progress: called with continuations done and in all.
    """
    requests: list[tuple[list[int], list[int]]] = []
    for item in task.items:
        for choice in item.choices:
            context, continuation = encode_pair(tokenizer, item.context + task.delimiter, choice)
            room = max(1, model.config.max_positions - len(continuation) + 1)
            requests.append((context[-room:], continuation))
    scores = score_continuations(model, requests, batch_tokens=batch_tokens, progress=progress)
    if task.kind == "cloze":
        return ClozeResult(
            task.name,
            right_n=torch.tensor([bool(s.greedy_n.all()) for s in scores]),
            logprob_n=torch.stack([s.logprob_n.sum() for s in scores]),
            tokens_n=torch.tensor([len(s.logprob_n) for s in scores]),
        )
    return _choice_result(task, scores)


def _choice_result(task: Task, scores: Sequence[TokenScores]) -> ChoiceResult:
    right: list[bool] = []
    right_normalised: list[bool] = []
    at = 0
    for item in task.items:
        sums = [float(s.logprob_n.sum()) for s in scores[at : at + len(item.choices)]]
        at += len(item.choices)
        means = [total / len(choice) for total, choice in zip(sums, item.choices, strict=True)]
        right.append(sums.index(max(sums)) == item.gold)
        right_normalised.append(means.index(max(means)) == item.gold)
    chance = sum(1 / len(item.choices) for item in task.items) / len(task.items)
    return ChoiceResult(task.name, torch.tensor(right), torch.tensor(right_normalised), chance)
