"""Prompts that drafters are measured on: ours, three files beside this one, or published sets where a folder has them.

``chat`` are questions of eight categories, ``code`` heads of functions to complete, ``copies`` texts and code followed
by the beginning of an edited copy, which a model of any size goes on with. Published are MT-Bench's first turns
(arXiv 2306.05685) for chat and HumanEval (2107.03374) for code; of copies there are only ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from subquad.core.errors import ConfigError
from subquad.evals.answers import load_prompts
from subquad.evals.generation import Problem, Problems, prompt_text
from subquad.evals.text import begun

KINDS = ("chat", "code", "copies")
PUBLISHED = {"chat": "mt_bench.jsonl", "code": "human_eval.jsonl"}


def prompt_file(kind: str, data: Path | None) -> Path:
    """Where the prompts of a kind lie: somewhere below `data` if published, packed or not, else beside this file.

    Raises:
        ConfigError: `data` is given and has not exactly one such file.
    """
    if data is None or kind not in PUBLISHED:
        return Path(__file__).parent / f"{kind}.jsonl"
    found = sorted(data.rglob(f"{PUBLISHED[kind]}*"))
    if len(found) != 1:
        raise ConfigError(
            f"--data {data}: expected one file {PUBLISHED[kind]}, also .xz or .gz, got {len(found)}; "
            "put it there, or leave --data out for our own prompts"
        )
    return found[0]


def prompt_texts(kind: str, data: Path | None = None) -> list[str]:
    """Every prompt of a kind as its file has it; arguments and errors as in `prompt_tokens`."""
    return [turns[0] for turns in load_prompts(prompt_file(kind, data))]


def prompt_tokens(kind: str, tokenizer: Any, data: Path | None = None) -> list[list[int]]:
    """The token ids of every prompt of a kind, as the model is asked: chat and code as conversations.

    Args:
        kind: one of `KINDS`.
        tokenizer: of the model; its chat template is used where it has one.
        data: a folder with published sets.

    Raises:
        ConfigError: see `prompt_file`.
        DataError: a file that holds something else.
    """
    texts = prompt_texts(kind, data)
    if kind == "code":
        texts = [prompt_text(tokenizer, Problems(kind, "code", ()), Problem(text)) for text in texts]
    elif kind == "chat" and tokenizer.chat_template:
        turns = [[{"role": "user", "content": text}] for text in texts]
        texts = [str(tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True)) for t in turns]
    return [begun(tokenizer, tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def spread(prompts: list[list[int]], n: int) -> list[list[int]]:
    """`n` of the prompts, evenly over their file, whose topics stand in order; all where there are no more."""
    few = min(n, len(prompts))
    return [prompts[i * len(prompts) // few] for i in range(few)]
