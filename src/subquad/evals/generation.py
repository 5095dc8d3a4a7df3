"""Tasks that a model must write the answer to: word problems by exact match, code by its tests.

One JSON object a line, one kind a file, packed or not as other tasks:

- answers: ``{"context": str, "answer": str}``, optionally with ``"chain_of_thought": str`` (GSM8K, SVAMP)
- code: ``{"prompt": str, "entry_point": str, "test": str}`` (HumanEval, arXiv 2107.03374)

The first problems of a file of answers are worked out as examples before each question, and are not asked.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subquad.core.errors import ConfigError, DataError
from subquad.engine.generate import Limits, generate
from subquad.evals.code import passes
from subquad.evals.scoring import Progress
from subquad.evals.stats import Interval, wilson
from subquad.evals.tasks import read_records, task_name
from subquad.evals.text import begin_tokens
from subquad.models.stack import Stack

ANSWERS = ("context", "answer")
CODE = ("prompt", "entry_point", "test")
MARK = "####"
# A sign, where no digit stands before it (5-10 holds none); thousands in threes; a fraction, with or without its 0.
NUMBER = re.compile(
    r"(?:(?<![\d.])[-\u2212])?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d.])[-\u2212]?\$?\.\d+"
)
CALCULATION = re.compile(r"<<[^<>]*>>")
INSTRUCTION = f"Solve the problem step by step. End with {MARK} and the answer as a number."
CODE_INSTRUCTION = "Complete this Python function. Answer with code only."
# Where the body of a function is over: what follows stands at the margin.
CODE_STOPS = ("\ndef ", "\nclass ", "\nif ", "\nprint(", "\nassert ", "\n#", "\n@", "\n```")


@dataclass(frozen=True)
class Problem:
    """What is asked, and how to know the right answer.

    Attributes:
        question: the problem, or the head of a function.
        answer: the right answer; empty for code.
        worked: the way to it, for examples.
        check: for code, what follows the answer: tests that define ``check(candidate)``.
        entry: for code, the function's name.
    """

    question: str
    answer: str = ""
    worked: str = ""
    check: str = ""
    entry: str = ""


@dataclass(frozen=True)
class Problems:
    """Problems of one kind, ``answers`` or ``code``, and the worked examples that come before each."""

    name: str
    kind: str
    items: tuple[Problem, ...]
    examples: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Written:
    """What a model wrote, and whether it was right."""

    name: str
    right_n: Tensor
    texts: tuple[str, ...]

    @property
    def accuracy(self) -> Interval:
        """Share that is right, with Wilson's interval."""
        return wilson(int(self.right_n.sum()), len(self.right_n))


def asks_to_write(path: str | Path) -> bool:
    """Whether the first record of a task file is one for `load_problems`, and not one for `load_task`."""
    record = next((record for _, record in read_records(path)), None)
    return isinstance(record, dict) and any(record.keys() >= set(keys) for keys in (ANSWERS, CODE))


def load_problems(path: str | Path, *, shots: int = 0, limit: int | None = None) -> Problems:
    """Read a file of problems; its name is the file's, without endings.

    Args:
        path: the file.
        shots: problems taken from its beginning as worked examples; code has none.
        limit: ask only the first so many of the others.

    Raises:
        DataError: no such file, a line of another kind, mixed kinds, or nothing left to ask.
    """
    items: list[Problem] = []
    kinds: set[str] = set()
    for where, record in islice(read_records(path), None if limit is None else shots + limit):
        kind, problem = _parse(record, where)
        kinds.add(kind)
        items.append(problem)
    if len(kinds) != 1:
        raise DataError(f"{path}: expected problems of one kind, got {sorted(kinds) or 'none'}; one kind a file")
    kind = kinds.pop()
    if kind == "code":
        return Problems(task_name(path), kind, tuple(items[:limit]))
    if len(items) <= shots:
        raise DataError(f"{path}: expected more than the {shots} problems of the examples, got {len(items)}; use fewer")
    return Problems(task_name(path), kind, tuple(items[shots:]), tuple(items[:shots]))


def _parse(record: Any, where: str) -> tuple[str, Problem]:
    fields: dict[str, Any] = record if isinstance(record, dict) else {}
    kind, keys = next(
        ((k, keys) for k, keys in (("answers", ANSWERS), ("code", CODE)) if fields.keys() >= set(keys)), ("", ())
    )
    if not kind:
        raise DataError(
            f"{where}: expected the keys {', '.join(ANSWERS)} or {', '.join(CODE)}, got {', '.join(sorted(fields))}; "
            "rename the fields"
        )
    texts = [fields[key] for key in keys]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{where}: expected text in {', '.join(keys)}, got other or no values; correct it")
    if kind == "code":
        return kind, Problem(texts[0], entry=texts[1], check=texts[2])
    return kind, Problem(texts[0], texts[1], worked=CALCULATION.sub("", str(fields.get("chain_of_thought") or "")))


