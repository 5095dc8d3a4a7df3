"""Which arithmetic training uses on a device."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in bfloat16 over float32 weights on a GPU; plain float32 on a CPU, where bfloat16 is slower."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


@contextmanager
def matmul_precision(device: torch.device) -> Generator[None]:
    """What autocast leaves in float32 may use TF32 on a GPU, and nothing else anywhere; restored on leaving."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
