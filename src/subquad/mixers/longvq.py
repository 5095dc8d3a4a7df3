"""LongVQ: attention to everything before through a codebook of fixed size, behind a diagonal state space, gated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.core.card import Card
from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.mixer import NOTHING, Mixer, Shared, Update
from subquad.core.state import State, axes, precise
from subquad.ops import chunks, vq_attention
from subquad.ops.diagonal import Diagonal
from subquad.ops.state_space import ModalState, ModalUpdate

CARD = Card(
    title="LongVQ: Long Sequence Modeling with Vector Quantization on Structured Memory",
    entry="LongVQ",
    arxiv="2404.11163",
    gives="softmax attention to everything before in a state of constant size: keys are codes, of which it keeps means",
    status="incubating",
    claim="ahead of Transformers, convolutions and state spaces on the Long Range Arena, at linear cost",
    measured="not reproduced: it takes trained models; a step behind 16K tokens has 9 times attention's speed, CPU",
    result="mixers.longvq.cpu.json",
    constant_state=True,
    examples={
        "paper": {"d_model": 12, "key_dim": 6, "value_dim": 10, "n_codes": 5, "d_state": 6},
        "heads": {"d_model": 8, "n_heads": 2, "key_dim": 3, "value_dim": 4, "n_codes": 9, "d_state": 4, "init": "lin"},
    },
)


@dataclass(frozen=True)
class LongVQState(State):
    """The state space's modes, and of each code how many tokens have it and the sum of their values."""

    local: ModalState
    count_bhs: Tensor = axes("b h s", shard="h", precision="index")
    sum_bhsv: Tensor = axes("b h s v", shard="h", precision="high")


@dataclass(frozen=True)
class LongVQUpdate(Update):
    """One block's codes and values, what it does to the modes, and the states before and behind all of it."""

    state: LongVQState
    local: ModalUpdate
    end_count_bhs: Tensor
    end_sum_bhsv: Tensor
    code_bth: Tensor
    v_bthv: Tensor
    layout: Layout

    def commit(self, n_b: Tensor | None = None) -> LongVQState:
        """Count and sum the kept tokens, and run them through the state space."""
        old, count_bhs, sum_bhsv = self.state, self.end_count_bhs, self.end_sum_bhsv
        if n_b is not None:
            where = {"valid_bt": chunks.kept(self.layout, n_b), "documents_bt": self.layout.documents_bt}
            count_bhs, sum_bhsv = vq_attention.final_state(
                self.code_bth, self.v_bthv, old.count_bhs, old.sum_bhsv, **where
            )
        return LongVQState(self.local.commit(n_b), count_bhs, sum_bhsv.to(old.sum_bhsv.dtype))


