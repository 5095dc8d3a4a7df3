"""What is particular to S4: its system against SciPy's and HiPPO's, both directions, float32 parameters, the check."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from subquad.core.errors import CheckpointError, ConfigError, UnsupportedError
from subquad.core.layout import Layout
from subquad.mixers.s4 import S4, DiagonalPlusLowRank
from subquad.ops import hippo
from subquad.ops.dplr.equation import bilinear, dense


def system_of(mixer: S4) -> DiagonalPlusLowRank:
    system = mixer.layer.systems[0]
    assert isinstance(system, DiagonalPlusLowRank)
    return system


@pytest.mark.parametrize("n", [2, 16, 64])
@torch.no_grad()
def test_it_is_what_scipy_simulates(n: int) -> None:
    """The same continuous system, discretised by the trapezoidal rule and simulated by SciPy."""
    signal = pytest.importorskip("scipy.signal")
    mixer = S4(S4.Config(3, n, dt_min=0.01, dt_max=0.5)).double()
    u_btd, system = torch.randn(1, 120, 3, dtype=torch.float64), system_of(mixer)
    y_btd, _ = system.scan(u_btd, mixer.init_state(1).modes_bdnp)
    a_gpp, b_gp, c_gp = (x.numpy() for x in dense(system.system()))
    for d in range(3):
        continuous = (a_gpp[d], b_gp[d][:, None], c_gp[d][None], [[0.0]])
        discrete = signal.cont2discrete(continuous, float(system.log_dt[d].exp()), method="bilinear")
        simulated_t = torch.from_numpy(signal.dlsim(discrete, u_btd[0, :, d].numpy())[1][:, 0])
        # SciPy reads the middle of a step, the layer its end.
        middle_t = (y_btd[0, :, d] + F.pad(y_btd[0, :-1, d], (1, 0))) / 2
        torch.testing.assert_close(middle_t, simulated_t, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_its_state_holds_the_past_in_legendre_polynomials() -> None:
    """At the start, in HiPPO's own coordinates, x follows ``dx/dt = A x + B u`` with the matrix as published."""
    n, steps = 8, 300
    a_nn, b_n = hippo.legs(n)
    system = DiagonalPlusLowRank(1, n, n_ssm=None, dt_min=0.01, dt_max=0.01).double()
    one_nn, u_t = torch.eye(n, dtype=torch.float64), torch.randn(steps, dtype=torch.float64)
    dt = float(system.log_dt.exp())
    state_n = torch.zeros(n, dtype=torch.float64)
    for u in u_t:
        right_n = (one_nn + dt / 2 * a_nn) @ state_n + dt * b_n * u
        state_n = torch.linalg.solve(one_nn - dt / 2 * a_nn, right_n)
    end = system.final_state(u_t[None, :, None], torch.zeros(1, 1, n // 2, 2, dtype=torch.float64))
    # The basis is unitary, so a state's length and its product with B are the same in both. It is float32's, rounded.
    z_n = torch.view_as_complex(end[0, 0])
    torch.testing.assert_close(2 * z_n.abs().square().sum(), state_n.square().sum(), rtol=1e-5, atol=0)
    given_n = torch.view_as_complex(system.input[0])
    torch.testing.assert_close(2 * (given_n.conj() * z_n).sum().real, b_n @ state_n, rtol=1e-5, atol=0)


@torch.no_grad()
def test_training_form_equals_matrix_powers() -> None:
    mixer = S4(S4.Config(4, 64)).double()
    for parameter in mixer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    x_btd, layer = torch.randn(1, 90, 4, dtype=torch.float64), mixer.layer
    a_gpp, b_gp, c_gp = bilinear(system_of(mixer).system())
    state_gp, out = torch.zeros_like(b_gp), []
    for t in range(90):
        state_gp = (a_gpp @ state_gp[..., None])[..., 0] + b_gp * x_btd[0, t, :, None]
        out.append((c_gp * state_gp).sum(-1) + layer.skip * x_btd[0, t])
    want = F.glu(layer.out_proj(F.gelu(torch.stack(out))))
    torch.testing.assert_close(mixer(x_btd)[0], want, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_both_directions_stop_at_padding_and_refuse_to_be_read() -> None:
    mixer = S4(S4.Config(4, 6, bidirectional=True, dt_min=0.1, dt_max=0.5)).double()
    x_btd = 30 * torch.randn(3, 33, 4, dtype=torch.float64)
    lengths, documents = [33, 1, 20], [[5, 20, 1], [33], [2, 3]]
    y_btd, packed_btd = mixer(x_btd, Layout.ragged(torch.tensor(lengths), 33)), mixer(x_btd, Layout.packed(documents))
    for row, n in enumerate(lengths):
        torch.testing.assert_close(y_btd[row, :n], mixer(x_btd[row : row + 1, :n])[0], rtol=1e-10, atol=1e-10)
        first = documents[row][0]
        alone = mixer(x_btd[row : row + 1, :first])[0]
        torch.testing.assert_close(packed_btd[row, :first], alone, rtol=1e-10, atol=1e-10)
    with pytest.raises(UnsupportedError, match="depends on tokens behind it"):
        mixer.read(x_btd, mixer.init_state(3))


def test_systems_and_state_stay_in_float32() -> None:
    mixer = S4(S4.Config(4, 6)).to(torch.bfloat16)
    assert {p.dtype for p in system_of(mixer).parameters()} == {torch.float32}
    y_btd, update = mixer.read(torch.randn(2, 5, 4).bfloat16(), mixer.init_state(2))
    assert (y_btd.dtype, update.commit(torch.tensor([3, 0])).modes_bdnp.dtype) == (torch.bfloat16, torch.float32)


def test_a_damaged_checkpoint_is_refused_with_its_place() -> None:
    weights = S4(S4.Config(4, 6)).state_dict()
    weights["layer.systems.0.low"][1, 2, 0] = torch.inf
    with pytest.raises(CheckpointError, match=r"layer\.systems\.0\.low: expected finite numbers, got 1 others of 24"):
        S4(S4.Config(4, 6)).load_state_dict(weights)


def test_state_has_the_documented_size() -> None:
    mixer = S4(S4.Config(16, 8)).to(torch.bfloat16)
    assert mixer.init_state(3, 10**6, device="meta").nbytes == 3 * 16 * 8 * 4


def test_bad_configs_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="n_ssm=3: expected a divisor of the 8"):
        S4(S4.Config(8, n_ssm=3))
    with pytest.raises(ConfigError, match="d_state=7.*try 8"):
        S4(S4.Config(8, 7))
