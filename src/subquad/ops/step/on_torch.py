"""A step in PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import chunks


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def read(u_bd: Tensor, table_kgnp: Tensor, state_bdnp: Tensor) -> Tensor:
    """`subquad.ops.step.read`."""
    dtype = chunks.compute_dtype(u_bd, table_kgnp, state_bdnp)
    output_g1n = torch.view_as_complex(table_kgnp[2].to(dtype).contiguous())[:, None]
    return (output_g1n * _after(u_bd, table_kgnp, state_bdnp, dtype)).sum(-1).real.flatten(1).to(u_bd.dtype)


def write_(
    pool_bdnp: Tensor, rows_b: Tensor | None, u_bd: Tensor, table_kgnp: Tensor, state_bdnp: Tensor, n_b: Tensor
) -> None:
    """`subquad.ops.step.write_`."""
    dtype = chunks.compute_dtype(u_bd, table_kgnp, state_bdnp)
    after_bdnp = torch.view_as_real(_after(u_bd, table_kgnp, state_bdnp, dtype)).flatten(1, 2).to(pool_bdnp.dtype)
    after_bdnp = torch.where((n_b > 0)[:, None, None, None], after_bdnp, state_bdnp.to(pool_bdnp.dtype))
    if rows_b is None:
        pool_bdnp.copy_(after_bdnp)
    else:
        pool_bdnp.index_copy_(0, rows_b, after_bdnp)


def _after(u_bd: Tensor, table_kgnp: Tensor, state_bdnp: Tensor, dtype: torch.dtype) -> Tensor:
    """The complex state behind the token, ``[b, g, r, n]``."""
    keep_g1n, input_g1n, _, *low = (torch.view_as_complex(x.contiguous())[:, None] for x in table_kgnp.to(dtype))
    g = len(keep_g1n)
    x_bgrn = torch.view_as_complex(state_bdnp.to(dtype).contiguous()).unflatten(1, (g, -1))
    after_bgrn = keep_g1n * x_bgrn + input_g1n * u_bd.to(dtype).unflatten(1, (g, -1))[..., None]
    if low:
        after_bgrn = after_bgrn - low[0] * (low[1] * x_bgrn).sum(-1, keepdim=True).real
    return after_bgrn
