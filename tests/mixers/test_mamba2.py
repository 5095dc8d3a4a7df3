"""What is particular to Mamba-2: its start from attention, its float32 parameters, its equality with transformers."""

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
from subquad.mixers.mamba2 import EXPORTABLE, Mamba2
from subquad.ops.attention import expand_heads
from subquad.ops.qkv import QKV

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
FOREVER = {"lookback_h": torch.full((6,), torch.inf), "output_rms_h": torch.ones(6)}


def teacher(**changes: Any) -> AttentionWeights:
    """Six query heads on two key/value heads of 8 channels, width 32, with biases, QK norms and RoPE, float64."""
    h, g, k, d = 6, 2, 8, 32
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
        rotary=RotarySpec(10000.0, k, {"rope_type": "linear", "factor": 2.0}),
    )
    return dataclasses.replace(source, **changes)


def linear_attention(source: AttentionWeights, x_btd: Tensor) -> Tensor:
    """Causal linear attention of the teacher's own q, k, v, without a normaliser: ``sum_j (scale q_t . k_j) v_j``."""
    qkv = QKV(
        x_btd.shape[-1],
        source.n_heads,
        source.n_kv_heads,
        source.head_dim,
        bias=source.q_bias is not None,
        norm=source.q_norm is not None,
        norm_eps=source.norm_eps,
        rotary=source.rotary,
    ).double()
    qkv.take_(source)
    q, k, v = qkv(x_btd, Layout.dense(*x_btd.shape[:2]))
    q, k, v = (expand_heads(x, source.n_heads).transpose(1, 2) for x in (q, k, v))
    y = ((source.scale * q @ k.mT).tril() @ v).transpose(1, 2).flatten(2) @ source.o_weight.mT
    return y if source.o_bias is None else y + source.o_bias


BARE = {"q_bias": None, "k_bias": None, "v_bias": None, "o_bias": None, "q_norm": None, "k_norm": None}


@pytest.mark.parametrize(
    "changes", [{}, BARE, {"rotary": None}, {"o_bias": None}], ids=["all", "bare", "nope", "qkv-bias"]
)
@pytest.mark.parametrize("options", [{}, {"n_kv_heads": None}, {"conv_width": 0}, {"write": "dt"}], ids=str)
@torch.no_grad()
def test_exactly_linear_attention(changes: dict[str, Any], options: dict[str, Any]) -> None:
    """softplus(dt_bias) = 1, no weight on dt, A = 0, D = 0, identity convolution, no SiLU, an open gate, no norm."""
    source = teacher(**changes)
    mixer = Mamba2.from_attention(source, AttentionStats(**FOREVER), norm="none", **options)
    x_btd = torch.randn(2, 130, 32, dtype=torch.float64)
    torch.testing.assert_close(mixer(x_btd), linear_attention(source, x_btd), **EXACT)


@torch.no_grad()
def test_usual_start_is_far_from_linear_attention() -> None:
    """Mamba's own dt, A and D behind the same projections: not what a conversion may start from."""
    source = teacher(o_bias=None)
    mixer = Mamba2.from_attention(source, norm="none", write="dt")
    fresh = Mamba2(mixer.config).double()
    mixer.decay.load_state_dict(fresh.decay.state_dict())
    mixer.D.fill_(1.0)
    x_btd = torch.randn(2, 500, 32, dtype=torch.float64)
    cosine = F.cosine_similarity(mixer(x_btd).flatten(), linear_attention(source, x_btd).flatten(), dim=0)
    assert cosine < 0.5


def test_groups_are_repeated_by_heads_not_rows() -> None:
    source = teacher()
    mixer = Mamba2.from_attention(source, n_kv_heads=None)
    by_head = source.k_weight.unflatten(0, (2, 8)).repeat_interleave(3, dim=0)
    assert torch.equal(mixer.qkv.k_proj.weight.unflatten(0, (6, 8)), by_head)
    by_row = source.k_weight.repeat_interleave(3, dim=0).unflatten(0, (6, 8))
    assert F.cosine_similarity(by_row[1].flatten(), by_head[1].flatten(), dim=0) < 0.5


@torch.no_grad()
def test_half_life_is_the_teachers_look_back() -> None:
    lookback_h = torch.tensor([1.0, 2.0, 5.0, 40.0, 300.0, torch.inf])
    stats = AttentionStats(lookback_h, torch.ones(6))
    mixer = Mamba2.from_attention(teacher(), stats)
    g_bth, dt_bth = mixer.decay(mixer.dt_proj(torch.randn(1, 1, 32, dtype=torch.float64)))
    torch.testing.assert_close(dt_bth, torch.ones(1, 1, 6, dtype=torch.float64), rtol=1e-6, atol=0)
    kept_h = (g_bth[0, 0] * torch.where(lookback_h.isinf(), 1000.0, lookback_h)).exp()
    torch.testing.assert_close(kept_h, torch.tensor([0.5] * 5 + [1.0], dtype=torch.float64), rtol=1e-6, atol=0)
    # Less than a token is a token: the decay stays finite.
    none = Mamba2.from_attention(teacher(), AttentionStats(torch.zeros(6), torch.ones(6)))
    assert none.decay.A_log.isfinite().all()


