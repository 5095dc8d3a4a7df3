"""What is particular to Mamba: its equations, its start, float32 parameters, its equality with transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.mixers.mamba1 import Mamba1

CONFIGS = [{}, {"conv_bias": False, "bias": True, "state_dim": 3, "dt_rank": 2, "d_inner": 48}]


def moved(config: dict[str, Any]) -> Mamba1:
    """A mixer whose parameters are all away from their start."""
    mixer = Mamba1(Mamba1.Config(d_model=16, **config)).requires_grad_(False)
    for parameter in mixer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def test_equals_the_papers_equations() -> None:
    """Token by token and channel by channel, with the projections written out."""
    mixer = moved({"d_inner": 6, "state_dim": 3, "dt_rank": 2}).double()
    ssm, rates = mixer.ssm, mixer.ssm.rates
    x_td, state, want = torch.randn(12, 16, dtype=torch.float64), torch.zeros(6, 3, dtype=torch.float64), []
    projected = F.pad((x_td @ mixer.in_proj.weight.mT)[:, :6], (0, 0, 3, 0))
    for t, x in enumerate(x_td):
        seen_wd = projected[t : t + 4]
        u = F.silu((seen_wd * ssm.conv_weight.mT).sum(0) + ssm.conv_bias)
        r, b, c = (ssm.x_proj.weight @ u).split((2, 3, 3))
        dt = (1 + (ssm.dt_proj.weight @ r + rates.dt_bias).exp()).log()
        y = torch.empty(6, dtype=torch.float64)
        for d in range(6):
            a = torch.exp(-dt[d] * rates.A_log[d].exp())
            state[d] = a * state[d] + dt[d] * b * u[d]
            y[d] = c @ state[d] + rates.D[d] * u[d]
        want.append(mixer.out_proj.weight @ (y * F.silu(mixer.in_proj.weight[6:] @ x)))
    torch.testing.assert_close(mixer(x_td[None])[0], torch.stack(want), rtol=1e-10, atol=1e-10)


def their_mixer(mixer: Mamba1) -> torch.nn.Module:
    """The mixer of `transformers` with the same weights, on its torch path."""
    pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer

    config, ssm = mixer.config, mixer.ssm
    shape = MambaConfig(
        hidden_size=config.d_model,
        intermediate_size=mixer.out_proj.in_features,
        expand=mixer.out_proj.in_features // config.d_model,
        state_size=config.state_dim,
        time_step_rank=ssm.dt_proj.in_features,
        conv_kernel=config.conv_width,
        use_conv_bias=config.conv_bias,
        use_bias=config.bias,
        num_hidden_layers=1,
    )
    theirs = MambaMixer(shape, 0).eval().requires_grad_(False)
    renamed = {
        "conv1d.weight": ssm.conv_weight[:, None],
        "conv1d.bias": ssm.conv_bias,
        "x_proj.weight": ssm.x_proj.weight,
        "dt_proj.weight": ssm.dt_proj.weight,
        "dt_proj.bias": ssm.rates.dt_bias,
        "A_log": ssm.rates.A_log,
        "D": ssm.rates.D,
    }
    plain = {name: x for name, x in mixer.state_dict().items() if not name.startswith("ssm.")}
    theirs.load_state_dict(plain | {name: x for name, x in renamed.items() if x is not None})
    return theirs


def agrees(ours: Tensor, theirs: Tensor) -> None:
    """float32 sums of some tens of terms, in another order, some of them in a row."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("config", CONFIGS, ids=["paper", "others"])
def test_whole_sequences_equal_transformers(config: dict[str, Any]) -> None:
    mixer = moved(config)
    theirs, x_btd = their_mixer(mixer), torch.randn(2, 130, 16)
    y_btd = theirs(x_btd)
    agrees(mixer(x_btd), y_btd)
    assert (mixer.double()(x_btd.double()) - y_btd).norm() < 1e-5 * y_btd.norm()


