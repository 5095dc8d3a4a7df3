"""The options ``--device`` and ``--dtype``, the same in every command, and files that a command will write."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subquad.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")

Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; by default a GPU if there is one.")]
DType = Annotated[
    str, typer.Option("--dtype", help=f"{', '.join(DTYPES)}; by default bfloat16 on a GPU, else the model's own.")
]


def placement(device: str, dtype: str) -> tuple[torch.device, torch.dtype | None]:
    """What `device` and `dtype` ask for; empty strings take the defaults, and None is the model's own dtype.

    Raises:
        ConfigError: a device that is not there, or an unknown dtype.
    """
    import torch

    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device: expected cpu, cuda, cuda:1, ..., got {device!r}; name one of them") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device: expected a device that is there, got {device!r} with {torch.cuda.device_count()} GPUs; "
            "leave it out to take what there is"
        )
    if dtype and dtype not in DTYPES:
        raise ConfigError(f"--dtype: unknown {dtype!r}{nearest(dtype, DTYPES)}")
    if dtype:
        return chosen, getattr(torch, dtype)
    return chosen, torch.bfloat16 if chosen.type == "cuda" else None


def writable(option: str, path: Path | None) -> None:
    """Make the folder of a file that will be written, so that an hour's figures don't find a closed door.

    Raises:
        ConfigError: there is a folder of that name, or its folder can't be written to.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"{option} {path}: expected a place to write to, got {error}; choose another") from error
    if path.is_dir():
        raise ConfigError(f"{option} {path}: expected a file, got a folder; name a file in it")
