"""HiPPO's matrix and the starts derived from it."""

from __future__ import annotations

import math

import pytest
import torch

from subquad.core.errors import ConfigError
from subquad.ops import hippo


@pytest.mark.parametrize("n", [2, 8, 64])
def test_normal_plus_low_rank_is_the_matrix_in_another_basis(n: int) -> None:
    """What does not depend on the basis: traces of powers, and the response ``B* A^k B``."""
    a_nn, b_n = hippo.legs(n)
    poles_m, low_m, input_m = hippo.normal_plus_low_rank(n)
    both, low, given = (torch.cat((x, x.conj())) for x in (poles_m, low_m, input_m))
    other_nn = torch.diag(both) - torch.outer(low, low.conj())
    scale = torch.linalg.matrix_norm(a_nn, ord=2)
    x_n, z_n = b_n, given
    for _ in range(6):
        x_n, z_n = a_nn @ x_n / scale, other_nn @ z_n / scale
        # Rounding of about n products of norm 1 each.
        torch.testing.assert_close((given.conj() @ z_n) / b_n.square().sum(), (b_n @ x_n + 0j) / b_n.square().sum())
    assert (poles_m.real == -0.5).all() and (poles_m.imag > 0).all()


def test_legs_by_hand() -> None:
    a_nn, b_n = hippo.legs(3)
    r3, r5 = math.sqrt(3), math.sqrt(5)
    want = torch.tensor([[-1, 0, 0], [-r3, -2, 0], [-r5, -r3 * r5, -3]], dtype=torch.float64)
    torch.testing.assert_close(a_nn, want)
    torch.testing.assert_close(b_n, torch.tensor([1, r3, r5], dtype=torch.float64))


def test_inv_and_lin_are_the_papers_laws() -> None:
    """Equations 8 and 9 at N = 4, and inv follows the eigenvalues of LegS where they are large."""
    torch.testing.assert_close(
        hippo.diagonal("inv", 4)[0], torch.tensor([-0.5 + 12 / math.pi * 1j, -0.5 + 4 / 3 / math.pi * 1j])
        .to(torch.complex128), rtol=1e-6, atol=1e-6,
    )  # fmt: skip
    poles, inputs = hippo.diagonal("lin", 6)
    torch.testing.assert_close(poles.imag, math.pi * torch.arange(3, dtype=torch.float64))
    assert (inputs == 1).all()
    top = hippo.diagonal("legs", 256)[0].imag.amax() / hippo.diagonal("inv", 256)[0].imag.amax()
    assert 0.95 < top < 1.05


def test_the_diagonal_start_comes_near_to_legs_as_the_state_grows() -> None:
    """Theorem 3 of 2206.11893: with half the input and no low-rank part, the same system in the limit.

    Compared is the state behind a step, since the response itself rings as a cut-off series does.
    """

    def distance(n: int) -> float:
        a_nn, b_n = hippo.legs(n)
        p_n = (torch.arange(n, dtype=torch.float64) + 0.5).sqrt()
        normal_nn = a_nn + torch.outer(p_n, p_n)
        errors = []
        for t in (0.2, 0.5, 1.0):
            got, want = (
                torch.linalg.solve(m, torch.linalg.matrix_exp(t * m) @ b - b)[:4]
                for m, b in ((normal_nn, b_n / 2), (a_nn, b_n))
            )
            errors.append(float((got - want).norm() / want.norm()))
        return max(errors)

    far, near = distance(16), distance(256)
    assert near < far / 8 < 0.01


@pytest.mark.parametrize(
    ("init", "n", "match"), [("legz", 4, "did you mean 'legs'"), ("inv", 5, "try 6"), ("lin", 0, "even")]
)
def test_bad_starts_are_refused(init: str, n: int, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        hippo.diagonal(init, n)
