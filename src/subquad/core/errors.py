"""Errors that name what was expected, what came, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SubquadError(Exception):
    """Base of every error a user can cause; the command line prints it on one line and exits with 2."""


class ConfigError(SubquadError, ValueError):
    """A value, key or combination that can't be used."""


class UnsupportedError(SubquadError, NotImplementedError):
    """Something valid in the world that this library does not do, with the reason."""


class CheckpointError(SubquadError, OSError):
    """A checkpoint that is missing, incomplete, misshapen, or could not be written."""


class DataError(SubquadError, ValueError):
    """Text, tokens or task files that can't serve."""


class DivergenceError(SubquadError, ArithmeticError):
    """Training met a loss that is not finite."""


SHOWN = 12


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of `known`, else the list of what there is, the first `SHOWN`.

    Args:
        name: what was asked for.
        known: the names that exist.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"; known: {', '.join(names[:SHOWN])}{more}" if names else ""
