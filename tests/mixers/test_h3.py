"""What is particular to H3: its equations, and that it can hold a key until its value comes."""

from __future__ import annotations

import math

import pytest
import torch

from subquad.core.errors import ConfigError
from subquad.mixers.h3 import H3
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack


@pytest.mark.parametrize("head_dim", [1, 2])
@torch.no_grad()
def test_equals_the_papers_algorithm(head_dim: int) -> None:
    """Head by head and token by token from the parameters, in both forms."""
    mixer = H3(H3.Config(4, head_dim=head_dim, d_state=6, width=3, bias=True)).double()
    for parameter in mixer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    x_td, system = torch.randn(30, 4, dtype=torch.float64), mixer.system
    q_td, k_td, v_td = mixer.q_proj(x_td), mixer.k_proj(x_td), mixer.v_proj(x_td)
    want = torch.zeros(30, 4, dtype=torch.float64)
    for h in range(4 // head_dim):
        own = slice(h * head_dim, (h + 1) * head_dim)
        a_n = torch.complex(-system.log_rate[h].exp(), system.frequency[h])
        c_n, dt = torch.view_as_complex(system.output[h]), system.log_dt[h].exp()
        state_kvn = torch.zeros(head_dim, head_dim, 3, dtype=torch.complex128)
        for t in range(30):
            taps = ((j, t - 2 + j) for j in range(3) if t - 2 + j >= 0)
            k = sum((mixer.shift[own, j] * k_td[s, own] for j, s in taps), torch.zeros(head_dim, dtype=torch.float64))
            kv = torch.outer(k, v_td[t, own])
            state_kvn = (dt * a_n).exp() * state_kvn + ((dt * a_n).exp() - 1) / a_n * kv[..., None]
            made_kv = 2 * (c_n * state_kvn).sum(-1).real + mixer.skip[h] * kv
            want[t, own] = q_td[t, own] @ made_kv
    want = mixer.out_proj(want)
    torch.testing.assert_close(mixer(x_td[None])[0], want, rtol=1e-10, atol=1e-10)
    read_btd, _ = mixer.read(x_td[None], mixer.init_state(1))
    torch.testing.assert_close(read_btd[0], want, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_it_recalls_by_hand() -> None:
    """Section 3.1: with a shift of one and a filter that forgets nothing, a key brings up what followed it."""
    words = {name: i for i, name in enumerate("a1b2c3")}
    mixer = H3(H3.Config(6, head_dim=6, d_state=2, width=2)).double()
    for linear in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.out_proj):
        torch.nn.init.eye_(linear.weight)
    mixer.shift.copy_(torch.tensor([1.0, 0.0]).expand(6, -1))
    mixer.skip.zero_()
    system = mixer.system
    # One mode that stays: its pole is 1, and what it holds is read as it was written.
    system.log_dt.zero_(), system.frequency.zero_(), system.log_rate.fill_(-30)
    system.output.copy_(torch.tensor([0.5, 0.0]).expand_as(system.output))
    text = "a1b2c3b2a"
    x_btd = torch.nn.functional.one_hot(torch.tensor([[words[w] for w in text]]), 6).double()
    y_btd = mixer(x_btd)
    assert "a1b2c3"[int(y_btd[0, -1].argmax())] == "1" and "a1b2c3"[int(y_btd[0, 6].argmax())] == "2"
    torch.testing.assert_close(y_btd[0, -1], x_btd[0, 1], rtol=1e-9, atol=1e-9)


def test_a_hybrid_with_two_attention_layers_is_a_list_of_layers() -> None:
    attention = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 2, "head_dim": 4}
    h3 = {"mixer": "h3", "d_state": 4, "width": 4}
    model = Stack(ModelConfig(vocab_size=11, d_model=8, d_mlp=16, layers=(h3, attention, h3, attention)))
    tokens_bt = torch.randint(11, (2, 9))
    whole_btd, _ = model.read(tokens_bt, model.init_state(2, 9))
    state, pieces = model.init_state(2, 9), []
    for t in range(9):
        y_btd, update = model.read(tokens_bt[:, t : t + 1], state)
        pieces.append(y_btd)
        state = update.commit()
    # float32: some tens of roundings of 6e-8.
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole_btd, rtol=1e-4, atol=1e-5)


def test_state_has_the_documented_size() -> None:
    mixer = H3(H3.Config(8, head_dim=4, d_state=6, width=5)).to(torch.bfloat16)
    assert mixer.init_state(3, 10**6, device="meta").nbytes == 3 * (8 * 4 * 6 * 4 + 8 * 4 * 2)


def test_systems_and_state_stay_in_float32() -> None:
    mixer = H3(H3.Config(4, d_state=6, width=2)).to(torch.bfloat16)
    assert {p.dtype for p in mixer.system.parameters()} == {torch.float32}
    y_btd, update = mixer.read(torch.randn(2, 5, 4).bfloat16(), mixer.init_state(2))
    after = update.commit(torch.tensor([3, 0]))
    assert (y_btd.dtype, after.modes_bdnp.dtype, after.inputs_bdw.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    )


def test_bad_configs_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="d_model=8 must be a multiple of head_dim=3"):
        H3(H3.Config(8, head_dim=3))
    with pytest.raises(ConfigError, match="width=0: expected at least 1"):
        H3(H3.Config(8, width=0))
    assert math.isfinite(float(H3(H3.Config(8, width=1, d_state=2))(torch.randn(1, 1, 8)).detach().sum()))
