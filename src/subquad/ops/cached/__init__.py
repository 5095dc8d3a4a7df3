"""Attention of a few queries over cached keys of many lengths, and the cache's own writes."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.ops import launch
from subquad.ops.backends import Backends
from subquad.ops.cached import on_torch
from subquad.ops.cached.equation import equation, visible

__all__ = ["append_", "attend", "attend_", "check_room", "equation", "places", "visible"]

_backends = Backends(__name__)

# Numbers of a block that one program copies.
MOST_COPIED = 32_768


def attend(
    q_bthk: Tensor,
    k_bgtk: Tensor,
    v_bgtv: Tensor,
    k_bgnk: Tensor,
    v_bgnv: Tensor,
    seen_b: Tensor,
    scale: float,
    tables: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a block to a cache's first `seen_b` tokens and, causally, to itself: ``[b, t, h, v]``.

    With the outputs come the block's keys at their positions, ``[b, g, t, k]``, as the cache is to take them.
    Neither keys nor values are copied, and a row reads no more of them than it has seen. Without gradients.

    Args:
        q_bthk: few queries.
        k_bgtk, v_bgtv: the block's keys and values, heads first.
        k_bgnk, v_bgnv: the cache.
        seen_b: int64 ``[b]``, tokens in it.
        scale: factor on the scores.
        tables: of `subquad.ops.rope.tables`, where queries and the block's keys come without position; a cache holds
            keys at their positions always.

    Raises:
        ConfigError: shapes do not fit each other.
    """
    _check(q_bthk, k_bgtk, v_bgtv, k_bgnk, v_bgnv, seen_b)
    chosen = _backends.choose(q_bthk, k_bgtk, v_bgtv, k_bgnk, v_bgnv)
    return chosen.attend(q_bthk, k_bgtk, v_bgtv, k_bgnk, v_bgnv, seen_b, scale, tables)


def attend_(
    q_bthk: Tensor,
    k_bgtk: Tensor,
    v_bgtv: Tensor,
    k_bgnk: Tensor,
    v_bgnv: Tensor,
    seen_b: Tensor,
    scale: float,
    tables: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`attend`, which also writes the block into the cache behind the tokens seen, in place, as far as there is room.

    So tokens are committed by counting them in `seen_b`, which is left as it is.
    """
    _check(q_bthk, k_bgtk, v_bgtv, k_bgnk, v_bgnv, seen_b)
    chosen = _backends.choose(q_bthk, k_bgtk, v_bgtv, k_bgnk, v_bgnv)
    return chosen.attend_(q_bthk, k_bgtk, v_bgtv, k_bgnk, v_bgnv, seen_b, scale, tables)


def _check(q_bthk: Tensor, k_bgtk: Tensor, v_bgtv: Tensor, k_bgnk: Tensor, v_bgnv: Tensor, seen_b: Tensor) -> None:
    """Refuse shapes that do not fit each other."""
    sizes = launch.axes(k_bgtk=k_bgtk, v_bgtv=v_bgtv, seen_b=seen_b)
    sizes |= launch.axes(k_bgnk=k_bgnk, v_bgnv=v_bgnv, seen_b=seen_b)
    b, t, h, k = q_bthk.shape
    if (b, t, k) != (sizes["b"], sizes["t"], sizes["k"]) or k_bgtk.shape[1] != k_bgnk.shape[1]:
        raise ConfigError(
            f"q_bthk: expected {sizes['b']} rows of {sizes['t']} tokens and {sizes['k']} channels, keys and cache of "
            f"the same heads, got {tuple(q_bthk.shape)}, {tuple(k_bgtk.shape)} and {tuple(k_bgnk.shape)}; reshape them"
        )
    launch.heads(h, k_btgk=k_bgtk.transpose(1, 2))


def append_(
    k_bgnk: Tensor,
    v_bgnv: Tensor,
    seen_b: Tensor,
    k_bgtk: Tensor,
    v_bgtv: Tensor,
    n_b: Tensor,
    rows_b: Tensor | None = None,
    first_b: Tensor | None = None,
    start_b: Tensor | None = None,
) -> None:
    """Write a block's tokens ``[first, n)`` into a cache from slot `start` on, and count what a row then holds.

    In place; what finds no room is dropped.

    Args:
        k_bgnk, v_bgnv: the cache.
        seen_b: int64, tokens of each of its rows; becomes ``start + n - first``.
        k_bgtk, v_bgtv: the block.
        n_b: int64 ``[b]``, like all that follow.
        rows_b: the cache's row of each row of the block, no two alike; None is its first in order.
        first_b: None is 0.
        start_b: None is behind what the row holds.
    """
    block, (_, g, t, k) = (k_bgtk, v_bgtv), k_bgtk.shape
    of_torch = g * t * k > MOST_COPIED or (torch.is_grad_enabled() and k_bgtk.requires_grad)
    chosen = on_torch if of_torch else _backends.choose(k_bgnk, v_bgnv, *block)
    chosen.append_(k_bgnk, v_bgnv, seen_b, *block, n_b, rows_b, first_b, start_b)


def check_room(layout: Layout, seen_b: Tensor, n_b: Tensor, capacity: int, what: str) -> None:
    """Refuse a commit of the first `n_b` tokens of a block that a cache has no room for.

    Args:
        layout: of the block.
        seen_b: tokens that each row's cache holds.
        n_b: int64 ``[b]``, tokens kept.
        capacity: tokens that a row has room for.
        what: the cache's name in the message.

    Raises:
        ConfigError: more tokens of the last document than that.
    """
    kept_bt, continues_b = layout.tail(n_b)
    needed_b = torch.where(continues_b, seen_b, 0) + kept_bt.sum(1)
    needed = int(needed_b.max()) if len(n_b) else 0
    if needed > capacity:
        raise ConfigError(
            f"{what}: expected at most capacity={capacity} tokens, got {needed}; call init_state with a larger capacity"
        )


def places(layout: Layout, seen_b: Tensor, n_b: Tensor, rows: Tensor | None) -> dict[str, Tensor]:
    """``first_b`` and ``start_b`` of `append_` where a block holds several documents: only the last one's tokens stay.

    Args:
        layout: of the block.
        seen_b: tokens that each row of the cache holds.
        n_b: int64 ``[b]``, tokens kept.
        rows: of the cache, aligned with the block's; None is the first.
    """
    if layout.documents_bt is None:
        return {}
    kept_bt, continues_b = layout.tail(n_b)
    seen_b = seen_b[: len(n_b)] if rows is None else seen_b[rows]
    return {"first_b": n_b - kept_bt.sum(1), "start_b": torch.where(continues_b, seen_b, 0)}
