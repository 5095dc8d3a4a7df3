"""A step in PyTorch, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import chunks
from subquad.ops.step.tables import Table


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def read(u_bd: Tensor, table: Table, state_bdnp: Tensor, skip_d: Tensor | None, gelu: bool) -> Tensor:
    """`subquad.ops.step.read`."""
    dtype = chunks.compute_dtype(u_bd, table.reads_gnp, state_bdnp)
    reads_g1np, direct_g1 = table.reads_gnp.to(dtype)[:, None], table.direct_g.to(dtype)[:, None]
    u_bgr, state_bgrnp = (x.to(dtype).unflatten(1, (len(direct_g1), -1)) for x in (u_bd, state_bdnp))
    y_bd = ((reads_g1np * state_bgrnp).sum((-2, -1)) + direct_g1 * u_bgr).flatten(1)
    if skip_d is not None:
        y_bd = y_bd + skip_d.to(dtype) * u_bd.to(dtype)
    return (F.gelu(y_bd) if gelu else y_bd).to(u_bd.dtype)


def write_(
    pool_bdnp: Tensor, rows_b: Tensor | None, u_bd: Tensor, moves_kgnp: Tensor, state_bdnp: Tensor, n_b: Tensor
) -> None:
    """`subquad.ops.step.write_`."""
    dtype = chunks.compute_dtype(u_bd, moves_kgnp, state_bdnp)
    keep_g1n, input_g1n, *low = (torch.view_as_complex(x.contiguous())[:, None] for x in moves_kgnp.to(dtype))
    g = len(keep_g1n)
    x_bgrn = torch.view_as_complex(state_bdnp.to(dtype).contiguous()).unflatten(1, (g, -1))
    after_bgrn = keep_g1n * x_bgrn + input_g1n * u_bd.to(dtype).unflatten(1, (g, -1))[..., None]
    if low:
        after_bgrn = after_bgrn - low[0] * (low[1] * x_bgrn).sum(-1, keepdim=True).real
    after_bdnp = torch.view_as_real(after_bgrn).flatten(1, 2).to(pool_bdnp.dtype)
    after_bdnp = torch.where((n_b > 0)[:, None, None, None], after_bdnp, state_bdnp.to(pool_bdnp.dtype))
    if rows_b is None:
        pool_bdnp.copy_(after_bdnp)
    else:
        pool_bdnp.index_copy_(0, rows_b, after_bdnp)


def advance_(u_bd: Tensor, table: Table, state_bdnp: Tensor, n_b: Tensor, skip_d: Tensor | None, gelu: bool) -> Tensor:
    """`subquad.ops.step.advance_`."""
    y_bd = read(u_bd, table, state_bdnp, skip_d, gelu)
    write_(state_bdnp, None, u_bd, table.moves_kgnp, state_bdnp, n_b)
    return y_bd
