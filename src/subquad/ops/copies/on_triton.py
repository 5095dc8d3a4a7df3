"""Copies by one Triton launch each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from subquad.ops import launch, overlap
from subquad.ops.copies.kernels import enter_kernel, find_kernel


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run."""
    return launch.no_kernels(tensors[0].device)


def find(
    tokens_bn: Tensor, length_b: Tensor, table_gbm: Tensor, gammas: Sequence[int], k: int, stretch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`subquad.ops.copies.find`."""
    return _find(tokens_bn, length_b, table_gbm, list(gammas), k, stretch)


@torch.library.custom_op(
    "subquad::copies_find",
    mutates_args=(),
    schema="(Tensor tokens, Tensor length, Tensor table, int[] gammas, int k, int stretch) -> (Tensor, Tensor, Tensor)",
)
@launch.guarded
def _find(
    tokens: Tensor, length: Tensor, table: Tensor, gammas: Sequence[int], k: int, stretch: int
) -> tuple[Tensor, Tensor, Tensor]:
    b = len(tokens)
    out, count, grounded = tokens.new_empty(b, k), torch.empty_like(length), torch.empty_like(length)
    kernel: Any = find_kernel[(b,)]
    kernel(
        tokens, length, table, out, count, grounded, tokens.stride(0), *table.stride()[:2], table.shape[2] - 1,
        GAMMAS=tuple(gammas), K=k, STRETCH=stretch, BT=triton.next_power_of_2(k), num_warps=1,
        **overlap.options(tokens.device),
    )  # fmt: skip
    return out, count, grounded


@_find.register_fake
def _(
    tokens: Tensor, length: Tensor, table: Tensor, gammas: Sequence[int], k: int, stretch: int
) -> tuple[Tensor, Tensor, Tensor]:
    return tokens.new_empty(len(tokens), k), torch.empty_like(length), torch.empty_like(length)


def enter_(
    tokens_bn: Tensor, length_b: Tensor, table_gbm: Tensor, gammas: Sequence[int], new_bt: Tensor, n_b: Tensor
) -> None:
    """`subquad.ops.copies.enter_`."""
    new_bt = new_bt if new_bt.stride(-1) == 1 else new_bt.contiguous()
    _enter(tokens_bn, length_b, table_gbm, list(gammas), new_bt, n_b.contiguous())


@torch.library.custom_op(
    "subquad::copies_enter",
    mutates_args=("tokens", "length", "table"),
    schema="(Tensor(a!) tokens, Tensor(b!) length, Tensor(c!) table, int[] gammas, Tensor new, Tensor n) -> ()",
)
@launch.guarded
def _enter(tokens: Tensor, length: Tensor, table: Tensor, gammas: Sequence[int], new: Tensor, n: Tensor) -> None:
    b, t = new.shape
    kernel: Any = enter_kernel[(b,)]
    kernel(
        tokens, length, table, new, n, tokens.stride(0), *table.stride()[:2], new.stride(0), table.shape[2] - 1,
        GAMMAS=tuple(gammas), T=t, BT=triton.next_power_of_2(t), num_warps=1, **overlap.options(tokens.device),
    )  # fmt: skip
