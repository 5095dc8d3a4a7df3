"""The start of the linear state from a teacher's text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.ops import kmeans, rope

if TYPE_CHECKING:
    from subquad.mixers.windowed_linear import WindowedLinear

# Key features start as a softmax of this times minus half the squared distance to each centroid, in units of spread.
SHARPNESS = 4.0
PROBES = 64


@torch.no_grad()
def from_text_(mixer: WindowedLinear, x_btd: Tensor) -> None:
    """`WindowedLinear.start_from_`."""
    config = mixer.config
    if x_btd.shape[1] <= config.window + config.sinks + 1:
        raise ConfigError(
            f"windowed_linear: expected text in rows of more than window + sinks + 1 = "
            f"{config.window + config.sinks + 1} tokens, got {x_btd.shape[1]}; "
            "take longer sequences or a smaller window"
        )
    layout = Layout.dense(*x_btd.shape[:2], device=x_btd.device)
    q_bthk, k_btgk, _ = mixer.qkv.project(x_btd)
    keys_gnk = k_btgk.flatten(0, 1).transpose(0, 1).float()
    mean_g1k = keys_gnk.mean(1, keepdim=True)
    spread_g11 = (keys_gnk - mean_g1k).norm(dim=-1).square().mean(1).sqrt()[:, None, None].clamp(min=1e-6)
    centres_gfk = kmeans.lloyd((keys_gnk - mean_g1k) / spread_g11, config.features, iterations=8)
    temper = config.head_dim**0.5
    mixer.k_map_weight.copy_(SHARPNESS * temper / spread_g11 * centres_gfk.mT)
    logits_gf = -SHARPNESS * (0.5 * centres_gfk.square().sum(-1) + (centres_gfk @ mean_g1k.mT / spread_g11)[..., 0])
    mixer.k_map_bias.copy_(logits_gf)
    r = config.n_heads // config.n_kv_heads
    kept_k = _slow_channels(mixer).to(centres_gfk)
    scores_gkf = ((centres_gfk * spread_g11 + mean_g1k) * kept_k).mT * (mixer.scale * temper)
    mixer.q_map_weight.copy_(scores_gkf.repeat_interleave(r, 0))
    mixer.q_map_bias.zero_()
    mixer.q_map_fade.zero_()

    rotated_q, rotated_k = mixer.qkv.rotate(q_bthk, k_btgk, layout)
    # Some queries of a row, never more than about PROBES: each is scored against every key.
    t = x_btd.shape[1]
    probes_t = torch.arange(config.window + config.sinks, t, max(37, t // PROBES | 1), device=x_btd.device)
    columns_n = torch.arange(t, device=x_btd.device)
    far_tn = (probes_t[:, None] - columns_n >= config.window) & (columns_n >= config.sinks)
    turned_bhtk, turned_bgnk = rotated_q[:, probes_t].transpose(1, 2).float(), rotated_k.transpose(1, 2).float()
    scores_bhtn = mixer.scale * turned_bhtk @ turned_bgnk.repeat_interleave(r, 1).mT
    true_bht = scores_bhtn.masked_fill(~far_tn, -torch.inf).logsumexp(-1)
    features_bhnf = mixer.key_features(k_btgk).transpose(1, 2).repeat_interleave(r, 1).float()
    n_t = far_tn.sum(1)
    weights_bhtf = mixer.query_weights(q_bthk[:, probes_t], n_t[None]).transpose(1, 2).float()
    top_bht1 = weights_bhtf.amax(-1, keepdim=True)
    mass_bhtn = (weights_bhtf - top_bht1).exp() @ features_bhnf.mT * far_tn
    ours_bht = mass_bhtn.sum(-1).log() + top_bht1[..., 0]
    lack_ht, length_t = (true_bht - ours_bht).mean(0), mixer.far_length(n_t)
    centred_t = length_t - length_t.mean()
    # A sample whose queries have about as many far tokens each tells no slope: one probe's weight holds it at 0.
    fade_h = -(lack_ht * centred_t).sum(1) / (centred_t.square().sum() + 1 / x_btd.shape[0])
    mixer.q_map_fade.copy_(fade_h)
    mixer.q_map_bias.add_((lack_ht.mean(1) + fade_h * length_t.mean())[:, None])


def _slow_channels(mixer: WindowedLinear) -> Tensor:
    """1 for channels that RoPE turns by less than 1.5 radians over three windows, whose phase survives, else 0."""
    kept_k = torch.ones(mixer.config.head_dim)
    if mixer.qkv.rotary is not None:
        slow_f = (rope.frequencies(mixer.qkv.rotary)[0] * 3 * mixer.config.window < 1.5).float()
        kept_k[: 2 * len(slow_f)] = torch.cat((slow_f, slow_f))
    return kept_k
