"""The decode step of a recurrent layer: commit what was accepted, read the next tokens, in place and in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.core.errors import ConfigError, nearest
from subquad.ops import launch
from subquad.ops.backends import Backends
from subquad.ops.decode.equation import Block, Rule, Weights, equation
from subquad.ops.decode.pool import DecodeState, init_pool

__all__ = ["Block", "DecodeState", "Rule", "Weights", "advance_", "equation", "init_pool"]

_backends = Backends(__name__)


def advance_(
    block: Block,
    pool: DecodeState,
    rule: Rule,
    weights: Weights,
    seen_b: Tensor,
    n_b: Tensor,
    rows_b: Tensor | None = None,
) -> Tensor:
    """Commit the first `n_b` tokens of each row's pending block, read `block`, and leave it pending.

    ``S <- exp(g_1 + ... + g_n) S + sum_{j <= n} exp(g_{j+1} + ... + g_n) k_j u_j^T`` over the pending tokens, then the
    recurrence of `Rule` over the new ones, whose outputs and whose k, u, g are kept while S is not. So a step of one
    token and the verification of several read the state once and write it once, and where n is 0 it is not written.
    Nothing waits for the device; everything may be captured in a CUDA graph. No gradient flows through it.

    Args:
        block: the new tokens, at most as many as the pool's block; none only commits.
        pool: the layer's buffers, changed in place.
        rule: the recurrence.
        weights: the layer's own.
        seen_b: int32 or int64 ``[b]``: tokens each row's state has seen, so without the pending ones. It is the
            caller's, one for all layers: add `n_b` to it behind the last layer.
        n_b: int32 or int64 ``[b]``: how many pending tokens were accepted; 0 where none are pending.
        rows_b: int32 or int64 ``[b]``: row of the pool of each row of the batch, no two alike; negative where there is
            no sequence: no buffer is touched there, and the outputs are zeros. None is the pool's first rows in order.

    Returns:
        ``[b, t, h, v]`` in the dtype of the values.

    Raises:
        ConfigError: shapes that do not fit each other or the pool.

    Example:
        >>> import torch
        >>> from subquad.ops.decode import Block, Rule, Weights, advance_, init_pool
        >>> pool = init_pool(2, block=3, heads=1, key_dim=4, value_dim=4)
        >>> seen_b, n_b = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        >>> block = Block(*torch.randn(3, 2, 3, 1, 4), torch.zeros(2, 3, 1, 1))
        >>> advance_(block, pool, Rule(delta=False), Weights(), seen_b, n_b).shape
        torch.Size([2, 3, 1, 4])
    """
    _check(block, pool, rule, weights, seen_b, n_b, rows_b)
    tensors = block.q_bthk, block.k_bthk, block.v_bthv, block.g_bthk, pool.keys_bnhk, pool.recurrent_bhkv
    with torch.no_grad():
        return _backends.choose(*tensors).advance_(block, pool, rule, weights, seen_b, n_b, rows_b)


def _check(
    block: Block, pool: DecodeState, rule: Rule, weights: Weights, seen_b: Tensor, n_b: Tensor, rows_b: Tensor | None
) -> None:
    sizes = launch.axes(
        q_bthk=block.q_bthk, k_bthk=block.k_bthk, v_bthv=block.v_bthv, beta_bth=block.beta_bth, seen_b=seen_b, n_b=n_b,
        rows_b=rows_b,
    )  # fmt: skip
    b, t, k, v = (sizes[letter] for letter in "btkv")
    _, h, state_k, state_v = pool.recurrent_bhkv.shape
    _, slots, k_heads, _ = pool.keys_bnhk.shape
    if block.g_bthk.shape not in ((b, t, h, 1), (b, t, h, k)):
        raise ConfigError(
            f"g_bthk: expected shape {(b, t, h, 1)} or {(b, t, h, k)}, got {tuple(block.g_bthk.shape)}; "
            "give decays for every head of the pool, with a last axis"
        )
    launch.heads(h, q_bthk=block.q_bthk, k_bthk=block.k_bthk, v_bthv=block.v_bthv)
    got = (block.k_bthk.shape[2], k, v, block.g_bthk.shape[3])
    want = (k_heads, state_k, state_v, pool.decays_bnhk.shape[3])
    if got != want:
        raise ConfigError(
            f"pool: expected heads and channels of k, channels of v and g as in the block, {got}, got {want}; "
            "use a pool of this layer"
        )
    if t > slots // 2:
        raise ConfigError(f"block: expected at most {slots // 2} tokens as the pool has room for, got {t}; cut it")
    if rows_b is None and b > pool.recurrent_bhkv.shape[0]:
        raise ConfigError(
            f"pool: expected at least {b} rows, got {pool.recurrent_bhkv.shape[0]}; make it larger, or give rows_b"
        )
    if rule.activation not in ("silu", "none"):
        raise ConfigError(f"unknown activation {rule.activation!r}{nearest(rule.activation, ('silu', 'none'))}")
    for name, x, shape in (("beta_bth", block.beta_bth, (b, t, h)), ("skip_h", weights.skip_h, (h,))):
        if x is not None and x.shape != shape:
            raise ConfigError(f"{name}: expected shape {shape}, got {tuple(x.shape)}; give one number for every head")
    for name, x in (("seen_b", seen_b), ("n_b", n_b), ("rows_b", rows_b)):
        if x is not None and x.dtype not in (torch.int32, torch.int64):
            raise ConfigError(f"{name}: expected int32 or int64, got {x.dtype}; cast it")
    if rule.delta and block.beta_bth is None:
        raise ConfigError("beta_bth: expected a tensor for the delta rule, got None; give one, of ones if need be")
    if not all(x.is_contiguous() for _, x in pool.tensors()):
        raise ConfigError("pool: expected contiguous tensors, got views; make it with init_pool")
    if weights.conv_dw is not None:
        channels = sum(x.shape[2] * x.shape[3] for x in (block.q_bthk, block.k_bthk, block.v_bthv))
        if weights.bias_d is not None and weights.bias_d.shape != (channels,):
            raise ConfigError(f"bias_d: expected shape {(channels,)}, got {tuple(weights.bias_d.shape)}; one a channel")
        width, room = weights.conv_dw.shape[1], pool.inputs_brd.shape[1]
        dtypes = {x.dtype for x in (block.q_bthk, block.k_bthk, block.v_bthv, pool.inputs_brd)}
        if len(dtypes) > 1:
            raise ConfigError(
                f"block: expected q, k and v of the pool's {pool.inputs_brd.dtype}, got {block.q_bthk.dtype}, "
                f"{block.k_bthk.dtype} and {block.v_bthv.dtype}; make the pool with their dtype"
            )
        if weights.conv_dw.shape[0] != channels or pool.inputs_brd.shape[2] != channels:
            raise ConfigError(
                f"conv_dw: expected the {channels} channels of v, k and q, got {weights.conv_dw.shape[0]} and "
                f"{pool.inputs_brd.shape[2]} in the pool; order them so"
            )
        if width > 1 and room < width - 1 + slots // 2:
            raise ConfigError(
                f"pool: expected room for {width - 1 + slots // 2} inputs of a convolution of {width} taps, "
                f"got {room}; name conv_width in init_pool"
            )
