"""H3: a shift and a diagonal state space with two multiplications between them, where attention has its softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subquad.core.card import Card
from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.mixer import NOTHING, Mixer, Shared, Update
from subquad.core.state import State, axes, precise
from subquad.ops import chunks, flashconv, short_conv
from subquad.ops.diagonal import Diagonal

CARD = Card(
    title="Hungry Hungry Hippos: Towards Language Modeling with State Space Models",
    entry="H3",
    arxiv="2212.14052",
    gives="recall of what followed a token before, which plain state spaces lack: a key is held until its value comes",
    status="incubating",
    claim="a 125M hybrid with two attention layers beats the Transformer by 1.0 in perplexity; H3 alone is 0.4 behind",
    measured="induction heads and recall learnt to 100 %, as the paper says; no language model was trained",
    result="tasks.recall.state_spaces.cpu.json",
    constant_state=True,
    examples={
        "paper": {"d_model": 12, "d_state": 8, "width": 8},
        "heads": {"d_model": 8, "head_dim": 4, "d_state": 4, "width": 1, "init": "legs", "bias": True},
    },
)


@dataclass(frozen=True)
class H3State(State):
    """The diagonal system's modes of every product of a key and a value, and the last inputs of the shift."""

    modes_bdnp: Tensor = axes("b d n p", shard="d", precision="high")
    inputs_bdw: Tensor = axes("b d w", shard="d")


@dataclass(frozen=True)
class H3Update(Update):
    """One block's products and shift inputs, and the states before and behind all of it."""

    state: H3State
    end_bdnp: Tensor
    products_btd: Tensor
    k_btd: Tensor
    layout: Layout
    system: Diagonal

    def commit(self, n_b: Tensor | None = None) -> H3State:
        """Run the kept tokens through both systems."""
        where = {"valid_bt": chunks.kept(self.layout, n_b), "documents_bt": self.layout.documents_bt}
        before, end_bdnp = self.state, self.end_bdnp
        if n_b is not None and self.k_btd.shape[1] == 1:
            end_bdnp = torch.where((n_b > 0)[:, None, None, None], end_bdnp, before.modes_bdnp)
        elif n_b is not None:
            end_bdnp = self.system.final_state(self.products_btd, before.modes_bdnp, **where)
        inputs_bdw = short_conv.final_state(self.k_btd, before.inputs_bdw, **where)
        return H3State(end_bdnp.to(before.modes_bdnp.dtype), inputs_bdw)


