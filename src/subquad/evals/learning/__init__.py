"""Tasks that a mixer learns from nothing: one file a task, found by its card, and the training that serves all."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subquad.core.config import config_from_dict, parse_field
from subquad.core.errors import ConfigError, nearest
from subquad.core.registry import read_literals

if TYPE_CHECKING:
    from subquad.evals.learning.task import Task


@dataclass(frozen=True)
class TaskCard:
    """What a task is: literals only, readable without importing the task.

    Attributes:
        title: what it is, in one line.
        entry: the class of the module that is the task.
        source: the paper that its rules are from, as an arXiv id, or other words where there is none.
        scored: what counts as an answer, in one line.
        chance: what guessing is worth, in words.
        sizes: by name, fields of the task's ``Config`` as they were published; the first is the default.
    """

    title: str
    entry: str
    source: str
    scored: str
    chance: str
    sizes: Mapping[str, Mapping[str, Any]]


@cache
def tasks() -> dict[str, TaskCard]:
    """Name to card of every task, sorted; a module without a card is no task."""
    found: dict[str, TaskCard] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        values = None if path.stem == "__init__" else read_literals(path)
        if values is not None:
            found[path.stem] = config_from_dict(TaskCard, values, where=f"{path}: CARD")
    return found


def find_task(name: str) -> TaskCard:
    """The card of that name; ``-`` and ``_`` are the same.

    Raises:
        ConfigError: no such task, with the nearest name.
    """
    found = tasks().get(name.replace("-", "_"))
    if found is None:
        raise ConfigError(f"unknown task {name!r}{nearest(name, tasks())}")
    return found


def load_task(name: str, sizes: Sequence[str] = ()) -> Task:
    """The task of that name.

    Args:
        name: one of `tasks`.
        sizes: names of the card's sizes and ``KEY=VALUE``, later ones over earlier ones; none is the card's first.

    Raises:
        ConfigError: no such task or size, or a size that makes no sense.
        DataError: files that are missing or broken.
    """
    card, name = find_task(name), name.replace("-", "_")
    cls: Any = getattr(importlib.import_module(f"{__name__}.{name}"), card.entry)
    values = dict(next(iter(card.sizes.values())))
    for size in sizes:
        key, equals, text = size.partition("=")
        if equals:
            values[key] = parse_field(cls.Config, key, text, where=f"--size {size}")
        elif key in card.sizes:
            values |= card.sizes[key]
        else:
            raise ConfigError(f"--size: unknown {key!r}{nearest(key, card.sizes)}; or give KEY=VALUE")
    return cls(config_from_dict(cls.Config, values, where=f"task {name}"))  # type: ignore[no-any-return]
