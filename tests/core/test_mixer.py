"""What the contract gives a mixer for free, on the smallest one there is: a running sum."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from subquad.core.attention import AttentionWeights
from subquad.core.errors import ConfigError, UnsupportedError
from subquad.core.layout import Layout
from subquad.core.mixer import NOTHING, Mixer, Update
from subquad.core.state import State, axes


@dataclass(frozen=True)
class SumState(State):
    total_bd: Tensor = axes("b d", precision="high")


@dataclass(frozen=True)
class SumUpdate(Update):
    state: SumState
    x_btd: Tensor

    def commit(self, n_b=None):
        b, t, _ = self.x_btd.shape
        n_b = torch.full((b,), t) if n_b is None else n_b
        kept_bt1 = (torch.arange(t) < n_b[:, None])[..., None]
        return SumState(self.state.total_bd + (self.x_btd * kept_bt1).sum(1))


class RunningSum(Mixer):
    @dataclass(frozen=True)
    class Config:
        d_model: int

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.ones(config.d_model))

    def init_state(self, batch, capacity=0, **factory):
        return SumState(torch.zeros(batch, self.config.d_model, **self.factory(**factory)))

    def read(self, x_btd, state, layout=None, shared=NOTHING):
        self.dense_layout(x_btd, layout)
        return state.total_bd[:, None] + x_btd.cumsum(1), SumUpdate(state, x_btd)


@pytest.fixture
def mixer():
    return RunningSum(RunningSum.Config(4)).double()


def test_forward_reads_from_the_empty_state(mixer):
    x_btd = torch.randn(2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(x_btd), x_btd.cumsum(1))


def test_commit_in_place_is_the_pure_commit_in_named_rows(mixer):
    pool = mixer.init_state(4)
    pool.total_bd.copy_(torch.arange(16.0).view(4, 4))
    before, rows, n_b = pool.snapshot(), torch.tensor([3, 1]), torch.tensor([2, 0])
    x_btd = torch.randn(2, 5, 4, dtype=torch.float64)
    _, update = mixer.read(x_btd, pool.select(rows))
    mixer.commit_(pool, rows, update, n_b)
    torch.testing.assert_close(pool.total_bd[rows], update.commit(n_b).total_bd)
    torch.testing.assert_close(pool.total_bd[1], before.total_bd[1])
    assert torch.equal(pool.total_bd[[0, 2]], before.total_bd[[0, 2]])


def test_in_place_commit_keeps_no_graph(mixer):
    pool = mixer.init_state(2)
    _, update = mixer.read(torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), pool)
    update.commit_(pool)
    assert not pool.total_bd.requires_grad
    assert update.commit().total_bd.requires_grad


def test_tentative_keeps_all_and_binds_nothing(mixer):
    x_btd = torch.randn(1, 3, 4, dtype=torch.float64)
    _, update = mixer.read(x_btd, mixer.init_state(1))
    torch.testing.assert_close(update.tentative().total_bd, x_btd.sum(1))
    torch.testing.assert_close(update.commit(torch.tensor([1])).total_bd, x_btd[:, 0])
    assert update.summary() is None


def test_state_follows_the_parameters_unless_told(mixer):
    assert mixer.init_state(1).total_bd.dtype == torch.float64
    assert mixer.init_state(1, dtype=torch.float32).total_bd.dtype == torch.float32
    assert mixer.init_state(1, device="meta").total_bd.device.type == "meta"


def test_a_layout_of_another_block_is_refused(mixer):
    with pytest.raises(ConfigError, match=r"expected shape \(1, 3\) as the block's, got \(1, 4\)"):
        mixer.read(torch.randn(1, 3, 4, dtype=torch.float64), mixer.init_state(1), Layout.dense(1, 4))


def test_no_mapping_from_attention_says_so():
    w = torch.zeros(4, 4)
    with pytest.raises(UnsupportedError, match="RunningSum has no mapping"):
        RunningSum.from_attention(AttentionWeights(w, w, w, w, n_heads=1, n_kv_heads=1, head_dim=4, scale=0.5))
