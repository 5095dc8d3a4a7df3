"""Which arithmetic training uses on a device."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def autocast(device: torch.device, *, keep_casts: bool = True) -> AbstractContextManager[object]:
    """Matrix products in bfloat16 over float32 weights on a GPU; plain float32 on a CPU, where bfloat16 is slower.

    Args:
        device: where it runs.
        keep_casts: cast a weight once for all parts of a batch. Not with sharded weights, which every part gathers
            anew: through a cast that was kept, gradients get lost.
    """
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=keep_casts)


def frozen(model: M, dtype: torch.dtype = torch.bfloat16) -> M:
    """`model` with the weights of its linear layers in `dtype`, without gradients; all else is shared with it.

    Under autocast to `dtype` both compute the same numbers, but this one casts no weight in every step.
    """
    copy = deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    for module in copy.modules():
        if isinstance(module, nn.Linear):
            for name, x in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(x.detach().to(dtype), requires_grad=False))
    return copy


@contextmanager
def matmul_precision(device: torch.device) -> Generator[None]:
    """What autocast leaves in float32 may use TF32 on a GPU, and nothing else anywhere; restored on leaving."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
