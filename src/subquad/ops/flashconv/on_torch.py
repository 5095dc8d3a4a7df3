"""The long convolution in PyTorch, by the fast Fourier transform: on any device, in at least float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import chunks
from subquad.ops.flashconv.both import both_ways

# Up to so many outputs, the product with a Toeplitz matrix is faster than transforms.
DIRECT = 32
# Up to so many, a history is multiplied where it lies.
FEW = 4


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def parallel(
    u_btd: Tensor,
    k_gl: Tensor,
    bias_d: Tensor | None = None,
    *,
    behind_gl: Tensor | None = None,
    gate_in_btd: Tensor | None = None,
    gate_out_btd: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """`subquad.ops.flashconv.parallel`, in ``O(t log t)``; with documents in ``O(t log^2 t)``."""
    others = {"gate_in_btd": gate_in_btd, "gate_out_btd": gate_out_btd, "documents_bt": documents_bt}
    return both_ways(_forwards, u_btd, k_gl, bias_d, behind_gl, **others)


def _forwards(u: Tensor, k_gl: Tensor, bias_d: Tensor | None = None, **others: Tensor | None) -> Tensor:
    gate_in, gate_out, documents_bt = (others[name] for name in ("gate_in_btd", "gate_out_btd", "documents_bt"))
    dtype = chunks.compute_dtype(u, k_gl)
    with torch.autocast(u.device.type, enabled=False):
        gated = u.to(dtype) if gate_in is None else u.to(dtype) * gate_in.to(dtype)
        k = k_gl.to(dtype)
        u_bgrt = gated.mT.unflatten(1, (len(k), -1))
        y_bgrt = _alone(u_bgrt, k) if documents_bt is None else _within(u_bgrt, k, documents_bt)
        y = y_bgrt.flatten(1, 2).mT
        y = y if bias_d is None else torch.addcmul(y, bias_d.to(dtype), gated)
        return (y if gate_out is None else y * gate_out.to(dtype)).to(u.dtype)


def past(history_bsd: Tensor, seen_b: Tensor, k_gl: Tensor, length: int) -> Tensor:
    """`subquad.ops.flashconv.past`, in ``O(s length)`` for short blocks, else ``O(n log n)`` for their sum n."""
    dtype = chunks.compute_dtype(history_bsd, k_gl)
    s = history_bsd.shape[1]
    with torch.autocast(history_bsd.device.type, enabled=False):
        k_gl = F.pad(k_gl[:, : s + length].to(dtype), (0, max(0, s + length - k_gl.shape[1])))
        if length <= FEW:
            return _read(history_bsd, seen_b, k_gl, length).to(history_bsd.dtype)
        # Right-aligned, so that the newest input of every row stands next to the block.
        source_bs = torch.arange(s, device=seen_b.device) - (s - seen_b)[:, None]
        row_b1 = torch.arange(len(seen_b), device=seen_b.device)[:, None]
        u_bsd = history_bsd[row_b1, source_bs.clamp(min=0)].masked_fill((source_bs < 0)[..., None], 0)
        u_bgrs = u_bsd.to(dtype).mT.unflatten(1, (len(k_gl), -1))
        return _onto(u_bgrs, k_gl, length).flatten(1, 2).mT.to(history_bsd.dtype)


def _read(history_bsd: Tensor, seen_b: Tensor, k_gl: Tensor, length: int) -> Tensor:
    """`past` for a few tokens: the history as it lies, times the filter laid beside it, row by row."""
    s, d = history_bsd.shape[1:]
    # The last row is of zeros, for what stands behind the tokens seen.
    k_ld = F.pad(k_gl.mT.repeat_interleave(d // len(k_gl), dim=1), (0, 0, 0, 1))
    lag_bs = seen_b[:, None] - torch.arange(s, device=seen_b.device)
    taps = (k_ld[torch.where(lag_bs > 0, lag_bs + i, s + length)] for i in range(length))
    return torch.stack([(history_bsd * tap_bsd).sum(1) for tap_bsd in taps], dim=1)


def _alone(u_bgrt: Tensor, k_gl: Tensor) -> Tensor:
    """One document a row: with a filter that begins a row later, the places behind are the row's own."""
    t = u_bgrt.shape[-1]
    return _onto(u_bgrt, F.pad(k_gl[:, :t], (t, 0)), t)


def _within(u_bgrt: Tensor, k_gl: Tensor, documents_bt: Tensor) -> Tensor:
    """Several documents a row, which a transform of the row would mix.

    At level l, each block of 2^l tokens is convolved onto the block to its right. Of two tokens on both sides of a
    border, both belong to one document only if it is the one that reaches across: a mask of the left block's inputs
    and one of the right block's outputs, and no pairs of tokens.
    """
    t = u_bgrt.shape[-1]
    whole = _power(t)
    u = F.pad(u_bgrt, (0, whole - t))
    documents_bt = F.pad(documents_bt[:, None], (0, whole - t), mode="replicate")[:, 0]
    y = u * k_gl[:, None, :1]
    s = 1
    while s < whole:
        blocks_bgrn2s = u.unflatten(-1, (-1, 2, s))
        own_bn2s = documents_bt.unflatten(-1, (-1, 2, s))
        other_bn2s = (own_bn2s != own_bn2s[:, :, :1, -1:])[:, None, None]
        left_bgrns = blocks_bgrn2s[..., 0, :].masked_fill(other_bn2s[..., 0, :], 0)
        right_bgrns = _onto(left_bgrns, k_gl, s).masked_fill(other_bn2s[..., 1, :], 0)
        y = y + torch.stack((torch.zeros_like(right_bgrns), right_bgrns), dim=-2).flatten(-3)
        s *= 2
    return y[..., :t]


def _onto(u_bgs: Tensor, k_gl: Tensor, t: int) -> Tensor:
    """What inputs ``[b, g, ..., s]`` give to the t places right behind them, ``[b, g, ..., t]``."""
    s = u_bgs.shape[-1]
    k_gn = F.pad(k_gl[:, : s + t], (0, max(0, s + t - k_gl.shape[1])))
    if t <= DIRECT:
        # Row j of the unfolded filter holds what input j gives to each place, the last place first.
        toeplitz_gst = k_gn.flip(-1).unfold(1, t, 1)[:, :s]
        return torch.einsum("bg...s,gst->bg...t", u_bgs, toeplitz_gst).flip(-1)
    # What comes round overwrites only the places of the inputs themselves.
    n = _power(s + t)
    return torch.fft.irfft(torch.fft.rfft(u_bgs, n) * _aligned(torch.fft.rfft(k_gn, n), u_bgs), n)[..., s : s + t]


def _aligned(k_gn: Tensor, u_bgs: Tensor) -> Tensor:
    """Filters against inputs of any number of axes between g and the last."""
    return k_gn.view(len(k_gn), *[1] * (u_bgs.dim() - 3), -1)


def _power(n: int) -> int:
    """The next power of two, the length that transforms fastest everywhere."""
    return 1 << (n - 1).bit_length()