class H3(Mixer):
    """``y_t = q_t (diagonal (shift(k) v))_t`` in every head, between projections of x.

    Algorithm 1 of arXiv 2212.14052. With heads of several channels the product in the middle is the outer one, and
    ``q_t`` reads along the keys: linear attention with a learned long filter in the place of the sum.

    Example:
        >>> import torch
        >>> mixer = H3(H3.Config(d_model=32, d_state=8, width=4))
        >>> y, update = mixer.read(torch.randn(2, 3, 32), mixer.init_state(batch=2))
        >>> update.commit(torch.tensor([3, 1])).modes_bdnp.shape
        torch.Size([2, 32, 4, 2])
    """

    @dataclass(frozen=True)
    class Config:
        """Shape and start; the defaults are the paper's.

        Attributes:
            d_model: width of the model.
            head_dim: channels of a head; the state is as many times as large.
            d_state: size of the diagonal system's state, even, for each product of a key and a value.
            width: tokens that the shift sees, the current one included.
            init: ``legs``, ``inv`` or ``lin``, of the diagonal system.
            dt_min, dt_max: range of the heads' steps at the start.
            bias: biases in the projections.
        """

        d_model: int
        head_dim: int = 1
        d_state: int = 64
        width: int = 64
        init: str = "lin"
        dt_min: float = 1e-3
        dt_max: float = 1e-1
        bias: bool = False

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        if config.head_dim < 1 or d % config.head_dim:
            raise ConfigError(f"d_model={d} must be a multiple of head_dim={config.head_dim}; change one of them")
        if config.width < 1:
            raise ConfigError(f"width={config.width}: expected at least 1, the current token; try 64")
        heads = d // config.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d, d, bias=config.bias) for _ in range(4))
        self.shift = nn.Parameter(torch.randn(d, config.width) * config.width**-0.5)
        self.system = Diagonal(heads, config.d_state, init=config.init, dt_min=config.dt_min, dt_max=config.dt_max)
        self.skip = nn.Parameter(torch.randn(heads))

    def init_state(self, batch: int, capacity: int = 0, **factory: Any) -> H3State:
        """Zeros; `capacity` is not needed."""
        device, dtype = (factory.get(name) or getattr(self.shift, name) for name in ("device", "dtype"))
        channels, d = self.config.d_model * self.config.head_dim, self.config.d_model
        return H3State(
            torch.zeros(batch, channels, self.system.modes, 2, device=device, dtype=precise(dtype)),
            torch.zeros(batch, d, self.config.width - 1, device=device, dtype=dtype),
        )

    def forward(self, x_btd: Tensor, layout: Layout | None = None, shared: Shared = NOTHING) -> Tensor:
        """The training form, two long convolutions."""
        layout = self.dense_layout(x_btd, layout)
        t, documents_bt = x_btd.shape[1], layout.documents_bt
        if t == 0:
            return x_btd.clone()
        (x_btd,) = chunks.blank(chunks.kept(layout), x_btd)
        q_btd, k_btd, v_btd = self.q_proj(x_btd), self.k_proj(x_btd), self.v_proj(x_btd)
        k_btd = flashconv.parallel(k_btd, self.shift.flip(-1), documents_bt=documents_bt)
        kernel_gl, skip_d = self.system.kernel(t), self._spread(self.skip)
        if self.config.head_dim == 1:
            y_btd = flashconv.parallel(
                v_btd, kernel_gl, skip_d, gate_in_btd=k_btd, gate_out_btd=q_btd, documents_bt=documents_bt
            )
        else:
            products_btd = self._products(k_btd, v_btd)
            y_btd = self._ask(flashconv.parallel(products_btd, kernel_gl, skip_d, documents_bt=documents_bt), q_btd)
        return self.out_proj(y_btd)

    def read(
        self, x_btd: Tensor, state: State, layout: Layout | None = None, shared: Shared = NOTHING
    ) -> tuple[Tensor, H3Update]:
        """Run the block through both recurrences; see `Mixer.read`."""
        assert isinstance(state, H3State)
        layout = self.dense_layout(x_btd, layout)
        where = {"valid_bt": chunks.kept(layout), "documents_bt": layout.documents_bt}
        k_btd = self.k_proj(x_btd)
        shifted_btd = short_conv.parallel(k_btd, self.shift, None, state.inputs_bdw, documents_bt=layout.documents_bt)
        products_btd = self._products(shifted_btd, self.v_proj(x_btd))
        made_btd, end_bdnp = self.system.scan(products_btd, state.modes_bdnp, **where)
        made_btd = torch.addcmul(made_btd, products_btd, self._spread(self.skip))
        y_btd = self.out_proj(self._ask(made_btd, self.q_proj(x_btd)))
        return y_btd, H3Update(state, end_bdnp, products_btd, k_btd, layout, self.system)

    def _spread(self, values_h: Tensor) -> Tensor:
        """A number a head for every product of the head."""
        return values_h.repeat_interleave(self.config.head_dim**2)

    def _products(self, k_btd: Tensor, v_btd: Tensor) -> Tensor:
        """The outer product of keys and values in each head, ``[b, t, h k v]``."""
        k_bthk, v_bthv = (x.unflatten(-1, (-1, self.config.head_dim)) for x in (k_btd, v_btd))
        return (k_bthk[..., :, None] * v_bthv[..., None, :]).flatten(2)

    def _ask(self, made_btd: Tensor, q_btd: Tensor) -> Tensor:
        """What each head's query reads of the products, ``[b, t, d]``."""
        n = self.config.head_dim
        return (q_btd.unflatten(-1, (-1, 1, n)) @ made_btd.unflatten(-1, (-1, n, n))).flatten(2)
