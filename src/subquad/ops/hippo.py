"""Where state space models start: the HiPPO matrix and the diagonal ones derived from it, on the CPU in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subquad.core.errors import ConfigError, nearest

INITS = ("legs", "inv", "lin")


def legs(n: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS (2111.00396, equation 2): A ``[n, n]`` and B ``[n]`` of ``dx/dt = A x + B u``."""
    q_n = torch.arange(n, dtype=torch.float64, device="cpu")
    b_n = (2 * q_n + 1).sqrt()
    return -(torch.outer(b_n, b_n).tril(-1) + torch.diag(q_n + 1)), b_n


def normal_plus_low_rank(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """LegS as ``diag(poles) - p p*`` in the basis that makes its normal part diagonal (2111.00396, theorem 1).

    Args:
        n: size of the state, even; its coordinates are conjugate pairs, of which one of each is returned.

    Returns:
        Complex ``[n / 2]``: poles with positive imaginary parts in ascending order, p, and B.
    """
    check_size(n)
    a_nn, b_n = legs(n)
    p_n = (torch.arange(n, dtype=torch.float64, device="cpu") + 0.5).sqrt()
    # A + p p^T is -1/2 on the diagonal and skew-symmetric beside it, so -i times that is Hermitian.
    skew_nn = a_nn + torch.outer(p_n, p_n) + 0.5 * torch.eye(n, dtype=torch.float64, device="cpu")
    imag_n, basis_nn = torch.linalg.eigh(-1j * skew_nn)
    half_mn = basis_nn[:, n // 2 :].mH
    poles_m = torch.complex(torch.full_like(imag_n[n // 2 :], -0.5), imag_n[n // 2 :])
    return poles_m, half_mn @ p_n.to(half_mn.dtype), half_mn @ b_n.to(half_mn.dtype)


def diagonal(init: str, n: int) -> tuple[Tensor, Tensor]:
    """Poles and inputs B of S4D's starts (2206.11893, section 4), complex ``[n / 2]``, one of each conjugate pair.

    Args:
        init: ``legs``, the normal part of HiPPO-LegS; ``inv``, an inverse law that comes near to it; ``lin``, Fourier's
            frequencies.
        n: size of the state, even.

    Raises:
        ConfigError: an unknown start, or an odd or empty state.
    """
    check_size(n)
    k_m = torch.arange(n // 2, dtype=torch.float64, device="cpu")
    if init == "legs":
        poles_m, _, inputs_m = normal_plus_low_rank(n)
        # Without the low-rank part half the input gives the same system in the limit (theorem 3).
        return poles_m, inputs_m / 2
    if init == "inv":
        imag_m = n / math.pi * (n / (2 * k_m + 1) - 1)
    elif init == "lin":
        imag_m = math.pi * k_m
    else:
        raise ConfigError(f"unknown init {init!r}{nearest(init, INITS)}")
    return torch.complex(torch.full_like(imag_m, -0.5), imag_m), torch.ones_like(imag_m, dtype=torch.complex128)


def check_size(n: int) -> None:
    """Refuse a state that is no set of conjugate pairs."""
    if n < 2 or n % 2:
        raise ConfigError(f"d_state={n}: expected an even number, since poles come in conjugate pairs; try {n + n % 2}")
