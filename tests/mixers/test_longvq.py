"""What is particular to LongVQ: its equations written out, what learns from what, exact counts, float32 parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.mixers.longvq import LongVQ


def build(**fields: Any) -> LongVQ:
    small = {"d_model": 6, "n_heads": 2, "key_dim": 3, "value_dim": 4, "n_codes": 5, "d_state": 4}
    mixer = LongVQ(LongVQ.Config(**small | fields)).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


@torch.no_grad()
def test_equals_the_equations_written_out() -> None:
    """Token by token, with plain softmax attention over keys that are replaced by the nearest code."""
    mixer, x_td = build(), torch.randn(80, 6, dtype=torch.float64)
    log_a_dn, residue_dn = mixer.system.discrete()
    state_dn, locals_, want = torch.zeros_like(log_a_dn), [], []
    for x_d in x_td:
        state_dn = log_a_dn.exp() * state_dn + x_d[:, None]
        locals_.append(F.silu((residue_dn * state_dn).sum(-1).real + mixer.skip * x_d))
    local_td = torch.stack(locals_)
    z_thk = F.silu(mixer.z_proj(local_td)).view(80, 2, 3)
    views = [z_thk * scale + shift for scale, shift in zip(mixer.scale_2hk, mixer.shift_2hk, strict=True)]
    q_thk, k_thk = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in views)
    v_thv = F.silu(mixer.v_proj(x_td)).view(80, 2, 4)
    for t in range(80):
        heads: list[Tensor] = []
        for h in range(2):
            nearest_t = torch.cdist(k_thk[: t + 1, h], mixer.book_hsk[h]).argmin(-1)
            score_t = mixer.book_hsk[h, nearest_t] @ q_thk[t, h] / 3**0.5
            heads.append(score_t.softmax(0) @ v_thv[: t + 1, h])
        gated = F.silu(mixer.reset_proj(local_td[t])) * torch.cat(heads)
        h_d = F.silu(mixer.h_proj(local_td[t]) + mixer.out_proj(gated))
        want.append(mixer.update_proj(local_td[t]).sigmoid() * h_d)
    torch.testing.assert_close(mixer(x_td[None])[0], torch.stack(want), rtol=1e-10, atol=1e-10)


def test_codes_learn_from_attention_and_keys_from_the_quantisation_loss() -> None:
    mixer, x_btd = build(), torch.randn(2, 30, 6, dtype=torch.float64)
    mixer(x_btd).square().sum().backward()
    assert mixer.book_hsk.grad is not None and mixer.scale_2hk.grad is not None
    assert mixer.book_hsk.grad.abs().sum() > 0
    assert mixer.scale_2hk.grad[0].abs().sum() > 0 and mixer.scale_2hk.grad[1].abs().sum() == 0
    mixer.zero_grad()
    mixer.quantisation_loss(x_btd).backward()
    assert mixer.scale_2hk.grad is not None and mixer.scale_2hk.grad[1].abs().sum() > 0
    start = mixer.quantisation_loss(x_btd).detach()
    optimiser = torch.optim.Adam(mixer.parameters(), lr=0.01)
    for _ in range(60):
        optimiser.zero_grad()
        mixer.quantisation_loss(x_btd).backward()
        optimiser.step()
    assert mixer.quantisation_loss(x_btd).detach() < start / 2


def test_quantisation_loss_is_of_tokens_only() -> None:
    mixer, x_btd = build(), torch.randn(2, 30, 6, dtype=torch.float64)
    rows = [mixer.quantisation_loss(x_btd[i : i + 1, :n]) for i, n in enumerate((30, 11))]
    padded = mixer.quantisation_loss(x_btd, Layout.ragged(torch.tensor([30, 11]), 30))
    torch.testing.assert_close(padded, (30 * rows[0] + 11 * rows[1]) / 41, rtol=1e-10, atol=0)
    assert mixer.quantisation_loss(x_btd[:, :0]) == 0
    keys_only = mixer.quantisation_loss(x_btd, commitment=0.0)
    torch.testing.assert_close(mixer.quantisation_loss(x_btd, commitment=1.0), 2 * keys_only, rtol=1e-10, atol=0)


def test_counts_are_exact_beyond_what_float32_holds() -> None:
    mixer = build().float()
    state = mixer.init_state(1)
    state.count_bhs.fill_(2**24)
    after = mixer.read(torch.randn(1, 1, 6), state)[1].commit()
    assert (after.count_bhs - 2**24).sum(-1).tolist() == [[1, 1]]


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_state_space_and_sums_stay_in_float32(cast: str) -> None:
    mixer = getattr(LongVQ(LongVQ.Config(6, key_dim=3, value_dim=4, n_codes=5, d_state=4)), cast)()
    low = mixer.h_proj.weight.dtype
    y_btd, update = mixer.read(torch.randn(2, 5, 6).to(low), mixer.init_state(2))
    state = update.commit(torch.tensor([3, 0]))
    assert mixer.system.log_dt.dtype == torch.float32
    assert (y_btd.dtype, state.local.modes_bdnp.dtype, state.sum_bhsv.dtype) == (low, torch.float32, torch.float32)


def test_state_has_the_documented_size() -> None:
    mixer = LongVQ(LongVQ.Config(16, n_heads=2, key_dim=4, value_dim=8, n_codes=64, d_state=6)).bfloat16()
    assert mixer.init_state(3, 10**6, device="meta").nbytes == 3 * (16 * 6 * 4 + 2 * 64 * (8 + 8 * 4))


def test_bad_configs_say_what_to_do() -> None:
    for fields, match in (
        ({"n_codes": 0}, "n_codes=0: expected at least 1"),
        ({"n_heads": 0}, "n_heads=0: expected at least 1"),
        ({"init": "leg"}, "did you mean 'legs'"),
        ({"d_state": 5}, "d_state=5"),
    ):
        with pytest.raises(ConfigError, match=match):
            build(**fields)
