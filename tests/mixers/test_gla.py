"""What is particular to gated linear attention: its equation, its start from attention, float32 parameters."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.attention import AttentionStats, AttentionWeights, RotarySpec
from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.mixers.gla import GLA, ChannelDecay
from subquad.ops import gla
from subquad.ops.attention import expand_heads
from subquad.ops.qkv import QKV


def teacher(**changes: Any) -> AttentionWeights:
    """Four query heads on two key/value heads of 6 channels, width 16, with biases, QK norms and RoPE, float64."""
    h, g, k, d = 4, 2, 6, 16
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    source = AttentionWeights(
        q_weight=normal(h * k, d) / d**0.5,
        k_weight=normal(g * k, d) / d**0.5,
        v_weight=normal(g * k, d) / d**0.5,
        o_weight=normal(d, h * k) / (h * k) ** 0.5,
        n_heads=h,
        n_kv_heads=g,
        head_dim=k,
        scale=0.3,
        q_bias=normal(h * k),
        k_bias=normal(g * k),
        v_bias=normal(g * k),
        o_bias=normal(d),
        q_norm=1 + 0.2 * normal(k),
        k_norm=1 + 0.2 * normal(k),
        rotary=RotarySpec(10000.0, k),
    )
    return dataclasses.replace(source, **changes)


BARE = {"q_bias": None, "k_bias": None, "v_bias": None, "o_bias": None, "q_norm": None, "k_norm": None, "rotary": None}


@torch.no_grad()
def test_equals_the_papers_equations() -> None:
    """Token by token, with the projections written out; every parameter away from its start."""
    mixer = GLA(GLA.Config(d_model=8, n_heads=2, key_dim=3, value_dim=5, gate_rank=4)).double()
    for parameter in mixer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    x_td = torch.randn(20, 8, dtype=torch.float64)
    decay, state, want = mixer.decay, torch.zeros(2, 3, 5, dtype=torch.float64), []
    for x in x_td:
        q, k = (p(x).view(2, 3) for p in (mixer.qkv.q_proj, mixer.qkv.k_proj))
        alpha = torch.sigmoid(decay.up.weight @ decay.down.weight @ x + decay.bias.flatten()) ** (1 / 16)
        state = alpha.view(2, 3, 1) * state + k[..., None] * mixer.qkv.v_proj(x).view(2, 1, 5)
        y = F.rms_norm((q[:, None] @ state)[:, 0], (5,), eps=1e-6).flatten() * mixer.norm_weight
        want.append(mixer.out_proj(y * F.silu(mixer.z_proj(x))))
    torch.testing.assert_close(mixer(x_td[None])[0], torch.stack(want), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("changes", [{}, BARE, {"o_bias": None}], ids=["all", "bare", "qkv-bias"])
@pytest.mark.parametrize("options", [{}, {"n_kv_heads": None}, {"conv_width": 4}], ids=str)
@torch.no_grad()
def test_start_is_decaying_linear_attention_on_the_teachers_heads(
    changes: dict[str, Any], options: dict[str, Any]
) -> None:
    source, b, t = teacher(**changes), 2, 70
    rms_h, lookback_h = torch.tensor([0.1, 1.0, 3.0, 7.0]), torch.tensor([2.0, 9.0, 100.0, torch.inf])
    mixer = GLA.from_attention(source, AttentionStats(lookback_h, rms_h), **options)
    x_btd = torch.randn(b, t, 16, dtype=torch.float64)
    qkv = QKV(
        16, 4, 2, 6, bias=source.q_bias is not None, norm=source.q_norm is not None, rotary=source.rotary
    ).double()
    qkv.take_(source)
    q, k, v = (expand_heads(x, 4) for x in qkv(x_btd, Layout.dense(b, t)))
    g_bthk = (-math.log(2.0) / lookback_h.double())[:, None].expand(b, t, 4, 6)
    y, _ = gla.equation(source.scale * q, k, v, g_bthk, torch.zeros(b, 4, 6, 6, dtype=torch.float64))
    y = rms_h.double()[:, None] * F.rms_norm(y, (6,), eps=source.norm_eps)
    want = y.flatten(2) @ source.o_weight.mT + (0 if source.o_bias is None else source.o_bias)
    torch.testing.assert_close(mixer(x_btd), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("half_life", [1.0, 7.0, 3000.0, 1e7])
def test_decay_starts_with_any_half_life_and_can_leave_it(half_life: float) -> None:
    decay = ChannelDecay(8, 2, 3, 4, 16.0)
    decay.start_(torch.tensor([half_life, 0.25]))
    g_bthk = decay(torch.randn(1, 5, 8))
    assert g_bthk.dtype == torch.float32
    # The bias is rounded once, and where |bias| is large, so is its rounding: 16 * 2^-24.
    torch.testing.assert_close(g_bthk[..., 0, :] * half_life, torch.full((1, 5, 3), -math.log(2.0)), rtol=4e-6, atol=0)
    torch.testing.assert_close(g_bthk[..., 1, :], torch.full((1, 5, 3), -math.log(2.0)), rtol=4e-6, atol=0)
    g_bthk.sum().backward()
    assert decay.up.weight.grad is not None and decay.up.weight.grad.norm() > 0
    assert decay.bias.grad is not None and (decay.bias.grad > 0).all()


def test_half_lives_spread_where_nothing_was_measured() -> None:
    mixer = GLA.from_attention(teacher())
    g_hk = mixer.decay(torch.randn(1, 1, 16, dtype=torch.float64))[0, 0]
    want_h = -math.log(2.0) / torch.tensor([32.0, 128.0, 512.0, 2048.0], dtype=torch.float64)
    torch.testing.assert_close(g_hk, want_h[:, None].expand(4, 6), rtol=1e-6, atol=0)


def test_groups_are_repeated_by_heads_not_rows() -> None:
    source = teacher()
    mixer = GLA.from_attention(source, n_kv_heads=None)
    for name in ("k", "v"):
        by_head = getattr(source, f"{name}_weight").unflatten(0, (2, 6)).repeat_interleave(2, dim=0)
        got = getattr(mixer.qkv, f"{name}_proj").weight.unflatten(0, (4, 6))
        assert torch.equal(got, by_head)


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_decay_and_state_stay_in_float32(cast: str) -> None:
    mixer = GLA(GLA.Config(d_model=16, n_heads=4, key_dim=4, value_dim=4, conv_width=2))
    mixer.decay.start_(torch.tensor([700.0, 800.0, 900.0, 1000.0]))
    bias = mixer.decay.bias.clone()
    getattr(mixer, cast)()
    assert torch.equal(mixer.decay.bias, bias)
    low = mixer.out_proj.weight.dtype
    assert mixer.decay.up.weight.dtype == mixer.decay.down.weight.dtype == low
    y_btd, update = mixer.read(torch.randn(2, 5, 16).to(low), mixer.init_state(2))
    after = update.commit(torch.tensor([3, 0]))
    assert (y_btd.dtype, after.recurrent_bhkv.dtype, after.conv_bdw.dtype) == (low, torch.float32, low)
    assert mixer.double().decay.bias.dtype == torch.float64


def test_state_has_the_documented_size() -> None:
    config = GLA.Config(d_model=16, n_heads=4, n_groups=2, key_dim=6, value_dim=8, conv_width=4)
    mixer = GLA(config).to(torch.bfloat16)
    recurrent, conv = 4 * 6 * 8, (2 * 6 + 2 * 6 + 4 * 8) * 3
    assert mixer.init_state(3, 10**6, device="meta").nbytes == 3 * (4 * recurrent + 2 * conv)


def test_bad_configs_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gate_rank'"):
        GLA.from_attention(teacher(), gate_rnak=3)
    with pytest.raises(ConfigError, match="n_heads=4 must be a multiple of n_groups=3"):
        GLA(GLA.Config(d_model=16, n_heads=4, key_dim=4, value_dim=4, n_groups=3))
