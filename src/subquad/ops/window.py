"""Sliding-window attention in linear time: a band of keys for each chunk of queries, and sinks beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.core.layout import Layout
from subquad.core.state import State, axes


@dataclass(frozen=True)
class Band:
    """Queries in chunks with the keys each chunk may see; the chunks stand in the batch axis.

    Attributes:
        q_xchk: ``[b * chunks, c, h, k]``.
        k_xgnk, v_xgnk: keys and values, sinks first.
        allowed_xcn: bool mask.
        batch, time: b and t, the latter before padding to whole chunks.
    """

    q_xchk: Tensor
    k_xgnk: Tensor
    v_xgnk: Tensor
    allowed_xcn: Tensor
    batch: int
    time: int

    def join(self, y_xc: Tensor) -> Tensor:
        """Bring a result ``[b * chunks, c, ...]`` back to ``[b, t, ...]``."""
        return y_xc.unflatten(0, (self.batch, -1)).flatten(1, 2)[:, : self.time]


def fill_sinks(sink_bgsk: Tensor, block_bgtk: Tensor, seen_b: Tensor, start_b: Tensor | int = 0) -> Tensor:
    """The first s tokens of the document: from the store where it has them, else from the block.

    Args:
        sink_bgsk: store, slot j valid when ``j < seen_b``.
        block_bgtk: keys or values of the block.
        seen_b: tokens of the document before the block; 0 for one that starts in it.
        start_b: column at which the document's first token of the block stands.

    Returns:
        ``[b, g, s, k]``; slots of tokens that have not come yet hold arbitrary finite values.
    """
    s, t = sink_bgsk.shape[2], block_bgtk.shape[2]
    slots_s = torch.arange(s, device=seen_b.device)
    start_b1 = start_b[:, None] if isinstance(start_b, Tensor) else start_b
    column_bs = (slots_s - seen_b[:, None] + start_b1).clamp(0, max(t - 1, 0))
    source_bs = torch.where(slots_s < seen_b[:, None], slots_s, s + column_bs)
    joint_bgnk = torch.cat((sink_bgsk, block_bgtk), dim=2)
    return joint_bgnk.gather(2, source_bs[:, None, :, None].expand(-1, joint_bgnk.shape[1], -1, joint_bgnk.shape[3]))


@dataclass(frozen=True)
class WindowState(State):
    """Keys and values of the last w tokens, right-aligned, and of the first s of the document."""

    window_k_bgwk: Tensor = axes("b g w k", shard="g")
    window_v_bgwk: Tensor = axes("b g w k", shard="g")
    sink_k_bgsk: Tensor = axes("b g s k", shard="g")
    sink_v_bgsk: Tensor = axes("b g s k", shard="g")
    seen_b: Tensor = axes("b", precision="index")

    @staticmethod
    def empty(batch: int, n_kv_heads: int, window: int, sinks: int, head_dim: int, **factory: Any) -> WindowState:
        """A state before the first token; `factory` is ``device`` and ``dtype``."""
        window_bgwk = torch.zeros(batch, n_kv_heads, window, head_dim, **factory)
        sink_bgsk = torch.zeros(batch, n_kv_heads, sinks, head_dim, **factory)
        seen_b = torch.zeros(batch, dtype=torch.int64, device=factory["device"])
        return WindowState(window_bgwk, window_bgwk.clone(), sink_bgsk, sink_bgsk.clone(), seen_b)

    @staticmethod
    def filling(nbytes: int, n_kv_heads: int, sinks: int, head_dim: int, *, dtype: torch.dtype) -> int:
        """The shortest window, at least 1, whose state of one row takes `nbytes` or more."""
        one, two = (
            WindowState.empty(1, n_kv_heads, w, sinks, head_dim, device="meta", dtype=dtype).nbytes for w in (1, 2)
        )
        return max(1, 1 - (one - nbytes) // (two - one))

    @staticmethod
    def before(k_btgk: Tensor, v_btgv: Tensor, window: int, sinks: int) -> WindowState:
        """A state before the first token, for keys and values like these."""
        b, _, g, k = k_btgk.shape
        v = v_btgv.shape[3]
        seen_b = torch.zeros(b, dtype=torch.int64, device=k_btgk.device)
        return WindowState(
            k_btgk.new_zeros(b, g, window, k),
            v_btgv.new_zeros(b, g, window, v),
            k_btgk.new_zeros(b, g, sinks, k),
            v_btgv.new_zeros(b, g, sinks, v),
            seen_b,
        )

    def after(self, k_bgtk: Tensor, v_bgtk: Tensor, layout: Layout, n_b: Tensor) -> WindowState:
        """The state after the first `n_b` tokens of a block."""
        kept_bt, continues_b = layout.tail(n_b)
        kept_b = kept_bt.sum(1)
        seen_b, start_b = torch.where(continues_b, self.seen_b, 0), torch.where(continues_b, 0, n_b - kept_b)
        return WindowState(
            shift(self.window_k_bgwk, k_bgtk, n_b),
            shift(self.window_v_bgwk, v_bgtk, n_b),
            fill_sinks(self.sink_k_bgsk, k_bgtk, seen_b, start_b),
            fill_sinks(self.sink_v_bgsk, v_bgtk, seen_b, start_b),
            seen_b + kept_b,
        )


@dataclass(frozen=True)
class Far:
    """How queries weigh the tokens that have left the window.

    Attributes:
        weight_bthf: logarithm of the weight of each query for each feature.
        f_btgf: features of the block's keys, none below 0.
        window_f_bgnf: features of the window before the block, at least of the min(t, w) oldest tokens in it, which
            are all that leave it within the block; None when nothing stands before it.
        state_bgfv: ``sum f_j v_j^T`` over the tokens before that window, sinks left out, and as its last channel
            ``sum f_j``; None when nothing stands before the block.
        bias_hf: added to `weight_bthf`, which may then be less precise; None is zero.
    """

    weight_bthf: Tensor
    f_btgf: Tensor
    window_f_bgnf: Tensor | None = None
    state_bgfv: Tensor | None = None
    bias_hf: Tensor | None = None

    def weights(self) -> Tensor:
        """Log weights with their bias."""
        return self.weight_bthf if self.bias_hf is None else self.weight_bthf + self.bias_hf


@dataclass(frozen=True)
class Leaving:
    """For each column t of a block, the token that leaves the window when t enters it."""

    f_btgf: Tensor
    v_btgv: Tensor
    documents_bt: Tensor


def leaving(state: WindowState, window_f_bgnf: Tensor, v_bgtv: Tensor, f_bgtf: Tensor, layout: Layout) -> Leaving:
    """Features and values of what leaves the window; zero features where nothing does, or a sink.

    Args:
        state: what stands before the block.
        window_f_bgnf: features of the oldest tokens of its window, as in `Far`.
        v_bgtv, f_bgtf: values and features of the block.
        layout: the block's.
    """
    t = f_bgtf.shape[2]
    w, s = state.window_k_bgwk.shape[2], state.sink_k_bgsk.shape[2]
    f_btgf = torch.cat((window_f_bgnf, f_bgtf), dim=2)[:, :, :t].transpose(1, 2)
    v_btgv = torch.cat((state.window_v_bgwk, v_bgtv), dim=2)[:, :, :t].transpose(1, 2)
    seen_b = state.seen_b
    past_bw = seen_b[:, None] - w + torch.arange(w, device=seen_b.device)
    index_bt = torch.cat((past_bw, layout.index_bt(seen_b)), dim=1)[:, :t]
    documents_bt = layout.lengths_b.new_zeros(layout.shape) if layout.documents_bt is None else layout.documents_bt
    documents_bt = torch.cat((documents_bt.new_zeros(len(seen_b), w), documents_bt), dim=1)[:, :t]
    return Leaving(f_btgf * (index_bt >= s)[..., None, None], v_btgv, documents_bt)


def band(q_bthk: Tensor, k_bgtk: Tensor, v_bgtk: Tensor, state: WindowState, layout: Layout) -> Band:
    """Lay out a block's queries against the window before it, the block itself and the sinks.

    Query t sees keys of its own document with ``0 <= index_q - index_k < w`` or ``index_k < s``.

    Args:
        q_bthk: the block's queries.
        k_bgtk, v_bgtk: the block's keys and values, heads first.
        state: what stands before the block.
        layout: the block's.
    """
    b, t = q_bthk.shape[:2]
    seen_b, window, device = state.seen_b, state.window_k_bgwk.shape[2], q_bthk.device
    k_bgmk, v_bgmk = torch.cat((state.window_k_bgwk, k_bgtk), 2), torch.cat((state.window_v_bgwk, v_bgtk), 2)
    s = state.sink_k_bgsk.shape[2]
    index_bt = layout.index_bt(seen_b)
    # Packed documents each have sinks of their own inside the block, so their band is the whole block.
    whole = layout.documents_bt is not None or t <= window
    chunk = t if whole else window
    n_chunks = -(-t // chunk)
    pad = n_chunks * chunk - t

    def chunked(x: Tensor, dim: int, size: int) -> Tensor:
        """Windows of `size` every `chunk` along `dim`, moved into the batch axis."""
        if pad:
            x = torch.cat((x, x.new_zeros(*x.shape[:dim], pad, *x.shape[dim + 1 :])), dim)
        return x.unfold(dim, size, chunk).movedim(dim, 1).movedim(-1, dim + 1).flatten(0, 1)

    past_bw = seen_b[:, None] - window + torch.arange(window, device=device)
    index_bm = torch.cat((past_bw, index_bt), dim=1)
    index_xc, index_xn = chunked(index_bt, 1, chunk), chunked(index_bm, 1, chunk + window)
    distance_cn = (
        torch.arange(chunk, device=device)[:, None] + window - torch.arange(chunk + window, device=device)[None, :]
    )
    inside_xcn = ((distance_cn >= 0) & (distance_cn < window))[None] & (index_xn >= 0)[:, None]
    sink_xcs = torch.arange(s, device=device) <= index_xc[..., None] - window
    if layout.documents_bt is not None:
        document_bm = torch.cat((layout.documents_bt.new_zeros(b, window), layout.documents_bt), dim=1)
        own = layout.documents_bt[:, :, None] == document_bm[:, None]
        later_sink = (layout.documents_bt > 0)[:, :, None] & (index_bm < s)[:, None] & (distance_cn >= 0)
        inside_xcn = own & (inside_xcn | later_sink)
        sink_xcs = sink_xcs & (layout.documents_bt == 0)[..., None]
    allowed_xcn = torch.cat((sink_xcs, inside_xcn), dim=-1)

    def keys(sink_bgsk: Tensor, joint_bgmk: Tensor, block_bgtk: Tensor) -> Tensor:
        filled_bgsk = fill_sinks(sink_bgsk, block_bgtk, seen_b).repeat_interleave(n_chunks, dim=0)
        return torch.cat((filled_bgsk, chunked(joint_bgmk, 2, chunk + window)), dim=2)

    k_xgnk, v_xgnk = keys(state.sink_k_bgsk, k_bgmk, k_bgtk), keys(state.sink_v_bgsk, v_bgmk, v_bgtk)
    return Band(chunked(q_bthk, 1, chunk), k_xgnk, v_xgnk, allowed_xcn, b, t)


def shift(window_bgwk: Tensor, block_bgtk: Tensor, n_b: Tensor) -> Tensor:
    """The last w of the window's tokens and the first `n_b` of the block's, right-aligned, ``[b, g, w, k]``."""
    w = window_bgwk.shape[2]
    source_bw = n_b[:, None] + torch.arange(w, device=n_b.device)
    joint_bgmk = torch.cat((window_bgwk, block_bgtk), dim=2)
    return joint_bgmk.gather(2, source_bw[:, None, :, None].expand(-1, joint_bgmk.shape[1], -1, joint_bgmk.shape[3]))
