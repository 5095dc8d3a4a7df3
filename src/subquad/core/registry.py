"""Finds the methods by their rooms: no list is edited to add one."""

from __future__ import annotations

import ast
import importlib
from functools import cache
from pathlib import Path
from typing import Any

from subquad.core.card import STATUSES, Card
from subquad.core.config import config_from_dict
from subquad.core.errors import ConfigError, nearest

PACKAGE = Path(__file__).resolve().parent.parent
FAMILIES = ("mixers", "convert", "decode", "compress", "retrieve", "inspect")


def read_literals(source: Path) -> dict[str, Any] | None:
    """The keywords of the ``CARD = Name(key=literal, ...)`` of a source file, read without running it.

    Returns:
        None where the file has no card.

    Raises:
        ConfigError: the card has positional arguments, or a value that is no literal.
    """
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if not (isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "CARD" for t in node.targets)):
            continue
        call = node.value
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ConfigError(f"{source}: expected CARD = Card(key=literal, ...); write it so")
        try:
            return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        except ValueError as error:
            raise ConfigError(f"{source}: a card holds literals only, got {error}; write the value out") from error
    return None


def read_card(source: Path) -> Card | None:
    """The ``CARD = Card(...)`` of a source file, read without running it; None where there is none.

    Raises:
        ConfigError: as in `read_literals`, or the card has an unknown field or status.
    """
    values = read_literals(source)
    if values is None:
        return None
    card = config_from_dict(Card, values, where=f"{source}: CARD")
    if card.status not in STATUSES:
        raise ConfigError(f"{source}: status {card.status!r}{nearest(card.status, STATUSES)}")
    return card


@cache
def methods(family: str) -> dict[str, Card]:
    """Slug to card of every method of a family, sorted; a module without a card is no method.

    Args:
        family: one of `FAMILIES`.
    """
    if family not in FAMILIES:
        raise ConfigError(f"unknown family {family!r}{nearest(family, FAMILIES)}")
    found: dict[str, Card] = {}
    for path in sorted((PACKAGE / family).glob("*")):
        source = path / "__init__.py" if path.is_dir() else path
        if source.suffix == ".py" and source.exists() and path.stem != "__init__":
            card = read_card(source)
            if card is not None:
                found[path.stem] = card
    return found


def load(family: str, slug: str) -> Any:
    """The class or function that a method's card names.

    Raises:
        ConfigError: no such method, with the nearest name.
    """
    cards = methods(family)
    if slug not in cards:
        raise ConfigError(f"unknown method {slug!r} in {family}{nearest(slug, cards)}")
    module = importlib.import_module(f"subquad.{family}.{slug}")
    return getattr(module, cards[slug].entry)
