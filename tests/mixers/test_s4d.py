"""What is particular to S4D: its system against SciPy's, both directions, sharing, float32 parameters, the check."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.errors import CheckpointError, ConfigError, UnsupportedError
from subquad.core.layout import Layout
from subquad.mixers.s4d import S4D
from subquad.ops.diagonal import DISCRETIZATIONS, Diagonal


def real_system(system: Diagonal, group: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """One continuous system with real matrices, written out: each mode is a rotation that decays."""
    quarter, one = torch.tensor([[0, -1], [1, 0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    rates, frequencies = (x[group].tolist() for x in (system.log_rate.exp(), system.frequency))
    a_nn = torch.block_diag(*(f * quarter - r * one for r, f in zip(rates, frequencies, strict=True)))
    b_n = torch.tensor([1, 0], dtype=torch.float64).repeat(system.modes)
    c_n = 2 * (system.output[group] * torch.tensor([1, -1], dtype=torch.float64)).flatten()
    return a_nn, b_n[:, None], c_n[None], float(system.log_dt[group].exp())


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize("init", ["legs", "inv", "lin"])
@torch.no_grad()
def test_it_is_what_scipy_simulates(init: str, discretization: str) -> None:
    """The same continuous system, discretised and simulated by SciPy from its real matrices."""
    signal = pytest.importorskip("scipy.signal")
    mixer = S4D(S4D.Config(3, 16, init=init, discretization=discretization, dt_min=0.01, dt_max=0.5)).double()
    u_btd, system = torch.randn(1, 120, 3, dtype=torch.float64), mixer.layer.systems[0]
    assert isinstance(system, Diagonal)
    y_btd, _ = system.scan(u_btd, mixer.init_state(1).modes_bdnp)
    for d in range(3):
        a, b, c, step = real_system(system, d)
        discrete = signal.cont2discrete((a.numpy(), b.numpy(), c.numpy(), [[0.0]]), step, method=discretization)
        simulated_t = torch.from_numpy(signal.dlsim(discrete, F.pad(u_btd[0, :, d], (0, 1)).numpy())[1][:, 0])
        if discretization == "zoh":
            # SciPy reads the state before a step, the layer behind it.
            torch.testing.assert_close(y_btd[0, :, d], simulated_t[1:], rtol=1e-9, atol=1e-9)
        else:
            # SciPy reads the middle of a step, the layer its end.
            middle_t = (y_btd[0, :, d] + F.pad(y_btd[0, :-1, d], (1, 0))) / 2
            torch.testing.assert_close(middle_t, simulated_t[:-1], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_equals_the_papers_equations() -> None:
    """Channel by channel from the parameters, with skip, GELU and gate written out."""
    mixer = S4D(S4D.Config(4, 6)).double()
    for parameter in mixer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    x_td, system, layer = torch.randn(40, 4, dtype=torch.float64), mixer.layer.systems[0], mixer.layer
    assert isinstance(system, Diagonal)
    want = torch.zeros(40, 4, dtype=torch.float64)
    for d in range(4):
        a_n = torch.complex(-system.log_rate[d].exp(), system.frequency[d])
        c_n, dt = torch.view_as_complex(system.output[d]), system.log_dt[d].exp()
        state_n = torch.zeros(3, dtype=torch.complex128)
        for t in range(40):
            state_n = (dt * a_n).exp() * state_n + ((dt * a_n).exp() - 1) / a_n * x_td[t, d]
            want[t, d] = 2 * (c_n * state_n).sum().real + layer.skip[d] * x_td[t, d]
    value_td, gate_td = layer.out_proj(F.gelu(want)).chunk(2, dim=-1)
    torch.testing.assert_close(mixer(x_td[None])[0], value_td * torch.sigmoid(gate_td), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_both_directions_are_one_filter_each_way() -> None:
    mixer = S4D(S4D.Config(4, 6, bidirectional=True)).double()
    x_btd, layer = torch.randn(2, 50, 4, dtype=torch.float64), mixer.layer
    none = mixer.init_state(2).modes_bdnp
    ahead, back = (s.scan(x, none)[0] for s, x in zip(layer.systems, (x_btd, x_btd.flip(1)), strict=True))
    y_btd = F.gelu(ahead + back.flip(1) + layer.skip * x_btd)
    torch.testing.assert_close(mixer(x_btd), F.glu(layer.out_proj(y_btd)), rtol=1e-10, atol=1e-10)
    later = x_btd.clone()
    later[:, 30] += 1
    assert (mixer(later) - mixer(x_btd))[:, :30].abs().amin(dim=(0, 2)).max() > 1e-3


@torch.no_grad()
def test_both_directions_stop_at_padding_and_documents() -> None:
    mixer = S4D(S4D.Config(4, 6, bidirectional=True, dt_min=0.1, dt_max=0.5)).double()
    x_btd = 30 * torch.randn(3, 40, 4, dtype=torch.float64)
    lengths = [40, 1, 23]
    y_btd = mixer(x_btd, Layout.ragged(torch.tensor(lengths), 40))
    for row, n in enumerate(lengths):
        torch.testing.assert_close(y_btd[row, :n], mixer(x_btd[row : row + 1, :n])[0], rtol=1e-10, atol=1e-10)
    documents = [[5, 20, 1], [33], [2, 3]]
    y_btd = mixer(x_btd[:, :33], Layout.packed(documents))
    for row, parts in enumerate(documents):
        for i, n in enumerate(parts):
            at = slice(sum(parts[:i]), sum(parts[: i + 1]))
            torch.testing.assert_close(y_btd[row, at], mixer(x_btd[row : row + 1, at])[0], rtol=1e-10, atol=1e-10)
            assert n == at.stop - at.start


def test_both_directions_refuse_to_be_read() -> None:
    mixer = S4D(S4D.Config(4, 6, bidirectional=True))
    with pytest.raises(UnsupportedError, match="depends on tokens behind it.*bidirectional=False"):
        mixer.read(torch.randn(1, 1, 4), mixer.init_state(1))


def test_channels_in_succession_share_their_poles() -> None:
    mixer = S4D(S4D.Config(6, 8, n_ssm=2))
    system = mixer.layer.systems[0]
    assert isinstance(system, Diagonal)
    with torch.no_grad():
        system.log_rate[1] += 1
    scaled_gn = system.poles() / system.log_dt.double().exp()[:, None]
    torch.testing.assert_close(scaled_gn[:3], scaled_gn[:1].expand(3, -1), rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled_gn[3:].real, torch.e * scaled_gn[:3].real, rtol=1e-6, atol=0)


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_no_parameter_takes_a_pole_out_of_the_disc(discretization: str) -> None:
    system = Diagonal(4, 8, discretization=discretization)
    for scale in (1.0, 10.0, 25.0):
        with torch.no_grad():
            for parameter in system.parameters():
                parameter.normal_().mul_(scale)
        log_a_gn, residue_gn = system.discrete()
        assert (log_a_gn.real <= 0).all() and residue_gn.isfinite().all()
        assert system.kernel(70).isfinite().all()


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_systems_and_state_stay_in_float32(cast: str) -> None:
    mixer = S4D(S4D.Config(4, 6))
    before = [p.clone() for p in mixer.layer.systems[0].parameters()]
    getattr(mixer, cast)()
    assert all(torch.equal(a, b) for a, b in zip(before, mixer.layer.systems[0].parameters(), strict=True))
    low = mixer.layer.out_proj.weight.dtype
    y_btd, update = mixer.read(torch.randn(2, 5, 4).to(low), mixer.init_state(2))
    assert (y_btd.dtype, update.commit(torch.tensor([3, 0])).modes_bdnp.dtype) == (low, torch.float32)
    assert mixer.double().layer.systems[0].log_dt.dtype == torch.float64


def test_a_damaged_checkpoint_is_refused_with_its_place() -> None:
    mixer = S4D(S4D.Config(4, 6))
    weights = {name: x.clone() for name, x in mixer.state_dict().items()}
    weights["layer.systems.0.output"][1, 2, 0] = torch.nan
    with pytest.raises(
        CheckpointError, match=r"layer\.systems\.0\.output: expected finite numbers, got 1 others of 24"
    ):
        mixer.load_state_dict(weights)
    weights = S4D(S4D.Config(4, 6)).state_dict()
    weights["layer.systems.0.log_rate"][2, 1] = 1000.0
    with pytest.raises(CheckpointError, match="expected poles inside the unit disc, got 1 others of 12"):
        S4D(S4D.Config(4, 6)).load_state_dict(weights)


def test_state_has_the_documented_size() -> None:
    mixer = S4D(S4D.Config(16, 8)).to(torch.bfloat16)
    assert mixer.init_state(3, 10**6, device="meta").nbytes == 3 * 16 * 8 * 4


def test_bad_configs_say_what_to_do() -> None:
    for fields, match in (
        ({"init": "leg"}, "did you mean 'legs'"),
        ({"discretization": "zho"}, "did you mean 'zoh'"),
        ({"n_ssm": 3}, "n_ssm=3: expected a divisor of the 8"),
        ({"d_state": 7}, "d_state=7.*try 8"),
        ({"dt_min": 1.0}, "expected 0 < dt_min <= dt_max"),
    ):
        with pytest.raises(ConfigError, match=match):
            S4D(S4D.Config(8, **fields))