@pytest.mark.parametrize("config", CONFIGS, ids=["paper", "others"])
def test_any_split_equals_transformers_single_steps(config: dict[str, Any]) -> None:
    """A prompt, then single steps, there; the same tokens in blocks, one committed in part and read again, here."""
    mixer = moved(config)
    theirs, x_btd = their_mixer(mixer), torch.randn(2, 40, 16)
    from transformers import DynamicCache

    cache = DynamicCache(config=theirs.config)
    parts = [theirs(x_btd[:, :9], cache=cache), *(theirs(x_btd[:, t : t + 1], cache=cache) for t in range(9, 40))]
    want_btd = torch.cat(parts, dim=1)
    state = mixer.read(x_btd[:, :9], mixer.init_state(2))[1].commit()
    drafted = torch.cat((x_btd[:, 9:15], torch.randn(2, 5, 16)), dim=1)
    first_btd, update = mixer.read(drafted, state, Layout.dense(2, 11, start_b=9))
    state = update.commit(torch.tensor([6, 6]))
    second_btd, _ = mixer.read(x_btd[:, 15:], state, Layout.dense(2, 25, start_b=15))
    agrees(torch.cat((first_btd[:, :6], second_btd), dim=1), want_btd[:, 9:])


def test_starts_as_the_paper_does() -> None:
    mixer = Mamba1(Mamba1.Config(d_model=40))
    rates = mixer.ssm.rates
    assert (mixer.ssm.dt_proj.in_features, mixer.out_proj.in_features) == (3, 80)
    torch.testing.assert_close(-rates().detach(), torch.arange(1.0, 17.0).expand(80, -1))
    dt_d = F.softplus(rates.dt_bias.detach())
    assert dt_d.min() > 0.99e-3 and dt_d.max() < 1.01e-1
    # Log-uniform: half of them below the geometric mean, to five deviations of 80 draws.
    assert abs(float((dt_d < 1e-2).float().mean()) - 0.5) < 5 * 0.5 / 80**0.5
    assert mixer.ssm.dt_proj.weight.abs().max() <= 3**-0.5
    assert (rates.D == 1).all()


@pytest.mark.parametrize("cast", ["to", "bfloat16", "half", "state_dict"])
def test_rates_and_state_stay_in_float32(cast: str) -> None:
    mixer = Mamba1(Mamba1.Config(d_model=16))
    before = {name: x.clone() for name, x in mixer.ssm.rates.named_parameters()}
    assert not torch.equal(before["A_log"], before["A_log"].bfloat16().float())
    if cast == "to":
        mixer.to(torch.bfloat16)
    elif cast == "state_dict":
        saved = mixer.state_dict()
        mixer = Mamba1(mixer.config).to(torch.bfloat16)
        mixer.load_state_dict(saved)
    else:
        getattr(mixer, cast)()
    for name, parameter in mixer.ssm.rates.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name]), name
    low = mixer.out_proj.weight.dtype
    assert low in (torch.bfloat16, torch.float16)
    state = mixer.init_state(2)
    y_btd, update = mixer.read(torch.randn(2, 5, 16).to(low), state)
    after = update.commit(torch.tensor([3, 5]))
    for made in (state, after):
        assert (made.recurrent_bdn.dtype, made.conv_bdw.dtype) == (torch.float32, low)
    y_btd.float().sum().backward()
    gradient = mixer.ssm.rates.A_log.grad
    assert y_btd.dtype == low and gradient is not None and gradient.dtype == torch.float32
    mixer.to("meta")
    assert (mixer.ssm.rates.A_log.device.type, mixer.ssm.rates.A_log.dtype) == ("meta", torch.float32)


def test_state_has_the_documented_size() -> None:
    mixer = Mamba1(Mamba1.Config(d_model=16, state_dim=5, d_inner=24)).to(torch.bfloat16)
    for capacity in (0, 10**6):
        assert mixer.init_state(3, capacity, device="meta").nbytes == 3 * (4 * 24 * 5 + 2 * 24 * 3)


def test_bad_configs_say_what_to_do() -> None:
    for field in ("d_inner", "state_dim", "dt_rank", "conv_width"):
        with pytest.raises(ConfigError, match=f"{field}: expected at least 1, got 0"):
            Mamba1(Mamba1.Config(d_model=16, **{field: 0}))
