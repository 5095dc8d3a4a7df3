"""Figures kept on disk, so that a teacher is measured once however many students are held against it.

A figure is found under the hash of all that it depends on: the weights, the tokenizer, the tokens and settings of the
measurement, the device's kind, the precision of float32 products, the versions of what runs it and the source of the
code that measures. What has changed in any of them has another name; old files may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import platform
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

import subquad
from subquad.core.errors import CheckpointError
from subquad.models.teachers import LoadedModel
from subquad.train.checkpoint import write_atomically

# The floors that a figure passes through; what lies above only shows it.
FLOORS = ("core", "data", "ops", "mixers", "models", "engine", "evals")


class Memo:
    """A folder of results, each a frozen dataclass of tensors and plain values."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, kind: type[Any], key: str, make: Callable[[], Any]) -> Any:
        """The result under `key`, or else what `make` returns, kept from now on.

        Args:
            kind: the result's class.
            key: a hash of everything that it depends on; see `digest` and `fingerprint`.
            make: measures it.
        """
        path = self.folder / f"{key}.pt"
        try:
            return kind(**torch.load(path, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, UnpicklingError, EOFError, TypeError, zipfile.BadZipFile):
            pass  # not there, or damaged: measured again either way
        made = make()
        content = {f.name: getattr(made, f.name) for f in fields(kind)}
        try:
            write_atomically(path, lambda file: torch.save(content, file))
        except CheckpointError as error:
            warnings.warn(f"a figure is not kept for the next run: {error}", stacklevel=2)
        return made


def digest(*parts: Any) -> str:
    """A hash of tensors by dtype, shape and content, and of anything else by its ``repr``."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            state.update(f"{part.dtype} {tuple(part.shape)}\0".encode())
            state.update(part.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
        else:
            state.update(f"{part!r}\0".encode())
    return state.hexdigest()


def fingerprint(loaded: LoadedModel) -> str:
    """A hash of a model's weights and configuration, its tokenizer, where it runs, and the code that runs it."""
    model, tokenizer = loaded.model, loaded.tokenizer
    core = getattr(tokenizer, "backend_tokenizer", None)
    words = core.to_str() if core is not None else sorted(tokenizer.get_vocab().items())
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    weights = [part for name, tensor in sorted(model.state_dict().items()) for part in (name, tensor)]
    names = ("torch", "triton", "transformers")
    installed = [(name, version(name)) for name in names if find_spec(name) is not None]
    code = (platform.python_version(), *installed, torch.get_float32_matmul_precision(), source())
    return digest(model.config, words, tokenizer.chat_template, tokenizer.bos_token_id, device, code, *weights)


@cache
def source() -> str:
    """A hash of the code below and in the evaluation."""
    root = Path(subquad.__file__).parent
    files = sorted(path for floor in FLOORS for path in (root / floor).rglob("*.py"))
    return digest(*((str(path.relative_to(root)), path.read_bytes()) for path in files))
