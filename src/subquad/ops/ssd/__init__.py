"""Linear attention with a scalar decay per head and token: the state space duality of Mamba-2 (arXiv 2405.21060)."""

from __future__ import annotations

from torch import Tensor

from subquad.ops.backends import Backends
from subquad.ops.ssd.equation import equation

__all__ = ["equation", "final_state", "scan"]

_backends = Backends(__name__)


def scan(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bth: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs and final state of `equation`, by chunks of tokens; arguments and results are the same.

    The tensors' device chooses the implementation; see `subquad.ops.backends`. Gradients flow through both results.
    A NaN among the decays makes NaN of everything behind it, and may of earlier tokens of its chunk.
    """
    chosen = _backends.choose(q_bthk, k_bthk, v_bthv, g_bth, state_bhkv)
    return chosen.scan(q_bthk, k_bthk, v_bthv, g_bth, state_bhkv, valid_bt=valid_bt, documents_bt=documents_bt)


def final_state(
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bth: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """The final state of `scan` alone, where the outputs are not needed.

    ``S_T = exp(g_1 + ... + g_T) S_0 + sum_j exp(g_{j+1} + ... + g_T) k_j v_j^T``. Arguments as in `equation`.
    """
    chosen = _backends.choose(k_bthk, k_bthk, v_bthv, g_bth, state_bhkv)
    return chosen.final_state(k_bthk, v_bthv, g_bth, state_bhkv, valid_bt=valid_bt, documents_bt=documents_bt)
