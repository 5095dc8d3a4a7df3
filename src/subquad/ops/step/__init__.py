"""One token through linear state spaces, diagonal ones or diagonal plus rank one: what they decode with."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.ops.backends import Backends

__all__ = ["alone", "read", "table", "write_"]

_backends = Backends(__name__)


def table(
    keep_gn: Tensor, input_gn: Tensor, output_gn: Tensor, low_gn: Tensor | None = None, sees_gn: Tensor | None = None
) -> Tensor:
    """What a step needs of a system, real ``[k, g, n, 2]`` with 3 or 5 parts; all arguments are complex ``[g, n]``.

    ``x <- keep x + input u - low Re(sum sees x)``, then ``y = Re sum output x``; without `low` and `sees` the system is
    diagonal. It asks for a handful of launches, so whoever decodes keeps it as long as the weights stay.
    """
    parts = [keep_gn, input_gn, output_gn]
    if low_gn is not None and sees_gn is not None:
        parts += [low_gn, sees_gn]
    return torch.view_as_real(torch.stack(torch.broadcast_tensors(*parts)))


def alone(layout: Layout) -> bool:
    """Whether a block is one token a row of the state's own document, which nobody differentiates through."""
    return layout.shape[1] == 1 and layout.documents_bt is None and not torch.is_grad_enabled()


def read(u_bd: Tensor, table_kgnp: Tensor, state_bdnp: Tensor) -> Tensor:
    """The output behind one token, ``[b, d]`` in the dtype of the inputs; the state stays as it is.

    Args:
        u_bd: inputs; ``d / g`` channels in succession share a system.
        table_kgnp: of `table`.
        state_bdnp: before the token, real and imaginary part along p.

    Raises:
        ConfigError: shapes that do not fit together.
    """
    _check(u_bd, table_kgnp, state_bdnp)
    return _backends.choose(u_bd, table_kgnp, state_bdnp).read(u_bd, table_kgnp, state_bdnp)


def write_(
    pool_bdnp: Tensor, rows_b: Tensor | None, u_bd: Tensor, table_kgnp: Tensor, state_bdnp: Tensor, n_b: Tensor
) -> None:
    """Write the state behind one token into rows of a pool.

    Args:
        pool_bdnp: written in place; with all rows in order it may be the state itself.
        rows_b: its row for each of the block's; None is all in order.
        u_bd, table_kgnp, state_bdnp: as in `read`.
        n_b: int64, tokens that are kept of each row; without one a row's state is written as it was.

    Raises:
        ConfigError: shapes that do not fit together.
    """
    _check(u_bd, table_kgnp, state_bdnp)
    chosen = _backends.choose(u_bd, table_kgnp, state_bdnp, pool_bdnp)
    chosen.write_(pool_bdnp, rows_b, u_bd, table_kgnp, state_bdnp, n_b)


def _check(u_bd: Tensor, table_kgnp: Tensor, state_bdnp: Tensor) -> None:
    k, g, n, _ = table_kgnp.shape
    b, d = u_bd.shape
    if k not in (3, 5) or g < 1 or d % g:
        raise ConfigError(f"table_kgnp: expected 3 or 5 parts of systems that divide d={d}, got {k} of {g}; make a new")
    if state_bdnp.shape != (b, d, n, 2):
        raise ConfigError(
            f"state_bdnp: expected shape {(b, d, n, 2)}, got {tuple(state_bdnp.shape)}; use the state of this system"
        )
