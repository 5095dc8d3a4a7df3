"""Diagonal complex state spaces in modal form: poles, residues, a complex number of state a channel and mode."""

from __future__ import annotations

from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.ops.backends import Backends
from subquad.ops.modal.equation import equation

__all__ = ["equation", "final_state", "impulse", "scan"]

_backends = Backends(__name__)


def scan(
    u_btd: Tensor,
    log_a_gn: Tensor,
    residue_gn: Tensor,
    state_bdnp: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs and final state of `equation`, by chunks of tokens; arguments and results are the same.

    The tensors' device chooses the implementation; see `subquad.ops.backends`. Gradients flow through both results, to
    `log_a_gn` and `residue_gn` too.

    Raises:
        ConfigError: shapes that do not fit together, or poles that are not complex.
    """
    _check(u_btd, log_a_gn, residue_gn, state_bdnp)
    chosen = _backends.choose(u_btd, log_a_gn, residue_gn, state_bdnp)
    return chosen.scan(u_btd, log_a_gn, residue_gn, state_bdnp, valid_bt=valid_bt, documents_bt=documents_bt)


def final_state(
    u_btd: Tensor,
    log_a_gn: Tensor,
    state_bdnp: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """The final state of `scan` alone: ``x_T = exp(T log_a) x_0 + sum_j exp((T - j) log_a) u_j``.

    Arguments and errors as in `scan`.
    """
    _check(u_btd, log_a_gn, log_a_gn, state_bdnp)
    chosen = _backends.choose(u_btd, log_a_gn, state_bdnp)
    return chosen.final_state(u_btd, log_a_gn, state_bdnp, valid_bt=valid_bt, documents_bt=documents_bt)


def impulse(log_a_gn: Tensor, residue_gn: Tensor, length: int) -> Tensor:
    """The impulse response ``k_l = Re sum_n residue_n exp(l log_a_n)`` for l from 0 to `length` - 1.

    ``y = k * u`` is `scan` from an empty state.

    Args:
        log_a_gn, residue_gn: as in `equation`.
        length: at least 1.

    Returns:
        ``[g, length]``, real, at least float32.

    Raises:
        ConfigError: shapes that do not fit together, poles that are not complex, or no length.
    """
    _check_modes(log_a_gn, residue_gn)
    if length < 1:
        raise ConfigError(f"length: expected at least 1, got {length}; ask for the response of one token or more")
    return _backends.choose(log_a_gn, residue_gn).impulse(log_a_gn, residue_gn, length)


def _check(u_btd: Tensor, log_a_gn: Tensor, residue_gn: Tensor, state_bdnp: Tensor) -> None:
    _check_modes(log_a_gn, residue_gn)
    (b, _, d), (g, n) = u_btd.shape, log_a_gn.shape
    if g < 1 or d % g:
        raise ConfigError(f"u_btd: channels d={d} must be a multiple of the {g} groups of poles; change one of them")
    if state_bdnp.shape != (b, d, n, 2):
        raise ConfigError(
            f"state_bdnp: expected shape {(b, d, n, 2)}, got {tuple(state_bdnp.shape)}; use the state of these modes"
        )


def _check_modes(log_a_gn: Tensor, residue_gn: Tensor) -> None:
    if log_a_gn.shape != residue_gn.shape or log_a_gn.dim() != 2:
        raise ConfigError(
            f"residue_gn: expected the shape [g, n] of log_a_gn, got {tuple(residue_gn.shape)} and "
            f"{tuple(log_a_gn.shape)}; give every pole its residue"
        )
    if not (log_a_gn.is_complex() and residue_gn.is_complex()):
        raise ConfigError(
            f"log_a_gn and residue_gn: expected complex tensors, got {log_a_gn.dtype} and {residue_gn.dtype}; "
            "make them with torch.complex"
        )
