"""The Hyena recurrence: projections, a short convolution, and gates between long convolutions that a mixer brings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.ops import short_conv

# Number of the long convolution, its inputs, and the gates in front of it and behind it, where it has them.
Convolve = Callable[[int, Tensor, Tensor | None, Tensor | None], Tensor]


class Recurrence(nn.Module):
    """``z <- h_n * (x_n z)`` for n from 1 to N - 1, from ``z = v``; ``y = x_N z`` (arXiv 2302.10866, definition 3.1).

    The gates x and v are projections behind a short convolution, which stands for the first of the paper's N filters.
    With fewer heads than channels the channels of a head share a filter, and what is convolved is the outer product
    of gate and value (arXiv 2310.18780, section 4): ``y_t = q_t (h * k v^T)_t``, for N = 2.

    Args:
        d_model: width of the model.
        order: N, the number of gates; there is a long convolution between each two.
        n_heads: heads; None is one a channel.
        conv_width: taps of the short convolution.

    Attributes:
        heads, head_dim: filters of a convolution, and channels of a head.
        channels: channels that a long convolution runs over, ``heads * head_dim ** 2``.
        convolutions: long convolutions, ``order - 1``.

    Raises:
        ConfigError: an order below 2, heads that don't divide the width, or outer products of another order than 2.
    """

    def __init__(self, d_model: int, order: int, n_heads: int | None, conv_width: int) -> None:
        super().__init__()
        heads = d_model if n_heads is None else n_heads
        if order < 2:
            raise ConfigError(f"order={order} must be at least 2, a gate on both sides of a convolution; raise it")
        if heads < 1 or d_model % heads:
            raise ConfigError(f"d_model={d_model} must be a multiple of n_heads={heads}; change one of them")
        if heads != d_model and order != 2:
            raise ConfigError(f"n_heads={heads} of several channels needs order=2, got {order}; leave one of them out")
        if conv_width < 1:
            raise ConfigError(f"conv_width={conv_width} must be at least 1, which is no convolution; raise it")
        self.heads, self.head_dim, self.convolutions = heads, d_model // heads, order - 1
        self.channels = heads * self.head_dim**2
        width = (order + 1) * d_model
        self.in_proj = nn.Linear(d_model, width)
        self.conv_weight = nn.Parameter(torch.empty(width, conv_width).uniform_(-1, 1) * conv_width**-0.5)
        self.conv_bias = nn.Parameter(torch.zeros(width))
        self.direct_ng = nn.Parameter(torch.randn(self.convolutions, heads))
        self.out_proj = nn.Linear(d_model, d_model)

    def direct_d(self, n: int, more_ng: Tensor | None = None) -> Tensor:
        """What each input of convolution n adds to the output at its own place, ``[channels]``, and more if given."""
        direct_g = self.direct_ng[n] if more_ng is None else self.direct_ng[n] + more_ng[n]
        return direct_g.repeat_interleave(self.head_dim**2)

    def forward(self, x_btd: Tensor, state_bdw: Tensor, layout: Layout, convolve: Convolve) -> tuple[Tensor, Tensor]:
        """The output, and what stood before the short convolution, from which its state goes on.

        Args:
            x_btd: ``[b, t, d]``.
            state_bdw: of the short convolution.
            layout: where the tokens stand.
            convolve: the long convolutions.
        """
        inputs_btd = self.in_proj(x_btd)
        mixed_btd = short_conv.parallel(
            inputs_btd, self.conv_weight, self.conv_bias, state_bdw, documents_bt=layout.documents_bt
        )
        z, *gates = mixed_btd.split(x_btd.shape[2], dim=-1)
        if self.head_dim == 1:
            for n in range(self.convolutions):
                z = convolve(n, z, gates[n], gates[-1] if n == self.convolutions - 1 else None)
            return self.out_proj(z), inputs_btd
        v, k, q = (x.unflatten(-1, (self.heads, -1)) for x in (z, *gates))
        summed_btd = convolve(0, (k[..., :, None] * v[..., None, :]).flatten(2), None, None)
        y_bth1v = q[..., None, :] @ summed_btd.unflatten(-1, (self.heads, self.head_dim, -1))
        return self.out_proj(y_bth1v.flatten(2)), inputs_btd