@pytest.mark.parametrize("order", ["after_gate", "before_gate"])
@torch.no_grad()
def test_heads_start_at_the_teachers_loudness(order: str) -> None:
    rms_h = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0, 9.0], dtype=torch.float64)
    mixer = Mamba2.from_attention(teacher(), AttentionStats(torch.full((6,), 50.0), rms_h), norm=order)
    mixer.out_proj = torch.nn.Identity()
    y_bthv = mixer(torch.randn(2, 70, 32, dtype=torch.float64)).unflatten(-1, (6, 8))
    want = rms_h.expand(2, 70, 6)
    torch.testing.assert_close(y_bthv.square().mean(-1).sqrt(), want, rtol=1e-3, atol=0)


@torch.no_grad()
def test_unit_write_leaves_values_alone_when_the_decay_learns() -> None:
    x_btd = torch.randn(1, 1, 32, dtype=torch.float64)
    for write, ratio in (("unit", 1.0), ("dt", 2.0)):
        mixer = Mamba2.from_attention(teacher(), norm="none", write=write)
        _, before = mixer.read(x_btd, mixer.init_state(1))
        mixer.decay.dt_bias.fill_(float(torch.tensor(2.0).expm1().log()))
        _, after = mixer.read(x_btd, mixer.init_state(1))
        pair = [u.commit().recurrent_bhkv for u in (before, after)]
        torch.testing.assert_close(pair[1], ratio * pair[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("cast", ["to", "bfloat16", "half", "state_dict"])
def test_decay_and_state_stay_in_float32(cast: str) -> None:
    mixer = Mamba2(Mamba2.Config(d_model=16, n_heads=4, key_dim=4, value_dim=4))
    a_log, dt_bias = mixer.decay.A_log.clone(), mixer.decay.dt_bias.clone()
    assert not torch.equal(a_log, a_log.bfloat16().float())
    if cast == "to":
        mixer.to(torch.bfloat16)
    elif cast == "state_dict":
        saved = mixer.state_dict()
        mixer = Mamba2(mixer.config).to(torch.bfloat16)
        mixer.load_state_dict(saved)
    else:
        getattr(mixer, cast)()
    for parameter, value in ((mixer.decay.A_log, a_log), (mixer.decay.dt_bias, dt_bias)):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, value)
    low = mixer.out_proj.weight.dtype
    assert low in (torch.bfloat16, torch.float16)
    state = mixer.init_state(2)
    assert (state.recurrent_bhkv.dtype, state.conv_bdw.dtype) == (torch.float32, low)
    y_btd, update = mixer.read(torch.randn(2, 5, 16).to(low), state)
    after = update.commit(torch.tensor([3, 5]))
    assert (y_btd.dtype, after.recurrent_bhkv.dtype, after.conv_bdw.dtype) == (low, torch.float32, low)
    y_btd.float().sum().backward()
    assert mixer.decay.A_log.grad is not None
    assert mixer.decay.A_log.grad.dtype == torch.float32
    mixer.to("meta")
    assert (mixer.decay.A_log.device.type, mixer.decay.A_log.dtype) == ("meta", torch.float32)


def test_state_does_not_depend_on_capacity_and_has_the_documented_size() -> None:
    config = Mamba2.Config(d_model=16, n_heads=4, n_kv_heads=2, key_dim=6, value_dim=8, conv_width=4)
    mixer = Mamba2(config).to(torch.bfloat16)
    recurrent, conv = 4 * 6 * 8, (4 * 6 + 2 * 6 + 2 * 8) * 3
    for capacity in (0, 10**6):
        assert mixer.init_state(3, capacity, device="meta").nbytes == 3 * (4 * recurrent + 2 * conv)


def test_bad_configs_say_what_to_do() -> None:
    base = {"d_model": 16, "n_heads": 4, "key_dim": 4, "value_dim": 4}
    for changes, message in (
        ({"write": "dtt"}, "did you mean 'dt'"),
        ({"norm": "after"}, "did you mean 'after_gate'"),
        ({"activation": "relu"}, "did you mean 'silu'"),
        ({"n_kv_heads": 3}, "n_heads=4 must be a multiple of n_kv_heads=3"),
        ({"n_kv_heads": 2, "n_groups": 2}, "leave one out"),
    ):
        with pytest.raises(ConfigError, match=message):
            Mamba2(Mamba2.Config(**(base | changes)))
    with pytest.raises(ConfigError, match="did you mean 'conv_width'"):
        Mamba2.from_attention(teacher(), conv_widht=3)
    with pytest.raises(ConfigError, match="leave n_heads, key_dim and n_groups out"):
        Mamba2.from_attention(teacher(), n_heads=12)


def their_mixer(family: str, config: Mamba2.Config) -> torch.nn.Module:
    """The mixer of `transformers` of that shape, on its torch path."""
    pytest.importorskip("transformers")
    from transformers.models.bamba import modeling_bamba as bamba
    from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
    from transformers.models.mamba2 import modeling_mamba2 as mamba2

    inner = config.n_heads * config.value_dim
    assert inner % config.d_model == 0
    groups = config.n_groups or config.n_heads
    shape = {
        "mamba_n_heads": config.n_heads,
        "mamba_d_head": config.value_dim,
        "mamba_n_groups": groups,
        "mamba_d_state": config.key_dim,
        "mamba_d_conv": config.conv_width,
        "mamba_expand": inner // config.d_model,
        "mamba_chunk_size": 16,
        "mamba_conv_bias": True,
        "mamba_proj_bias": config.bias,
        "hidden_size": config.d_model,
        "num_hidden_layers": 1,
        "rms_norm_eps": config.norm_eps,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    if family == "bamba":
        return bamba.BambaMixer(bamba.BambaConfig(**shape), 0)
    if family == "granitemoehybrid":
        return granite.GraniteMoeHybridMambaLayer(granite.GraniteMoeHybridConfig(**shape), 0)
    return mamba2.Mamba2Mixer(
        mamba2.Mamba2Config(
            num_heads=config.n_heads,
            head_dim=config.value_dim,
            state_size=config.key_dim,
            n_groups=groups,
            conv_kernel=config.conv_width,
            expand=inner // config.d_model,
            chunk_size=16,
            use_conv_bias=True,
            use_bias=config.bias,
            hidden_size=config.d_model,
            num_hidden_layers=1,
            layer_norm_epsilon=config.norm_eps,
        ),
        0,
    )


@torch.no_grad()
def load_into(theirs: torch.nn.Module, mixer: Mamba2) -> None:
    """The whole map: in_proj is z, x, B, C, dt; the convolution's channels are x, B, C."""
    qkv = mixer.qkv
    projections = (mixer.z_proj, qkv.v_proj, qkv.k_proj, qkv.q_proj, mixer.dt_proj)
    theirs.in_proj.weight.copy_(torch.cat([p.weight for p in projections]))
    if theirs.in_proj.bias is not None:
        biases = [torch.zeros(p.out_features) if p.bias is None else p.bias for p in projections]
        theirs.in_proj.bias.copy_(torch.cat(biases))
        theirs.out_proj.bias.copy_(0.0 * theirs.out_proj.bias if mixer.out_proj.bias is None else mixer.out_proj.bias)
    theirs.conv1d.weight.copy_(qkv.conv_weight[:, None])
    theirs.conv1d.bias.copy_(qkv.conv_bias)
    for name in ("A_log", "dt_bias"):
        getattr(theirs, name).copy_(getattr(mixer.decay, name))
    theirs.D.copy_(mixer.D)
    theirs.norm.weight.copy_(mixer.norm_weight)
    theirs.out_proj.weight.copy_(mixer.out_proj.weight)


@pytest.mark.parametrize("groups", [None, 1, 2])
@pytest.mark.parametrize(("bias", "proj_bias"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("family", ["bamba", "granitemoehybrid", "mamba2"])
@torch.no_grad()
def test_exportable_profile_equals_transformers(family: str, bias: bool, proj_bias: bool, groups: int | None) -> None:
    """Without biases of their own they can't hold the gate's; with zeros beside it they can."""
    shape = {"d_model": 16, "n_heads": 4, "key_dim": 6, "value_dim": 8, "bias": bias, "n_groups": groups}
    mixer = Mamba2(Mamba2.Config(**shape, **EXPORTABLE))
    for parameter in mixer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    if not proj_bias:
        mixer.z_proj.bias.zero_()
    theirs = their_mixer(family, dataclasses.replace(mixer.config, bias=proj_bias)).eval()
    load_into(theirs, mixer)
    x_btd = torch.randn(2, 70, 16)
    y_btd = theirs(x_btd)
    # float32 sums of some hundred terms, in another order.
    torch.testing.assert_close(mixer(x_btd), y_btd, rtol=1e-4, atol=1e-4 * float(y_btd.abs().max()))
    assert (mixer.double()(x_btd.double()) - y_btd).norm() < 1e-5 * y_btd.norm()


@torch.no_grad()
def test_attention_becomes_exportable() -> None:
    """A grouped teacher with biases and QK norms in the profile that the stock architectures compute."""
    mixer = Mamba2.from_attention(teacher(), AttentionStats(torch.full((6,), 30.0), torch.ones(6)), **EXPORTABLE)
    theirs = their_mixer("bamba", dataclasses.replace(mixer.config, d_model=48))
    theirs.in_proj = torch.nn.Linear(32, theirs.in_proj.out_features)
    theirs.out_proj = torch.nn.Linear(48, 32)
    load_into(theirs, mixer.float())
    x_btd = torch.randn(2, 40, 32)
    y_btd = theirs.eval()(x_btd)
    torch.testing.assert_close(mixer(x_btd), y_btd, rtol=1e-4, atol=1e-5)
