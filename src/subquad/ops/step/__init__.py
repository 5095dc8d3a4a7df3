"""One token through linear state spaces, diagonal ones or diagonal plus rank one: what they decode with."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.ops.backends import Backends
from subquad.ops.step.tables import Table, table

__all__ = ["Table", "advance_", "alone", "read", "table", "write_"]

_backends = Backends(__name__)


def alone(layout: Layout) -> bool:
    """Whether a block is one token a row of the state's own document, which nobody differentiates through."""
    return layout.shape[1] == 1 and layout.documents_bt is None and not torch.is_grad_enabled()


def read(u_bd: Tensor, table: Table, state_bdnp: Tensor, skip_d: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """The output behind one token, ``[b, d]`` in the dtype of the inputs; the state stays as it is.

    Args:
        u_bd: inputs; ``d / g`` channels in succession share a system.
        table: of the systems.
        state_bdnp: before the token, real and imaginary part along p.
        skip_d: what each channel adds of its input to its output.
        gelu: take GELU of the output.

    Raises:
        ConfigError: shapes that do not fit together.
    """
    _check(u_bd, table, state_bdnp, skip_d)
    return _backends.choose(u_bd, state_bdnp, *table).read(u_bd, table, state_bdnp, skip_d, gelu)


def write_(
    pool_bdnp: Tensor, rows_b: Tensor | None, u_bd: Tensor, table: Table, state_bdnp: Tensor, n_b: Tensor
) -> None:
    """Write the state behind one token into rows of a pool.

    Args:
        pool_bdnp: written in place; with all rows in order it may be the state itself.
        rows_b: its row for each of the block's; None is all in order.
        u_bd, table, state_bdnp: as in `read`.
        n_b: int64, tokens that are kept of each row; without one a row's state is written as it was.

    Raises:
        ConfigError: shapes that do not fit together.
    """
    _check(u_bd, table, state_bdnp)
    chosen = _backends.choose(u_bd, state_bdnp, *table, pool_bdnp)
    chosen.write_(pool_bdnp, rows_b, u_bd, table.moves_kgnp, state_bdnp, n_b)


def advance_(
    u_bd: Tensor,
    table: Table,
    state_bdnp: Tensor,
    n_b: Tensor,
    skip_d: Tensor | None = None,
    *,
    gelu: bool = False,
) -> Tensor:
    """`read`, and where the token is kept `write_` into the state itself: both in one pass over it.

    Args:
        u_bd, table, skip_d, gelu: as in `read`.
        state_bdnp: before the token; written in place.
        n_b: int64, 1 where the row's token is kept, else 0.

    Raises:
        ConfigError: shapes that do not fit together.
    """
    _check(u_bd, table, state_bdnp, skip_d)
    return _backends.choose(u_bd, state_bdnp, *table).advance_(u_bd, table, state_bdnp, n_b, skip_d, gelu)


def _check(u_bd: Tensor, table: Table, state_bdnp: Tensor, skip_d: Tensor | None = None) -> None:
    k, g, n, _ = table.moves_kgnp.shape
    b, d = u_bd.shape
    if k not in (2, 4) or g < 1 or d % g:
        raise ConfigError(f"table: expected 2 or 4 moves of systems that divide d={d}, got {k} of {g}; make a new one")
    if state_bdnp.shape != (b, d, n, 2):
        raise ConfigError(
            f"state_bdnp: expected shape {(b, d, n, 2)}, got {tuple(state_bdnp.shape)}; use the state of this system"
        )
    if skip_d is not None and skip_d.shape != (d,):
        raise ConfigError(f"skip_d: expected a number for each of {d=}, got shape {tuple(skip_d.shape)}; give as many")
