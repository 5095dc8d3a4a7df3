"""What every Triton launcher checks and decides: shapes by their names, dtypes, devices, precision, scratch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.core.errors import ConfigError
from subquad.ops import backends, chunks

P = ParamSpec("P")
R = TypeVar("R")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 256
# CUDA's bound on the second and third axis of a grid.
GRID = 65_535

# Tests set this: scratch then holds NaN, so that what no kernel wrote shows in the result.
poison = False


def axes(**tensors: Tensor | None) -> dict[str, int]:
    """Sizes by axis of tensors named with their axes, ``q_bthk=...``; every axis has one size.

    Heads may be fewer in some tensors than in others (grouped queries): the axis h of q, k and v is not compared.

    Raises:
        ConfigError: a tensor has another number of axes, two sizes for one axis, or another device than the first.
    """
    sizes: dict[str, tuple[int, str]] = {}
    home: tuple[str, torch.device] | None = None
    for name, x in tensors.items():
        if x is None:
            continue
        letters = name.rpartition("_")[2]
        if x.dim() != len(letters):
            raise ConfigError(f"{name}: expected {len(letters)} axes, {' '.join(letters)}, got shape {tuple(x.shape)}")
        home = home or (name, x.device)
        if x.device != home[1]:
            raise ConfigError(f"{name}: expected device {home[1]} as of {home[0]}, got {x.device}; move one of them")
        for letter, size in zip(letters, x.shape, strict=True):
            if letter == "h" and name[0] in "qkv":
                continue
            known, where = sizes.setdefault(letter, (size, name))
            if known != size:
                raise ConfigError(f"{name}: expected {letter}={known} as in {where}, got {size}; reshape one of them")
    return {letter: size for letter, (size, _) in sizes.items()}


def heads(h: int, **tensors: Tensor) -> None:
    """Refuse tensors ``[b, t, heads, ...]`` whose heads do not divide `h`."""
    for name, x in tensors.items():
        if x.shape[2] < 1 or h % x.shape[2]:
            raise ConfigError(f"{name}: expected a number of heads that divides h={h}, got {x.shape[2]}")


def no_kernels(device: torch.device) -> str | None:
    """Why kernels can't run on `device`, or None when they can."""
    if device.type != "cuda" and not backends.interpreted():
        return f"the Triton kernels need a CUDA device, got {device}"
    return None


def refusal(*tensors: Tensor, widths: tuple[int, ...]) -> str | None:
    """Why kernels can't run `tensors` with head dims `widths`, or None when they can."""
    device = tensors[0].device
    if (reason := no_kernels(device)) is not None:
        return reason
    for x in tensors:
        if x.device != device:
            raise ConfigError(f"expected all tensors on one device, got {device} and {x.device}; move them")
        if x.dtype not in DTYPES:
            return f"the Triton kernels take bfloat16, float16 and float32, got {x.dtype}"
    if not all(1 <= w <= WIDEST for w in widths):
        return f"the Triton kernels take head dims up to {WIDEST}, got {widths}"
    return None


def writable(**tensors: Tensor | None) -> None:
    """Refuse tensors that are written in place and whose last axis does not lie side by side."""
    for name, x in tensors.items():
        if x is not None and x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ConfigError(
                f"{name}: expected a last axis that lies side by side, got strides {x.stride()}; give a contiguous "
                "tensor, which is written in place"
            )


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same, contiguous where they are any."""
    return tuple(None if x is None else x.contiguous() for x in tensors)


def operands(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors that meet in a matrix product, in one dtype and with a contiguous last axis.

    The dtype is autocast's where it is on, as for any matrix product, else the widest. Other strides are kept, so that
    views of one projection are not copied.
    """
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = tensors[0].dtype
        for x in tensors[1:]:
            dtype = torch.promote_types(dtype, x.dtype)
    cast = (x.to(dtype) for x in tensors)
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in cast)


def operands_of_a_sum(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`operands`, but float16 as float32: a state that sums up a long sequence overflows float16."""
    tensors = operands(*tensors)
    return tuple(x.float() for x in tensors) if tensors[0].dtype == torch.float16 else tensors


def documents(documents_bt: Tensor | None, valid_bt: Tensor | None) -> Tensor | None:
    """`chunks.settle`, then counted anew from 0, or from 1 where none continues the state: int32 whatever they were."""
    settled_bt = chunks.settle(documents_bt, valid_bt)
    if settled_bt is None:
        return None
    before_bt = F.pad(settled_bt[:, :-1], (1, 0))
    return (settled_bt != before_bt).cumsum(1, dtype=torch.int32).contiguous()


def guarded(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` with the device of its first argument as the current one, on which Triton launches."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(args[0]):
            return function(*args, **kwargs)

    return run


def untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is a `kind` and nothing more: no adapter, no quantised weight, no hook."""
    hooks = module._forward_hooks, module._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]
    return type(module) is kind and not any(hooks)


def precision(dtype: torch.dtype) -> str:
    """Of float32 products: exact, or by TF32 as ``torch.set_float32_matmul_precision`` allows; for ``tl.dot``."""
    if dtype != torch.float32:
        return "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]


def scratch(*shape: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the device of `like`; NaN throughout while `poison` is set."""
    made = torch.empty(shape, dtype=dtype, device=like.device)
    if poison and dtype.is_floating_point:
        made.fill_(torch.nan)
    return made