class LongVQ(Mixer):
    """``y = phi * silu(W_h x' + U(gamma * o))``: attention o over quantised keys, in gates of a state space x'.

    arXiv 2404.11163, in the causal form: ``o_t = sum_s w_ts S_ts / N_ts`` with ``w_t = softmax_s(q_t C_s + log N_ts)``,
    where N and S count and sum the values of the tokens so far whose key is nearest to code s. Which code that is is a
    choice without gradient: the codes learn from attention, the keys from `quantisation_loss`.

    Example:
        >>> import torch
        >>> mixer = LongVQ(LongVQ.Config(d_model=32, key_dim=8, value_dim=16, n_codes=64, d_state=8))
        >>> y, update = mixer.read(torch.randn(2, 3, 32), mixer.init_state(batch=2))
        >>> update.commit(torch.tensor([3, 1])).count_bhs.sum(-1).tolist()
        [[3], [1]]
    """

    @dataclass(frozen=True)
    class Config:
        """Shape and start.

        Attributes:
            d_model: width of the model.
            n_heads: heads, each with a codebook of its own.
            key_dim, value_dim: channels of a head's queries, keys and codes, and of its values.
            n_codes: codes of a head.
            d_state: size of each channel's state in the state space, even.
            init: ``legs``, ``inv`` or ``lin``, the state space's poles at the start.
            dt_min, dt_max: range of the channels' steps at the start.
            norm_eps: epsilon of the norm of queries and keys.
        """

        d_model: int
        n_heads: int = 1
        key_dim: int = 128
        value_dim: int = 256
        n_codes: int = 512
        d_state: int = 32
        init: str = "legs"
        dt_min: float = 1e-3
        dt_max: float = 1e-1
        norm_eps: float = 1e-6

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        for name in ("n_heads", "key_dim", "value_dim", "n_codes"):
            if getattr(config, name) < 1:
                raise ConfigError(f"{name}={getattr(config, name)}: expected at least 1; raise it")
        d, h, k, width = config.d_model, config.n_heads, config.key_dim, config.n_heads * config.value_dim
        self.system = Diagonal(d, config.d_state, init=config.init, dt_min=config.dt_min, dt_max=config.dt_max)
        self.skip = nn.Parameter(torch.randn(d))
        self.z_proj, self.v_proj = nn.Linear(d, h * k), nn.Linear(d, width)
        self.reset_proj, self.update_proj, self.h_proj = nn.Linear(d, width), nn.Linear(d, d), nn.Linear(d, d)
        self.out_proj = nn.Linear(width, d, bias=False)
        # Queries and keys are two views of one z; drawn apart, so that a token's query is not its own key.
        self.scale_2hk = nn.Parameter(torch.randn(2, h, k))
        self.shift_2hk = nn.Parameter(torch.zeros(2, h, k))
        # As long as normalised keys are.
        self.book_hsk = nn.Parameter(torch.randn(h, config.n_codes, k))

    def init_state(self, batch: int, capacity: int = 0, **factory: Any) -> LongVQState:
        """Zeros; `capacity` is not needed."""
        device, dtype = (factory.get(name) or getattr(self.skip, name) for name in ("device", "dtype"))
        high: dict[str, Any] = {"device": device, "dtype": precise(dtype)}
        h, s, v = self.config.n_heads, self.config.n_codes, self.config.value_dim
        return LongVQState(
            ModalState(torch.zeros(batch, self.config.d_model, self.system.modes, 2, **high)),
            torch.zeros(batch, h, s, device=device, dtype=torch.int64),
            torch.zeros(batch, h, s, v, **high),
        )

    def read(
        self, x_btd: Tensor, state: State, layout: Layout | None = None, shared: Shared = NOTHING
    ) -> tuple[Tensor, LongVQUpdate]:
        """Run the block through the state space and attend to its codes and all before; see `Mixer.read`."""
        assert isinstance(state, LongVQState)
        layout = self.dense_layout(x_btd, layout)
        where = {"valid_bt": chunks.kept(layout), "documents_bt": layout.documents_bt}
        local_btd, end_bdnp = self._local(x_btd, state.local, layout)
        q_bthk, k_bthk = self._queries_and_keys(local_btd)
        v_bthv = F.silu(self.v_proj(x_btd)).unflatten(-1, (self.config.n_heads, -1))
        code_bth = vq_attention.assign(k_bthk, self.book_hsk)
        o_bthv, count_bhs, sum_bhsv = vq_attention.scan(
            q_bthk * self.config.key_dim**-0.5,
            code_bth,
            v_bthv,
            self.book_hsk,
            state.count_bhs,
            state.sum_bhsv,
            **where,
        )
        gated_btd = F.silu(self.reset_proj(local_btd)) * o_bthv.flatten(2)
        y_btd = self.update_proj(local_btd).sigmoid() * F.silu(self.h_proj(local_btd) + self.out_proj(gated_btd))
        local = ModalUpdate(state.local, end_bdnp, x_btd, layout, self.system)
        return y_btd, LongVQUpdate(state, local, count_bhs, sum_bhsv, code_bth, v_bthv, layout)

    def quantisation_loss(self, x_btd: Tensor, layout: Layout | None = None, commitment: float = 0.25) -> Tensor:
        """How far keys are from their codes: ``mean |sg(k) - C|^2 + commitment |k - sg(C)|^2``.

        Equation 3 of arXiv 1711.00937, where sg stops the gradient. Keys have no other gradient than this loss's: who
        trains this mixer from nothing adds it to the loss, once a batch.

        Args:
            x_btd: ``[b, t, d]``, what `forward` is given.
            layout: as there; padding does not count.
            commitment: how much keys follow codes for each step that codes follow keys.

        Returns:
            A scalar, in units of a normalised key's mean square.
        """
        layout = self.dense_layout(x_btd, layout)
        state = self.init_state(len(x_btd), device=x_btd.device, dtype=x_btd.dtype)
        k_bthk = self._queries_and_keys(self._local(x_btd, state.local, layout)[0])[1]
        code_bth = vq_attention.assign(k_bthk, self.book_hsk)
        nearest_bthk = self.book_hsk[torch.arange(self.config.n_heads, device=x_btd.device), code_bth]
        apart_bthk = (k_bthk.detach() - nearest_bthk).square() + commitment * (k_bthk - nearest_bthk.detach()).square()
        return apart_bthk.mean((-2, -1))[layout.valid_bt].sum() / layout.lengths_b.sum().clamp(min=1)

    def _local(self, x_btd: Tensor, state: ModalState, layout: Layout) -> tuple[Tensor, Tensor]:
        """What the state space makes of the block, behind its activation, and the modes behind it."""
        where = {"valid_bt": chunks.kept(layout), "documents_bt": layout.documents_bt}
        local_btd, end_bdnp = self.system.scan(x_btd, state.modes_bdnp, **where)
        return F.silu(torch.addcmul(local_btd, x_btd, self.skip)), end_bdnp

    def _queries_and_keys(self, local_btd: Tensor) -> tuple[Tensor, Tensor]:
        """``[b, t, h, k]`` each, of mean square 1."""
        z_bt1hk = F.silu(self.z_proj(local_btd)).unflatten(-1, (1, self.config.n_heads, -1))
        both_bt2hk = torch.addcmul(self.shift_2hk, z_bt1hk, self.scale_2hk)
        q_bthk, k_bthk = F.rms_norm(both_bt2hk, (self.config.key_dim,), eps=self.config.norm_eps).unbind(2)
        return q_bthk, k_bthk