def prompt_text(tokenizer: Any, problems: Problems, problem: Problem, *, plain: bool = False) -> str:
    """What the model continues: the examples and the question, as a conversation where the tokenizer has one.

    Args:
        tokenizer: its chat template is used where it has one.
        problems: gives the examples.
        problem: what is asked.
        plain: as plain text even so.
    """
    chat = bool(tokenizer.chat_template) and not plain
    if problems.kind == "code":
        # The answer is begun: what is measured is the body, not how a model wraps its code.
        head = problem.question.rstrip()
        if not chat:
            return head
        asked = f"{CODE_INSTRUCTION}\n\n```python\n{head}\n```"
        return _chat(tokenizer, [{"role": "user", "content": asked}]) + f"```python\n{head}"
    if not chat:
        shown = [f"Question: {p.question}\nAnswer: {_worked(p)}\n\n" for p in problems.examples]
        return f"{INSTRUCTION}\n\n{''.join(shown)}Question: {problem.question}\nAnswer:"
    turns: list[dict[str, str]] = []
    for example in problems.examples:
        turns += [{"role": "user", "content": _asked(example)}, {"role": "assistant", "content": _worked(example)}]
    return _chat(tokenizer, [*turns, {"role": "user", "content": _asked(problem)}])


def _chat(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _asked(problem: Problem) -> str:
    return f"{INSTRUCTION}\n\n{problem.question}"


def _worked(problem: Problem) -> str:
    return f"{problem.worked}\n{MARK} {problem.answer}".lstrip()


def extract(text: str) -> str:
    """The answer in a text: the number behind the first ``####``, else the last number, else all that was written."""
    before, mark, behind = text.partition(MARK)
    found = NUMBER.findall(behind) if mark else []
    if found:
        return found[0]
    found = NUMBER.findall(before)
    return found[-1] if found else text.strip()


def same_answer(given: str, right: str) -> bool:
    """Whether two answers are one number, or else one text up to case and white space."""

    def number(text: str) -> Decimal | None:
        try:
            return Decimal(text.replace(",", "").replace("$", "").replace("\u2212", "-").strip())
        except InvalidOperation:
            return None

    first, second = number(given), number(right)
    if first is not None and second is not None:
        return first == second
    return given.casefold().split() == right.casefold().split()


def evaluate_problems(
    model: Stack,
    tokenizer: Any,
    problems: Problems,
    *,
    new_tokens: int = 256,
    plain: bool = False,
    run_code: bool = False,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> Written:
    """Let the model write an answer to each problem, greedily, and judge it.

    An answer is right if the number in it is (see `extract`); code is right if its tests pass (pass@1). Code is run
    in processes of its own with limits, which are a fence and no prison: see `subquad.evals.code`.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        problems: from `load_problems`.
        new_tokens: most tokens of an answer.
        plain: ask in plain text even where there is a chat template.
        run_code: allow that code is run which the model wrote.
        batch_tokens: tokens of prompts and answers held at once.
        progress: called with problems answered and in all.

    Raises:
        ConfigError: code to be judged, without `run_code`.
    """
    if problems.kind == "code" and not run_code:
        raise ConfigError(
            f"{problems.name}: expected leave to run code that the model writes, got none; give --run-code where that "
            "does no harm"
        )
    prompts = [prompt_text(tokenizer, problems, problem, plain=plain) for problem in problems.items]
    # A template writes its begin token itself.
    begin = [] if tokenizer.chat_template and not plain else begin_tokens(tokenizer)
    tokens = [begin + tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    stops = CODE_STOPS if problems.kind == "code" else ("\n\nQuestion:",)
    texts = write(
        model, tokenizer, tokens, new_tokens=new_tokens, stop=stops, batch_tokens=batch_tokens, progress=progress
    )
    if problems.kind == "code":
        programs = [
            (f"{p.question.rstrip()}{text}\n\n{p.check}\n", p.entry)
            for p, text in zip(problems.items, texts, strict=True)
        ]
        right = passes(programs)
    else:
        pairs = zip(texts, problems.items, strict=True)
        right = [same_answer(extract(text), problem.answer) for text, problem in pairs]
    return Written(problems.name, torch.tensor(right, dtype=torch.bool), tuple(texts))


def write(
    model: Stack,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    stop: Sequence[str] = (),
    batch_tokens: int = 4096,
    progress: Progress | None = None,
    keep: Callable[[int, list[int], str], None] | None = None,
) -> list[str]:
    """Greedy answers to ragged prompts, in batches of like length; a warning where they are too long for the model.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: token ids.
        new_tokens: most tokens of an answer.
        stop: strings that end one.
        batch_tokens: tokens of prompts and answers held at once.
        progress: called with prompts answered and in all.
        keep: called with the index, the tokens and the finish of each answer.
    """
    longest = max(map(len, prompts)) + new_tokens
    if longest > model.config.max_positions:
        warnings.warn(
            f"{longest} tokens of prompt and answer are beyond the {model.config.max_positions} positions the model "
            "was made for",
            stacklevel=2,
        )
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while order:
        width = len(prompts[order[0]])
        rows = max(1, batch_tokens // (width + new_tokens))
        part, order = order[:rows], order[rows:]
        limits = Limits(max_new_tokens=new_tokens, stop=stop, allow_long=True, chunk=width)
        answers = generate(model, [prompts[i] for i in part], limits=limits, tokenizer=tokenizer)
        for i, answer in zip(part, answers, strict=True):
            texts[i] = answer.text
            if keep is not None:
                keep(i, answer.tokens, answer.finish)
        if progress is not None:
            progress(len(prompts) - len(order), len(prompts))
    return texts
