"""Frozen dataclass configs to and from plain dictionaries, with unknown keys refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from subquad.core.errors import ConfigError, nearest

T = TypeVar("T")


def config_from_dict(cls: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """Build the dataclass `cls` from `values`; an unknown or missing key is a `ConfigError`.

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
    return cls(**values)


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return the dataclass `config` as JSON-ready values; nested dataclasses become dictionaries."""
    return dataclasses.asdict(config)
