"""State spaces whose matrix is diagonal plus low rank (S4, arXiv 2111.00396): kernel, scan, state."""

from __future__ import annotations

from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.ops.backends import Backends
from subquad.ops.dplr.equation import System, equation, step

__all__ = ["System", "equation", "final_state", "kernel", "scan", "step"]

_backends = Backends(__name__)


def kernel(system: System, length: int) -> Tensor:
    """The impulse response ``C A^l B`` of the discrete system for l from 0 to `length` - 1, by the Cauchy kernel.

    Its transform at the roots of unity is a sum over the poles, the low-rank part enters by Woodbury's identity, and
    ``C (I - A^length)`` in the place of C makes of the infinite response the finite one (2111.00396, algorithm 1).

    Args:
        system: as in `equation`.
        length: at least 1.

    Returns:
        ``[g, length]``, real, at least float32.

    Raises:
        ConfigError: no length.
    """
    if length < 1:
        raise ConfigError(f"length: expected at least 1, got {length}; ask for the response of one token or more")
    return _backends.choose(*system).kernel(system, length)


def scan(
    u_btd: Tensor,
    system: System,
    state_bdnp: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs and final state of `equation`, by chunks of tokens; arguments and results are the same.

    Raises:
        ConfigError: shapes that do not fit together.
    """
    _check(u_btd, system, state_bdnp)
    chosen = _backends.choose(u_btd, *system, state_bdnp)
    return chosen.scan(u_btd, system, state_bdnp, valid_bt=valid_bt, documents_bt=documents_bt)


def final_state(
    u_btd: Tensor,
    system: System,
    state_bdnp: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """The final state of `scan` alone. Arguments and errors as there."""
    _check(u_btd, system, state_bdnp)
    chosen = _backends.choose(u_btd, *system, state_bdnp)
    return chosen.final_state(u_btd, system, state_bdnp, valid_bt=valid_bt, documents_bt=documents_bt)


def _check(u_btd: Tensor, system: System, state_bdnp: Tensor) -> None:
    (b, _, d), (g, n) = u_btd.shape, system.poles_gn.shape
    if g < 1 or d % g:
        raise ConfigError(f"u_btd: channels d={d} must be a multiple of the {g} systems; change one of them")
    if state_bdnp.shape != (b, d, n, 2):
        raise ConfigError(
            f"state_bdnp: expected shape {(b, d, n, 2)}, got {tuple(state_bdnp.shape)}; use the state of this system"
        )
