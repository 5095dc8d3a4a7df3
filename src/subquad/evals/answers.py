"""What models answer to the same prompts, turn by turn: side by side, where they part, and whether they loop.

One JSON object a line: ``{"turns": [str, ...]}`` as in MT-Bench (arXiv 2306.05685), or ``{"prompt": str}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subquad.core.errors import DataError
from subquad.evals.generation import write
from subquad.evals.scoring import Progress
from subquad.evals.tasks import read_records
from subquad.evals.text import begin_tokens
from subquad.models.stack import Stack

Turns = tuple[str, ...]

LONGEST_PERIOD = 128
REPEATS = 3
LEAST = 24


@dataclass(frozen=True)
class Answered:
    """What one model said, turn by turn, in the order of the prompts: the first's turns, then the second's.

    Attributes:
        texts: of every answer.
        length_n: tokens of every answer.
        cut_n: bool, whether the limit ended it.
        loop_n: the token at which it falls into a loop, or -1.
    """

    texts: tuple[str, ...]
    length_n: Tensor
    cut_n: Tensor
    loop_n: Tensor


def load_prompts(path: str | Path, limit: int | None = None) -> list[Turns]:
    """The turns of each prompt of a file.

    Args:
        path: JSONL, packed or not.
        limit: only so many, spread evenly over the file, whose topics may stand in order.

    Raises:
        DataError: no such file, no prompt, or a line without turns.
    """
    prompts: list[Turns] = []
    for where, record in read_records(path):
        fields: dict[str, Any] = record if isinstance(record, dict) else {}
        turns = fields.get("turns", [fields.get("prompt")])
        if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
            raise DataError(
                f"{where}: expected turns, a list of texts, or a prompt, got {', '.join(sorted(fields)) or 'neither'}; "
                "rename the field"
            )
        prompts.append(tuple(turns))
    if not prompts:
        raise DataError(f"{path}: expected at least one prompt, got none; write one JSON object a line")
    few = len(prompts) if limit is None else min(limit, len(prompts))
    return [prompts[i * len(prompts) // few] for i in range(few)]


def answer(
    model: Stack,
    tokenizer: Any,
    prompts: Sequence[Turns],
    *,
    new_tokens: int = 256,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> Answered:
    """Greedy answers to every turn, each after the model's own answers to the turns before.

    Args:
        model: the model.
        tokenizer: its chat template is used where it has one; else turns stand apart by blank lines.
        prompts: from `load_prompts`.
        new_tokens: most tokens of an answer.
        batch_tokens: tokens of prompts and answers held at once.
        progress: called with answers given and in all.
    """
    said: list[list[str]] = [[] for _ in prompts]
    tokens: dict[tuple[int, int], list[int]] = {}
    cut: dict[tuple[int, int], bool] = {}
    total = sum(map(len, prompts))
    for turn in range(max(map(len, prompts))):
        asked = [i for i, turns in enumerate(prompts) if len(turns) > turn]
        heads = [_head(tokenizer, prompts[i][: turn + 1], said[i]) for i in asked]
        before = len(tokens)

        def keep(at: int, answer: list[int], finish: str, asked: list[int] = asked, turn: int = turn) -> None:
            tokens[asked[at], turn], cut[asked[at], turn] = answer, finish == "length"

        def tell(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        texts = write(
            model, tokenizer, heads, new_tokens=new_tokens, batch_tokens=batch_tokens, progress=tell, keep=keep
        )
        for i, text in zip(asked, texts, strict=True):
            said[i].append(text)
    order = sorted(tokens)
    loops = [loop_start(tokens[at]) for at in order]
    return Answered(
        tuple(text for texts in said for text in texts),
        torch.tensor([len(tokens[at]) for at in order]),
        torch.tensor([cut[at] for at in order]),
        torch.tensor([-1 if loop is None else loop for loop in loops]),
    )


def _head(tokenizer: Any, asked: Sequence[str], said: Sequence[str]) -> list[int]:
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": asked[0]}]
        for reply, question in zip(said, asked[1:], strict=True):
            turns += [{"role": "assistant", "content": reply}, {"role": "user", "content": question}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        return tokenizer.encode(text, add_special_tokens=False)
    parts = [part for pair in zip(asked, [*said, ""], strict=True) for part in pair]
    return begin_tokens(tokenizer) + tokenizer.encode("\n\n".join(parts), add_special_tokens=False)


def loop_start(tokens: Sequence[int]) -> int | None:
    """Where the tokens begin to repeat themselves until their end, or None.

    A loop is a piece of at most `LONGEST_PERIOD` tokens that is said at least `REPEATS` times in a row, the last time
    perhaps in part, `LEAST` tokens in all: short lists and rows of dashes are none.
    """
    starts: list[int] = []
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // REPEATS) + 1):
        at = len(tokens)
        while at > period and tokens[at - 1] == tokens[at - 1 - period]:
            at -= 1
        if len(tokens) - at + period >= max(REPEATS * period, LEAST):
            starts.append(at - period)
    return min(starts, default=None)


def common(first: str, second: str) -> int:
    """Characters that two texts share before they part."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
