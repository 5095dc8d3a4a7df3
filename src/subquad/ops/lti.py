"""Linear time-invariant systems by chunks of tokens, whatever their state looks like.

Between chunks travels the state, within one stands the Toeplitz matrix of the impulse response; nothing is ever as
large as tokens times states. A system says what it is by a few tensors of one chunk of c tokens: its response, what a
token adds to the state behind the chunk, how the state before the chunk is read at each token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import chunks


class Chunk(NamedTuple):
    """A system over c tokens, a power of two, for g groups of channels whose state has p real numbers.

    Attributes:
        adds_gcp: from the input of token j to the state behind the chunk.
        across: a state ``[g, b, r, p]`` to what is left of it behind the chunk; r channels share a group.
        advance: a state and int64 ``n_b`` below c to what is left of it after n tokens.
    """

    adds_gcp: Tensor
    across: Callable[[Tensor], Tensor]
    advance: Callable[[Tensor, Tensor], Tensor]

    @property
    def tokens(self) -> int:
        """The number c."""
        return self.adds_gcp.shape[1]


def complex_of(dtype: torch.dtype) -> torch.dtype:
    """The complex dtype of real numbers of `dtype`, in a way that compilers can follow."""
    return torch.promote_types(dtype, torch.complex64)


def length(time: int) -> int:
    """Tokens of a chunk for a block of `time`: the power of two that holds it, at most 64."""
    return min(chunks.CHUNK, 1 << max(time - 1, 0).bit_length())


def grouped(state_bdnp: Tensor, g: int) -> Tensor:
    """A complex state ``[b, d, n, 2]`` as ``[g, b, r, p]``: all real parts, then all imaginary ones."""
    return state_bdnp.unflatten(1, (g, -1)).transpose(0, 1).mT.flatten(-2)


def by_channel(state_gbrp: Tensor) -> Tensor:
    """Undo `grouped`."""
    return state_gbrp.unflatten(-1, (2, -1)).mT.transpose(0, 1).flatten(1, 2)


def outputs(
    u_btd: Tensor,
    kernel_gc: Tensor,
    reads_gpc: Tensor,
    chunk: Chunk,
    state_gbrp: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """What the system answers to a block, ``[b, t, d]`` in the dtype of the state.

    Args:
        u_btd: inputs.
        kernel_gc: response to an input 0 to c - 1 tokens ago.
        reads_gpc: from the state before the chunk to the output of each of its tokens.
        chunk: the rest of it.
        state_gbrp: before the first token.
        valid_bt, documents_bt: as everywhere: tokens stand first in a row; document 0 continues the state.
    """
    (b, t, d), g, c = u_btd.shape, len(kernel_gc), chunk.tokens
    (u_btd,) = chunks.blank(valid_bt, u_btd.to(state_gbrp.dtype))
    documents_bt = chunks.settle(documents_bt, valid_bt)
    u_gbmrc = _cut(u_btd, g, c)
    m, r = u_gbmrc.shape[2:4]
    ends_gbmrc, own_bmc, last_bm = u_gbmrc, None, None
    if documents_bt is None:
        y_gbmrc = (u_gbmrc.flatten(1, 3) @ _toeplitz(kernel_gc, c, 0)).unflatten(1, (b, m, r))
    else:
        padded_bt = F.pad(documents_bt[:, None], (0, m * c - t), mode="replicate")[:, 0]
        own_bmc = padded_bt.unflatten(1, (m, c))
        last_bm = F.pad(own_bmc[:, :, -1], (1, 0))
        y_gbmrc = _by_levels(kernel_gc, u_gbmrc, own_bmc)
        ends_gbmrc = _only(own_bmc == own_bmc[..., -1:], u_gbmrc)
    added_gbmrp = (ends_gbmrc.flatten(1, 3) @ chunk.adds_gcp).unflatten(1, (b, m, r))
    states = [state_gbrp]
    for i in range(m - 1):
        kept_gbrp = chunk.across(states[-1])
        if last_bm is not None:
            kept_gbrp = kept_gbrp.masked_fill((last_bm[:, i + 1] != last_bm[:, i])[:, None, None], 0)
        states.append(kept_gbrp + added_gbmrp[:, :, i])
    carried_gbmrc = (torch.stack(states, dim=2).flatten(1, 3) @ reads_gpc).unflatten(1, (b, m, r))
    if own_bmc is not None and last_bm is not None:
        carried_gbmrc = _only(own_bmc == last_bm[:, :-1, None], carried_gbmrc)
    return (y_gbmrc + carried_gbmrc).permute(1, 2, 4, 0, 3).reshape(b, m * c, d)[:, :t]


def final_state(
    u_btd: Tensor,
    chunk: Chunk,
    state_gbrp: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """The state ``[g, b, r, p]`` behind each row's last token; arguments as in `outputs`.

    Each row's last token is moved to the end of the last chunk, so that all chunks but the row's first are whole.
    """
    (b, t, _), g, c = u_btd.shape, len(chunk.adds_gcp), chunk.tokens
    (u_btd,) = chunks.blank(valid_bt, u_btd.to(state_gbrp.dtype))
    n_b = torch.full((b,), t, device=u_btd.device) if valid_bt is None else valid_bt.sum(1)
    documents_bt = chunks.settle(documents_bt, valid_bt)
    if documents_bt is not None:
        u_btd = u_btd.masked_fill((documents_bt != documents_bt[:, -1:])[..., None], 0)
        state_gbrp = state_gbrp.masked_fill((documents_bt[:, -1] != 0)[:, None, None], 0)
    if valid_bt is not None:
        source_bt = torch.arange(t, device=u_btd.device) - (t - n_b)[:, None]
        u_btd = u_btd.gather(1, source_bt.clamp(min=0)[..., None].expand_as(u_btd))
        u_btd = u_btd.masked_fill((source_bt < 0)[..., None], 0)
    u_gbmrc = _cut(F.pad(u_btd, (0, 0, -t % c, 0)), g, c)
    m = u_gbmrc.shape[2]
    added_gbmrp = (u_gbmrc.flatten(1, 3) @ chunk.adds_gcp).unflatten(1, u_gbmrc.shape[1:4])
    # The state enters behind the part of a chunk that a row begins with, or before the first of all.
    start_gbrp, enters_b = chunk.advance(state_gbrp, n_b % c), m - 1 - n_b // c
    end_gbrp = state_gbrp.masked_fill((enters_b >= 0)[:, None, None], 0)
    for i in range(m):
        entered_gbrp = start_gbrp.masked_fill((enters_b != i)[:, None, None], 0)
        end_gbrp = chunk.across(end_gbrp) + added_gbmrp[:, :, i] + entered_gbrp
    return end_gbrp


def _cut(u_btd: Tensor, g: int, c: int) -> Tensor:
    """``[b, t, d]`` with zeros behind the end as ``[g, b, m, r, c]``: m chunks, r channels of a group."""
    m = -(-u_btd.shape[1] // c)
    u_btd = F.pad(u_btd, (0, 0, 0, m * c - u_btd.shape[1]))
    return u_btd.unflatten(1, (m, c)).unflatten(-1, (g, -1)).permute(3, 0, 1, 4, 2).contiguous()


def _toeplitz(kernel_gl: Tensor, c: int, shift: int) -> Tensor:
    """``[g, c, c]`` from token j to token i: ``k_{shift + i - j}``, 0 where that would look ahead."""
    at_c = torch.arange(c, device=kernel_gl.device)
    apart_cc = shift + at_c - at_c[:, None]
    return kernel_gl[:, apart_cc.clamp(min=0)].masked_fill(apart_cc < 0, 0)


def _only(keep_bmc: Tensor, x_gbmrc: Tensor) -> Tensor:
    """`x_gbmrc` with zeros where `keep_bmc` is False."""
    return x_gbmrc.masked_fill(~keep_bmc[:, :, None], 0)


def _by_levels(kernel_gc: Tensor, u_gbmrc: Tensor, own_bmc: Tensor) -> Tensor:
    """The products within chunks where tokens of one document are seen only by those of the same.

    Blocks of 1, 2, 4, ... tokens meet their right neighbours at the common border. Whether j of the left and i of the
    right one are of the same document is whether both are of the document at the border, so a mask on each side of one
    Toeplitz matrix does it, and no matrix is ever made for a single chunk.
    """
    c = u_gbmrc.shape[-1]
    y_gbmrc = kernel_gc[:, None, None, None, :1] * u_gbmrc
    for level in range((c - 1).bit_length()):
        s = 1 << level
        left_bmks, right_bmks = own_bmc.unflatten(-1, (-1, 2, s)).unbind(-2)
        border_bmk1 = left_bmks[..., -1:]
        left_gbmrks = u_gbmrc.unflatten(-1, (-1, 2, s))[..., 0, :]
        seen_gbmrks = left_gbmrks.masked_fill((left_bmks != border_bmk1)[:, :, None], 0)
        made_gxs = seen_gbmrks.flatten(1, -2) @ _toeplitz(kernel_gc, s, s)
        made_gbmrks = made_gxs.view_as(seen_gbmrks).masked_fill((right_bmks != border_bmk1)[:, :, None], 0)
        y_gbmrc = y_gbmrc + F.pad(made_gbmrks, (s, 0)).flatten(-2)
    return y_gbmrc
