"""Frozen dataclass configs to and from plain dictionaries, with unknown keys refused."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from subquad.core.errors import ConfigError, nearest

T = TypeVar("T")


def config_from_dict(cls: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """Build the dataclass `cls` from `values`; an unknown or missing key, or a wrong type, is a `ConfigError`.

    Args:
        cls: a dataclass type.
        values: field names to values.
        where: what is being configured, for the message.
    """
    assert dataclasses.is_dataclass(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    label = where or cls.__qualname__
    for key in values:
        if key not in fields:
            raise ConfigError(f"{label}: unknown key {key!r}{nearest(key, fields)}")
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{label}: expected {', '.join(missing)}, got {sorted(values)}; add the missing keys")
    kinds = typing.get_type_hints(cls)
    for key, value in values.items():
        if expected := misfit(value, kinds[key]):
            raise ConfigError(f"{label}: {key}: expected {expected}, got {value!r}; correct it")
    return cls(**values)


def parse_field(cls: type[Any], key: str, text: str, *, where: str, but: Collection[str] = ()) -> Any:
    """The value of the field `key` of the dataclass `cls` that `text` writes: JSON, or else a word.

    Args:
        cls: a dataclass type.
        key: the field.
        text: as it was typed.
        where: what was typed, for the message.
        but: fields that can't be set so.

    Raises:
        ConfigError: no such field, with the nearest one, or a value of another type.
    """
    fields = [f.name for f in dataclasses.fields(cls) if f.name not in but]
    if key not in fields:
        raise ConfigError(f"{where}: unknown option {key!r}{nearest(key, fields)}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if expected := misfit(value, typing.get_type_hints(cls)[key]):
        raise ConfigError(f"{where}: expected {expected}, got {text!r}; write a value of that type")
    return value


def misfit(value: Any, kind: Any) -> str:
    """What was expected, in words, where `value` is none of the type `kind` of a field; else nothing.

    Types of elements are not looked at. An int serves as a float, and a list, which JSON makes of it, as a tuple.
    """
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    allowed: list[Any] = [typing.get_origin(k) or k for k in (typing.get_args(kind) if union else (kind,))]
    serving: dict[Any, Any] = {float: (float, int), tuple: (tuple, list)}
    for one in allowed:
        # A bool is an int to Python, but not to whoever wrote window=true.
        if one is Any or (isinstance(value, serving.get(one) or one) and isinstance(value, bool) == (one is bool)):
            return ""
    return " or ".join("None" if k is types.NoneType else k.__name__ for k in allowed)


def config_to_dict(config: Any) -> dict[str, Any]:
    """The dataclass `config` as JSON would give it back: nested dataclasses as dictionaries, tuples as lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in typing.cast("Mapping[str, Any]", value).items()}
        if isinstance(value, (list, tuple)):
            return [plain(inner) for inner in typing.cast("list[Any]", value)]
        return value

    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}
