"""Which implementation of an operation runs: PyTorch's everywhere, Triton's where the device can, others by name.

An operation is a package: its equation, and a module ``on_<backend>.py`` for each implementation, all with the same
functions. No list names them; a new module is found by its name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subquad.core.errors import ConfigError, UnsupportedError, nearest

# Tried in this order on a device; every device ends at PyTorch's own. What is not here runs only by name.
PREFERRED = {"cuda": ("triton",)}

HERE = Path(__file__).resolve().parent

_families: list[Backends] = []
_forced: str | None = None
_said: set[str] = set()


class Backends:
    """The implementations of one operation.

    Args:
        package: its name, ``subquad.ops.<operation>``, as ``__name__`` of the package says.

    Attributes:
        operation: the last part of `package`.
    """

    def __init__(self, package: str) -> None:
        self.operation = package.rpartition(".")[2]
        self._package = package
        self.names = _names(self.operation)
        # Loaded here and not at the first call, so that a compiler tracing a call meets no import.
        self._loaded: dict[str, Any] = {}
        self.load("torch")
        if "triton" in self.names and triton_runs():
            self.load("triton")
        if _forced in self.names:
            self.load(str(_forced))
        _families.append(self)

    def load(self, name: str) -> None:
        """Import an implementation."""
        if name not in self._loaded:
            self._loaded[name] = importlib.import_module(f"{self._package}.on_{name}")

    def choose(self, *tensors: Tensor) -> Any:
        """The module that runs for `tensors`, the operation's arguments in order.

        That is the one named by `use`, else the first of the device's that takes them. A refusal is said once.

        Raises:
            UnsupportedError: the implementation named by `use` can't run them, with its reason.
        """
        if _forced is not None and _forced in self.names:
            reason = self._loaded[_forced].refusal(*tensors)
            if reason is not None:
                raise UnsupportedError(f"{self.operation} on {_forced}: {reason}; leave the backend's name out")
            return self._loaded[_forced]
        for name in PREFERRED.get(tensors[0].device.type, ()):
            if name in self._loaded:
                reason = self._loaded[name].refusal(*tensors)
                if reason is None:
                    return self._loaded[name]
                _say(f"{self.operation}: {reason}; PyTorch's form runs instead")
        return self._loaded["torch"]


@contextmanager
def use(name: str) -> Generator[None]:
    """Run every operation that has an implementation called `name` with it, and no other, inside the block.

    Args:
        name: ``torch``, ``triton``, or one that never runs unasked, as ``fla``.

    Raises:
        ConfigError: no operation has it, or what it needs is not installed.

    Example:
        >>> from subquad.ops import backends
        >>> with backends.use("torch"):
        ...     pass
    """
    global _forced
    known = set(_names("*"))
    if name not in known:
        raise ConfigError(f"unknown backend {name!r}{nearest(name, known)}")
    try:
        for family in _families:
            if name in family.names:
                family.load(name)
    except ImportError as error:
        raise ConfigError(f"backend {name}: expected its package, got: {error}; install subquad[{name}]") from error
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def wants_triton(device: torch.device) -> bool:
    """Whether Triton's kernels are to run on `device`: by `use`, or as what is preferred there."""
    preferred = "triton" in PREFERRED.get(device.type, ())
    return triton_runs() and (preferred or _forced == "triton") and _forced != "torch"


def interpreted() -> bool:
    """Whether Triton kernels are interpreted on the CPU (``TRITON_INTERPRET=1``): for tests, and very slow."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _names(operation: str) -> list[str]:
    return sorted(path.stem.removeprefix("on_") for path in HERE.glob(f"{operation}/on_*.py"))


def triton_runs() -> bool:
    """Whether Triton's kernels can run at all: it is installed, and there is a GPU or the interpreter."""
    return importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or interpreted())


def _say(what: str) -> None:
    if what not in _said and not torch.compiler.is_compiling():
        _said.add(what)
        warnings.warn(what, stacklevel=4)
