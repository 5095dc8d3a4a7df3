"""What a teacher's attention does on real text: how far it looks back and how loud each head is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.core.attention import AttentionStats, AttentionWeights
from subquad.core.errors import UnsupportedError
from subquad.core.layout import Layout
from subquad.mixers.attention import Attention
from subquad.models.stack import Stack
from subquad.ops.qkv import QKV
from subquad.train.stages.align import listen

SCORES_AT_ONCE = 2**24
# In the teacher's forward.
TOKENS_AT_ONCE = 4096
# First tokens of a document on which attention is parked (arXiv 2309.17453); median and entropy leave them out.
PARKED = 4


def attention_of(teacher: Stack, layer: int) -> Attention:
    """The softmax attention of a layer.

    Raises:
        UnsupportedError: the layer has another mixer.
    """
    mixer = teacher.blocks[layer].mixer
    if not isinstance(mixer, Attention):
        raise UnsupportedError(
            f"layer {layer}: expected attention to convert, got {type(mixer).__name__}; choose other layers"
        )
    return mixer


@torch.no_grad()
def measure(
    teacher: Stack, batches: Sequence[Tensor], layers: Sequence[int], *, sample_tokens: int = 4096
) -> dict[int, AttentionStats]:
    """Statistics of the attention of `layers` over tokens ``[b, t]``, in one pass over each batch.

    ``lookback = mean over queries i of sum_j p_ij (i - j)`` and ``output_rms = sqrt(mean (sum_j p_ij v_j)^2)``. Of what
    is attended beside the first `PARKED` tokens, ``p'_ij = p_ij / m_i`` with ``m_i`` the sum over those j: the median
    of ``i - j``, each weighing ``p_ij``, and the mean of the entropies of ``p'_i``, each weighing ``m_i``.

    Args:
        teacher: the model.
        batches: dense token ids, all of one length; longer rows let a head look back further.
        layers: indices.
        sample_tokens: rows of inputs are kept until there are this many tokens, at least one row.

    Raises:
        UnsupportedError: a layer that is no attention.
    """
    sources = {i: attention_of(teacher, i).weights() for i in layers}
    sums: dict[int, list[Tensor]] = {i: [] for i in layers}
    inputs: dict[int, list[Tensor]] = {i: [] for i in layers}

    def heard(i: int, x_btd: Tensor, _: Tensor, layout: Layout) -> None:
        wanted = max(sample_tokens // x_btd.shape[1], 1) - sum(len(x) for x in inputs[i])
        if wanted > 0:  # copied, since a slice would keep the whole batch
            inputs[i].append(x_btd[:wanted].clone())
        sums[i].append(_one(x_btd.float(), sources[i], layout))

    for tokens_bt in batches:
        rows = max(1, TOKENS_AT_ONCE // tokens_bt.shape[1])
        listen(teacher, tokens_bt.to(teacher.device), layers, heard, rows=rows)
    out: dict[int, AttentionStats] = {}
    for i, found in sums.items():
        mean_hx = torch.stack(found).mean(0)
        lookback_h, square_h, entropy_h = mean_hx[:, :3].unbind(1)
        within_hd = mean_hx[:, 3:].cumsum(1)
        mass_h1 = within_hd[:, -1:]
        median_h = (within_hd < 0.5 * mass_h1).sum(1).to(lookback_h)
        entropy_h = entropy_h / mass_h1[:, 0].clamp(min=1e-12)
        out[i] = AttentionStats(lookback_h, square_h.sqrt(), torch.cat(inputs[i]), median_h, entropy_h)
    return out


def _one(x_btd: Tensor, source: AttentionWeights, layout: Layout) -> Tensor:
    """Of one dense batch in float32, ``[h, 3 + t]``: look-back, square of the output, entropy, and mass by distance.

    All are means over queries; the last t + 1 of what stands beside the first tokens.
    """
    h, g = source.n_heads, source.n_kv_heads
    qkv = QKV(
        x_btd.shape[2],
        h,
        g,
        source.head_dim,
        bias=source.q_bias is not None,
        norm=source.q_norm is not None,
        norm_eps=source.norm_eps,
        rotary=source.rotary,
    ).to(x_btd)
    qkv.take_(source)
    q_bthk, k_btgk, v_btgv = qkv(x_btd, layout)
    b, t = layout.shape
    at_t = torch.arange(t, device=x_btd.device)
    lookback_h, square_h, entropy_h = x_btd.new_zeros(3, h)
    mass_hd = x_btd.new_zeros(h, t)
    step = max(1, SCORES_AT_ONCE // (b * h * t))
    for start in range(0, t, step):
        q_bcgek = q_bthk[:, start : start + step].unflatten(2, (g, h // g))
        distance_ct = at_t[start : start + step, None] - at_t
        seen_ct = distance_ct >= 0
        if source.window is not None:
            seen_ct = seen_ct & (distance_ct < source.window)
        score_bgect = torch.einsum("bcgek,btgk->bgect", q_bcgek, k_btgk) * source.scale
        p_bgect = score_bgect.masked_fill(~seen_ct, float("-inf")).softmax(-1)
        lookback_h += torch.einsum("bgect,ct->ge", p_bgect, distance_ct.to(p_bgect.dtype)).flatten()
        square_h += torch.einsum("bgect,btgv->bcgev", p_bgect, v_btgv).square().sum((0, 1, 4)).flatten()
        # sum_j p' log p' = (sum_j p log p) / m - log m, and each weighs m.
        p_bhct = p_bgect[..., PARKED:].flatten(1, 2)
        entropy_h += (torch.special.entr(p_bhct).sum(-1) - torch.special.entr(p_bhct.sum(-1))).sum((0, 2))
        apart_n = distance_ct[:, PARKED:].clamp(min=0).flatten()
        mass_hd.index_add_(1, apart_n, p_bhct.sum(0).flatten(1))
    sums_h3 = torch.stack((lookback_h, square_h / source.head_dim, entropy_h), 1)
    return torch.cat((sums_h3, mass_hd), 1) / (b * t)
