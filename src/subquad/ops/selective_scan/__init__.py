"""The selective state space of Mamba: a diagonal recurrence whose step, input and output depend on the token."""

from __future__ import annotations

from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.ops import launch
from subquad.ops.backends import Backends
from subquad.ops.selective_scan.equation import equation

__all__ = ["equation", "final_state", "scan"]

_backends = Backends(__name__)


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
    """Outputs and final state of `equation`, by chunks of tokens; arguments and results are the same.

    The tensors' device chooses the implementation; see `subquad.ops.backends`. Gradients flow through both results;
    what they need of the states between tokens is computed again, chunk by chunk, and never kept.

    Raises:
        ConfigError: shapes that do not belong together.
    """
    launch.axes(
        u_btd=u_btd, dt_btd=dt_btd, A_dn=A_dn, B_btgn=B_btgn, C_btgn=C_btgn, D_d=D_d, state_bdn=state_bdn,
        valid_bt=valid_bt, documents_bt=documents_bt,
    )  # fmt: skip
    _divides(B_btgn, u_btd)
    chosen = _backends.choose(u_btd, dt_btd, A_dn, B_btgn, C_btgn, D_d, state_bdn)
    where = {"valid_bt": valid_bt, "documents_bt": documents_bt}
    return chosen.scan(u_btd, dt_btd, A_dn, B_btgn, C_btgn, D_d, state_bdn, **where)


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
    """The final state of `scan` alone, where the outputs are not needed.

    ``h_T = exp(A (dt_1 + ... + dt_T)) h_0 + sum_j exp(A (dt_{j+1} + ... + dt_T)) dt_j B_j u_j``. Arguments as in
    `equation`.
    """
    launch.axes(
        u_btd=u_btd, dt_btd=dt_btd, A_dn=A_dn, B_btgn=B_btgn, state_bdn=state_bdn,
        valid_bt=valid_bt, documents_bt=documents_bt,
    )  # fmt: skip
    _divides(B_btgn, u_btd)
    chosen = _backends.choose(u_btd, dt_btd, A_dn, B_btgn, state_bdn)
    where = {"valid_bt": valid_bt, "documents_bt": documents_bt}
    return chosen.final_state(u_btd, dt_btd, A_dn, B_btgn, state_bdn, **where)


def _divides(B_btgn: Tensor, u_btd: Tensor) -> None:
    g, d = B_btgn.shape[2], u_btd.shape[2]
    if g < 1 or d % g:
        raise ConfigError(f"B_btgn: expected a number of groups that divides d={d}, got {g}; change one of them")
