"""The bookkeeping by one Triton launch each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from subquad.ops import launch, overlap
from subquad.ops.slots.kernels import emit_kernel, keep_last_kernel, lead_kernel

if TYPE_CHECKING:
    from subquad.ops.slots import Slots

# Numbers of a vector that a program copies.
WIDTH = 1024


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run."""
    return launch.no_kernels(tensors[0].device)


def lead(slots: Slots, tokens_bk: Tensor, length_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`subquad.ops.slots.lead`."""
    tokens_bk = tokens_bk if tokens_bk.stride(-1) == 1 else tokens_bk.contiguous()
    return _lead(slots.last_b, slots.alive_b, slots.left_b, tokens_bk, length_b.contiguous())


@torch.library.custom_op("subquad::slots_lead", mutates_args=())
@launch.guarded
def _lead(last: Tensor, alive: Tensor, left: Tensor, tokens: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, k = tokens.shape
    block, count, kept = tokens.new_empty(b, k + 1), torch.empty_like(length), torch.empty_like(length)
    kernel: Any = lead_kernel[(b,)]
    kernel(
        last, alive, left, tokens, length, block, count, kept, tokens.stride(0),
        K=k, BT=triton.next_power_of_2(k + 1), num_warps=1, **overlap.options(tokens.device),
    )  # fmt: skip
    return block, count, kept


@_lead.register_fake
def _(last: Tensor, alive: Tensor, left: Tensor, tokens: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    block = tokens.new_empty(tokens.shape[0], tokens.shape[1] + 1)
    return block, torch.empty_like(length), torch.empty_like(length)


def emit_(slots: Slots, step_b: Tensor, tokens_bt: Tensor, n_b: Tensor, length_b: Tensor) -> tuple[Tensor, Tensor]:
    """`subquad.ops.slots.emit_`."""
    tokens_bt = tokens_bt if tokens_bt.stride(-1) == 1 else tokens_bt.contiguous()
    return _emit(*slots, step_b, tokens_bt, n_b.contiguous(), length_b.contiguous())


@torch.library.custom_op(
    "subquad::slots_emit", mutates_args=("last", "alive", "left", "out", "fill", "kept", "judged", "guessed", "step")
)
@launch.guarded
def _emit(
    last: Tensor, alive: Tensor, left: Tensor, ends: Tensor, out: Tensor, fill: Tensor, kept: Tensor, judged: Tensor,
    guessed: Tensor, step: Tensor, tokens: Tensor, n: Tensor, length: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (b, t), given = tokens.shape, torch.empty_like(n)
    told = tokens.new_empty(b, t)
    kernel: Any = emit_kernel[(b,)]
    kernel(
        last, alive, left, ends, out, fill, kept, judged, guessed, step, tokens, n, length, given, told, ends.shape[1],
        ends.stride(0), out.stride(0), tokens.stride(0),
        T=t, BT=triton.next_power_of_2(t), BE=triton.next_power_of_2(ends.shape[1]), num_warps=1,
        **overlap.options(tokens.device),
    )  # fmt: skip
    return given, told


@_emit.register_fake
def _(
    last: Tensor, alive: Tensor, left: Tensor, ends: Tensor, out: Tensor, fill: Tensor, kept: Tensor, judged: Tensor,
    guessed: Tensor, step: Tensor, tokens: Tensor, n: Tensor, length: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(n), tokens.new_empty(tokens.shape)


def keep_last_(last_bd: Tensor, x_btd: Tensor, n_b: Tensor) -> None:
    """`subquad.ops.slots.keep_last_`."""
    launch.writable(last_bd=last_bd)
    _keep_last(last_bd, x_btd if x_btd.stride(-1) == 1 else x_btd.contiguous(), n_b.contiguous())


@torch.library.custom_op("subquad::slots_keep_last", mutates_args=("last",))
@launch.guarded
def _keep_last(last: Tensor, x: Tensor, n: Tensor) -> None:
    b, d = last.shape
    if b:
        kernel: Any = keep_last_kernel[(b, triton.cdiv(d, WIDTH))]
        kernel(
            last, x, n, d, last.stride(0), *x.stride()[:2], BD=min(triton.next_power_of_2(d), WIDTH), num_warps=4,
            **overlap.options(x.device),
        )  # fmt: skip


@_keep_last.register_fake
def _(last: Tensor, x: Tensor, n: Tensor) -> None:
    return None
