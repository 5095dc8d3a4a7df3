"""The selective scan in Triton: chunks in parallel, their states one after the other, forward and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.ops import chunks, launch
from subquad.ops.selective_scan import kernels as jitted
from subquad.ops.selective_scan import kernels_backward as jitted_backward

# Triton's types know nothing of launches.
kernels: Any = jitted
kernels_backward: Any = jitted_backward


class Tiling(NamedTuple):
    """How time and channels are cut.

    Attributes:
        tokens: of a chunk; between chunks a state stands in memory.
        channels: of a program.
        warps: of a program.
    """

    tokens: int
    channels: int
    warps: int


# Not tuned yet: sizes that leave room for a dozen tiles in the registers.
TILES = Tiling(64, 32, 4)
# Entries of a channel's state that the kernels run through.
WIDEST = 256


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run these, or None."""
    if not 1 <= (n := tensors[2].shape[1]) <= WIDEST:
        return f"the Triton kernels take 1 to {WIDEST} entries of state a channel, got {n}"
    return launch.refusal(*tensors, widths=())


def scan(
    u_btd: Tensor,
    dt_btd: Tensor,
    A_dn: Tensor,
    B_btgn: Tensor,
    C_btgn: Tensor,
    D_d: Tensor,
    state_bdn: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`subquad.ops.selective_scan.scan` by scans along the tokens of a chunk, see `subquad.ops.selective_scan.kernels`.

    Arithmetic is in float32.
    """
    u, dt, B, C = (_whole(x) for x in chunks.blank(valid_bt, u_btd, dt_btd, B_btgn, C_btgn))
    documents = launch.documents(documents_bt, valid_bt)
    y_btd, end_bdn, *_ = _forward(u, dt, A_dn, B, C, D_d, state_bdn, documents)
    return y_btd, end_bdn


def final_state(
    u_btd: Tensor,
    dt_btd: Tensor,
    A_dn: Tensor,
    B_btgn: Tensor,
    state_bdn: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """`subquad.ops.selective_scan.final_state`, without the outputs' kernel where no gradient is wanted."""
    inputs = u_btd, dt_btd, A_dn, B_btgn, state_bdn
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        none = torch.zeros_like(A_dn[:, 0])
        where = {"valid_bt": valid_bt, "documents_bt": documents_bt}
        return scan(u_btd, dt_btd, A_dn, B_btgn, B_btgn, none, state_bdn, **where)[1]
    u, dt, B = (_whole(x) for x in chunks.blank(valid_bt, u_btd, dt_btd, B_btgn))
    return _final_state(u, dt, A_dn, B, state_bdn, launch.documents(documents_bt, valid_bt))


def _whole(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """All but the last axis's, which is 1."""
    return tuple(s for x in tensors for s in x.stride()[:-1])


def _chunks(u: Tensor) -> int:
    return (u.shape[1] + TILES.tokens - 1) // TILES.tokens


def _cut(g: int, d: int) -> tuple[int, int]:
    """Channels of a program, and programs that a group's channels take."""
    width = min(TILES.channels, 1 << (d // g - 1).bit_length())
    return width, -(-(d // g) // width)


def _states(
    x: Tensor, dt: Tensor, A: Tensor, w: Tensor, state: Tensor, documents: Tensor | None, sums: Tensor, *,
    back: bool, store: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The state before each chunk, ``[b, chunks, n, d]``, and the last; `back`, of its gradient behind each, the first.

    Forward fills `sums`, the steps of each chunk.
    """
    (b, t, d), g, n, count = x.shape, w.shape[2], A.shape[1], sums.shape[1]
    added = launch.scratch(b, count, n, d, like=x, dtype=torch.float32)
    end = torch.empty(b, d, n, dtype=torch.float32, device=x.device)
    width, blocks = _cut(g, d)
    options = {"C": TILES.tokens, "DOCUMENTS": documents is not None, "num_warps": TILES.warps}
    kernels.products[(b * count * g * blocks,)](
        x, dt, A, w, documents, added, sums, *_strides(x, dt, w), t, count, g,
        P=d // g, N=n, BD=width, REVERSE=back, **options,
    )  # fmt: skip
    width = min(128, 1 << (d - 1).bit_length())
    kernels.states[(b * n * -(-d // width),)](
        added, sums, A, documents, state, end, t, count, d, N=n, BD=width, REVERSE=back, STORE=store, **options
    )
    return added, end


@torch.library.custom_op("subquad::selective_scan_forward", mutates_args=())
@launch.guarded
def _forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs and final state; and for the backward the states before chunks and the sums of their steps."""
    if u.numel() == 0:
        y, end, *rest = _forward_fake(u, dt, A, B, C, D, state, documents)
        return y, end.copy_(state), *rest
    (b, t, d), g, n, count = u.shape, B.shape[2], A.shape[1], _chunks(u)
    rates, skip, state = A.contiguous(), D.contiguous(), state.contiguous()
    sums = launch.scratch(b, count, d, like=u, dtype=torch.float32)
    before, end = _states(u, dt, rates, B, state, documents, sums, back=False, store=True)
    y = torch.empty(b, t, d, dtype=u.dtype, device=u.device)
    width, blocks = _cut(g, d)
    kernels.outputs[(b * count * g * blocks,)](
        u, dt, rates, B, C, skip, before, documents, y, *_strides(u, dt, B, C), t, count, g,
        P=d // g, N=n, C=TILES.tokens, BD=width, DOCUMENTS=documents is not None, num_warps=TILES.warps,
    )  # fmt: skip
    return y, end, before, sums


@_forward.register_fake
def _forward_fake(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (b, _, d), n, count = u.shape, A.shape[1], _chunks(u)
    return (
        torch.empty_like(u, memory_format=torch.contiguous_format),
        u.new_empty(b, d, n, dtype=torch.float32),
        u.new_empty(b, count, n, d, dtype=torch.float32),
        u.new_empty(b, count, d, dtype=torch.float32),
    )


@torch.library.custom_op("subquad::selective_scan_backward", mutates_args=())
@launch.guarded
def _backward(
    dy: Tensor, dend: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
    documents: Tensor | None, before: Tensor, sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of all inputs, those of A, B, C, D and the initial state in float32."""
    du, ddt, *rest, dstate = _backward_fake(dy, dend, u, dt, A, B, C, D, documents, before, sums)
    if u.numel() == 0:
        da, dw_in, dw_out, dskip = (x.zero_() for x in rest)
        return du, ddt, da, dw_in, dw_out, dskip, dstate.copy_(dend)
    (b, t, d), g, n, count = u.shape, B.shape[2], A.shape[1], sums.shape[1]
    rates, skip, dy = A.contiguous(), D.contiguous(), _whole(dy)
    after, dstate = _states(dy, dt, rates, C, dend.contiguous(), documents, sums, back=True, store=True)
    width, blocks = _cut(g, d)
    da = launch.scratch(b, count, n, d, like=u, dtype=torch.float32)
    dw_in, dw_out = (launch.scratch(b, t, g, blocks, n, like=u, dtype=torch.float32) for _ in range(2))
    dskip = launch.scratch(b, count, d, like=u, dtype=torch.float32)
    kernels_backward.gradients[(b * count * g * blocks,)](
        u, dt, rates, B, C, skip, dy, before, after, documents, du, ddt, da, dw_in, dw_out, dskip,
        *_strides(u, dt, B, C, dy), t, count, g,
        P=d // g, N=n, C=TILES.tokens, BD=width, DOCUMENTS=documents is not None, num_warps=TILES.warps,
    )  # fmt: skip
    return du, ddt, da.sum((0, 1)).mT.contiguous(), dw_in.sum(3), dw_out.sum(3), dskip.sum((0, 1)), dstate


@_backward.register_fake
def _backward_fake(
    dy: Tensor, dend: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
    documents: Tensor | None, before: Tensor, sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    du, ddt = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, dt))
    da, dw_in, dw_out, dskip, dstate = (x.new_empty(x.shape, dtype=torch.float32) for x in (A, B, C, D, dend))
    return du, ddt, da, dw_in, dw_out, dskip, dstate


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, state, documents = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.state_dtype = state.dtype
    ctx.save_for_backward(*tensors, documents, *output[2:])


def _gradients(ctx: Any, dy: Tensor | None, dend: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    u, dt, A, B, C, D, documents, before, sums = ctx.saved_tensors
    dy = torch.zeros_like(u) if dy is None else dy
    dend = u.new_zeros(u.shape[0], *A.shape, dtype=torch.float32) if dend is None else dend
    made = _backward(dy, dend, u, dt, A, B, C, D, documents, before, sums)
    dtypes = (*(x.dtype for x in (u, dt, A, B, C, D)), ctx.state_dtype)
    return *(x.to(dtype) for x, dtype in zip(made, dtypes, strict=True)), None


_forward.register_autograd(_gradients, setup_context=_setup)


@torch.library.custom_op("subquad::selective_scan_final_state", mutates_args=())
@launch.guarded
def _final_state(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, state: Tensor, documents: Tensor | None) -> Tensor:
    """The state after the last token."""
    if u.numel() == 0:
        return state.to(torch.float32, copy=True)
    sums = launch.scratch(u.shape[0], _chunks(u), u.shape[2], like=u, dtype=torch.float32)
    state = state.contiguous()
    return _states(u, dt, A.contiguous(), B, state, documents, sums, back=False, store=False)[1]


@_final_state.register_fake
def _final_state_fake(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, state: Tensor, documents: Tensor | None) -> Tensor:
    return torch.empty_like(state, dtype=torch.float32, memory_format=torch.contiguous_format)
