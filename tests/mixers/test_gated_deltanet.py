"""What is particular to Gated DeltaNet: its start from attention, float32 parameters, equality with transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.attention import AttentionStats, AttentionWeights, RotarySpec
from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.mixers.gated_deltanet import GatedDeltaNet
from subquad.ops import gdn
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


@pytest.mark.parametrize("changes", [{}, BARE, {"o_bias": None}], ids=["all", "bare", "qkv-bias"])
@pytest.mark.parametrize("options", [{}, {"n_kv_heads": None}, {"conv_width": 0}], ids=str)
@torch.no_grad()
def test_start_is_the_delta_rule_on_the_teachers_heads(changes: dict[str, Any], options: dict[str, Any]) -> None:
    source, b, t = teacher(**changes), 2, 70
    rms_h, lookback_h = torch.tensor([0.1, 1.0, 3.0, 7.0]), torch.tensor([2.0, 9.0, 100.0, torch.inf])
    mixer = GatedDeltaNet.from_attention(source, AttentionStats(lookback_h, rms_h), **options)
    x_btd = torch.randn(b, t, 16, dtype=torch.float64)
    qkv = QKV(
        16, 4, 2, 6, bias=source.q_bias is not None, norm=source.q_norm is not None, rotary=source.rotary
    ).double()
    qkv.take_(source)
    q, k, v = (expand_heads(x, 4) for x in qkv(x_btd, Layout.dense(b, t)))
    g_bth = (-torch.log(torch.tensor(2.0, dtype=torch.float64)) / lookback_h.double()).expand(b, t, 4)
    half_bth = torch.full((b, t, 4), 0.5, dtype=torch.float64)
    zeros = torch.zeros(b, 4, 6, 6, dtype=torch.float64)
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (source.scale * q, k))
    y, _ = gdn.equation(q / 6**0.5, k, v, g_bth, half_bth, zeros)
    y = rms_h.double()[:, None] * F.rms_norm(y, (6,), eps=source.norm_eps)
    want = y.flatten(2) @ source.o_weight.mT + (0 if source.o_bias is None else source.o_bias)
    torch.testing.assert_close(mixer(x_btd), want, rtol=1e-9, atol=1e-9)


def test_groups_are_repeated_by_heads_not_rows() -> None:
    source = teacher()
    mixer = GatedDeltaNet.from_attention(source, n_kv_heads=None)
    for name in ("k", "v"):
        by_head = getattr(source, f"{name}_weight").unflatten(0, (2, 6)).repeat_interleave(2, dim=0)
        got = getattr(mixer.qkv, f"{name}_proj").weight.unflatten(0, (4, 6))
        assert torch.equal(got, by_head)


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_decay_and_state_stay_in_float32(cast: str) -> None:
    mixer = GatedDeltaNet(GatedDeltaNet.Config(d_model=16, n_heads=4, key_dim=4, value_dim=4))
    a_log, dt_bias = mixer.decay.A_log.clone(), mixer.decay.dt_bias.clone()
    getattr(mixer, cast)()
    assert torch.equal(mixer.decay.A_log, a_log)
    assert torch.equal(mixer.decay.dt_bias, dt_bias)
    low = mixer.out_proj.weight.dtype
    y_btd, update = mixer.read(torch.randn(2, 5, 16).to(low), mixer.init_state(2))
    after = update.commit(torch.tensor([3, 0]))
    assert (y_btd.dtype, after.recurrent_bhkv.dtype, after.conv_bdw.dtype) == (low, torch.float32, low)


def test_state_has_the_documented_size() -> None:
    config = GatedDeltaNet.Config(d_model=16, n_heads=4, n_groups=2, key_dim=6, value_dim=8, conv_width=4)
    mixer = GatedDeltaNet(config).to(torch.bfloat16)
    recurrent, conv = 4 * 6 * 8, (2 * 6 + 2 * 6 + 4 * 8) * 3
    assert mixer.init_state(3, 10**6, device="meta").nbytes == 3 * (4 * recurrent + 2 * conv)


def test_zero_keys_write_nothing() -> None:
    mixer = GatedDeltaNet(GatedDeltaNet.Config(d_model=16, n_heads=2, key_dim=4, value_dim=4)).double()
    with torch.no_grad():
        mixer.qkv.k_proj.weight.zero_()
    x_btd = torch.randn(1, 70, 16, dtype=torch.float64, requires_grad=True)
    y_btd, update = mixer.read(x_btd, mixer.init_state(1))
    assert update.commit().recurrent_bhkv.abs().max() == 0
    y_btd.sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


def test_bad_configs_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="did you mean 'conv_width'"):
        GatedDeltaNet.from_attention(teacher(), conv_widht=3)
    with pytest.raises(ConfigError, match="n_heads=4 must be a multiple of n_groups=3"):
        GatedDeltaNet(GatedDeltaNet.Config(d_model=16, n_heads=4, key_dim=4, value_dim=4, n_groups=3))


@pytest.mark.parametrize("groups", [None, 2])
@torch.no_grad()
def test_equals_qwen3_next(groups: int | None) -> None:
    """The mixer of Qwen3-Next, whose projections are interleaved by key head, and whose norm is shared by the heads."""
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = GatedDeltaNet.Config(d_model=16, n_heads=4, key_dim=6, value_dim=8, n_groups=groups)
    mixer = GatedDeltaNet(config)
    for parameter in mixer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    mixer.z_proj.bias.zero_()
    mixer.qkv.conv_bias.zero_()
    mixer.norm_weight.copy_(mixer.norm_weight[:8].repeat(4))
    k_heads = groups or 4
    theirs = modeling.Qwen3NextGatedDeltaNet(
        modeling.Qwen3NextConfig(
            hidden_size=16,
            linear_num_value_heads=4,
            linear_num_key_heads=k_heads,
            linear_key_head_dim=6,
            linear_value_head_dim=8,
            linear_conv_kernel_dim=4,
            rms_norm_eps=config.norm_eps,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
        ),
        0,
    ).eval()
    qkv = mixer.qkv

    def by_key_head(*linears: torch.nn.Linear) -> Tensor:
        return torch.cat([p.weight.unflatten(0, (k_heads, -1)) for p in linears], dim=1).flatten(0, 1)

    theirs.in_proj_qkvz.weight.copy_(by_key_head(qkv.q_proj, qkv.k_proj, qkv.v_proj, mixer.z_proj))
    theirs.in_proj_ba.weight.copy_(by_key_head(mixer.beta_proj, mixer.dt_proj))
    v, k, q = qkv.conv_weight.split((4 * 8, k_heads * 6, k_heads * 6))
    theirs.conv1d.weight.copy_(torch.cat((q, k, v))[:, None])
    theirs.A_log.copy_(mixer.decay.A_log)
    theirs.dt_bias.copy_(mixer.decay.dt_bias)
    theirs.norm.weight.copy_(mixer.norm_weight[:8])
    theirs.out_proj.weight.copy_(mixer.out_proj.weight)
    x_btd = torch.randn(2, 70, 16)
    y_btd = theirs(x_btd)
    # float32 sums of some hundred terms, in another order.
    torch.testing.assert_close(mixer(x_btd), y_btd, rtol=1e-4, atol=1e-4 * float(y_btd.abs().max()))
