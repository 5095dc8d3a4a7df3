"""The options ``--device`` and ``--dtype``, the same in every command."""

from __future__ import annotations

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
