"""A stack that is trained on whole rows and never read token by token, and so may norm over the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.state import precise
from subquad.models.config import ModelConfig
from subquad.models.offers import Offers
from subquad.models.stack import SwiGLU, build_mixer
from subquad.ops import chunks

# Share of a step in the running statistics.
MOMENTUM = 0.1


class BatchNorm(nn.Module):
    """``weight (x - mean) / sqrt(var + eps) + bias``, mean and variance of a channel over all tokens of a batch.

    Algorithm 1 of arXiv 1502.03167, in float32. Padding does not count. What tests use are running averages of the
    training's statistics, the variance's as an unbiased estimate.

    Args:
        d_model: channels.
        eps: added to the variance.
    """

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(d_model)), nn.Parameter(torch.zeros(d_model))
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", torch.zeros(d_model))
        self.register_buffer("var", torch.ones(d_model))

    def forward(self, x_btd: Tensor, valid_bt: Tensor | None) -> Tensor:
        """``[b, t, d] -> [b, t, d]``; `valid_bt` is True where a token stands, None where one stands everywhere."""
        if self.training and valid_bt is not None:
            return self._over(x_btd, valid_bt)
        # Told by its own layout, PyTorch reads channels that lie last as they lie.
        x_nd = x_btd.flatten(0, 1)
        y_nd = F.batch_norm(x_nd, self.mean, self.var, self.weight, self.bias, self.training, MOMENTUM, self.eps)
        return y_nd.view_as(x_btd)

    def _over(self, x_btd: Tensor, valid_bt: Tensor) -> Tensor:
        """The same over some of the tokens; the others get zeros."""
        y_btd, mean_d, var_d = _OverSome.apply(x_btd, valid_bt, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.mean.lerp_(mean_d, MOMENTUM)
            self.var.lerp_(var_d, MOMENTUM)
        return y_btd


class _OverSome(torch.autograd.Function):
    """`BatchNorm` over some tokens, with its gradient as one formula: a long row's is bound by passes over it."""

    @staticmethod
    def forward(
        ctx: Any, x_btd: Tensor, valid_bt: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, mean, and the unbiased variance."""
        count = valid_bt.sum()
        share_bt = valid_bt.to(x_btd.dtype) / count
        mean_d = _weighted(share_bt, x_btd)
        apart_btd = torch.where(valid_bt[..., None], x_btd - mean_d, 0)
        var_d = _weighted(share_bt, apart_btd.square())
        scale_d = (var_d + eps).rsqrt()
        unbiased_d = var_d * count / (count - 1).clamp(min=1)
        ctx.save_for_backward(apart_btd, valid_bt, share_bt, count, weight, scale_d)
        ctx.mark_non_differentiable(mean_d, unbiased_d)
        y_btd = torch.where(valid_bt[..., None], torch.addcmul(bias, apart_btd, scale_d * weight), 0)
        return y_btd, mean_d, unbiased_d

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """With ``z`` the standardised inputs: ``scale weight (dy - mean dy - z mean(z dy))``."""
        dy_btd = gradients[0]
        apart_btd, valid_bt, share_bt, count, weight, scale_d = ctx.saved_tensors
        dmean_d = _weighted(share_bt, dy_btd)
        dscale_d = _weighted(share_bt, apart_btd * dy_btd) * scale_d
        inner_btd = torch.addcmul(dy_btd - dmean_d, apart_btd, scale_d * dscale_d, value=-1)
        dx_btd = torch.where(valid_bt[..., None], inner_btd * (scale_d * weight), 0)
        return dx_btd, None, dscale_d * count, dmean_d * count, None


def _weighted(share_bt: Tensor, x_btd: Tensor) -> Tensor:
    """``sum_bt share_bt x_btd``, as products: PyTorch's sums over all but the last axis take several times as long."""
    with torch.autocast(x_btd.device.type, enabled=False):
        return torch.bmm(share_bt[:, None], x_btd)[:, 0].sum(0)


class EncoderBlock(nn.Module):
    """``x + mixer(norm1(x))``, then ``x + mlp(norm2(x))`` where the model has MLPs."""

    def __init__(self, config: ModelConfig, layer: dict[str, Any]) -> None:
        super().__init__()
        self.norm1 = BatchNorm(config.d_model, config.norm_eps)
        self.mixer = build_mixer(layer, config.d_model)
        self.norm2 = BatchNorm(config.d_model, config.norm_eps) if config.d_mlp else None
        self.mlp = SwiGLU(config.d_model, config.d_mlp, config.mlp_bias) if config.d_mlp else None

    def forward(self, x_btd: Tensor, layout: Layout) -> Tensor:
        """``[b, t, d] -> [b, t, d]``."""
        valid_bt = chunks.kept(layout)
        x_btd = x_btd + self.mixer(_as_products(self.norm1(x_btd, valid_bt)), layout)
        if self.norm2 is None or self.mlp is None:
            return x_btd
        return x_btd + self.mlp(_as_products(self.norm2(x_btd, valid_bt)))


class Encoder(nn.Module):
    """Blocks of mixer and SwiGLU with batch norms, in front of each and behind the last; a `Stack` otherwise.

    The stream is in float32 whatever products are in: where most tokens are alike, as an image's black pixels, the
    others are told from them by what a rounding to bfloat16 would blur.

    Args:
        config: as a `Stack`'s.

    Raises:
        ConfigError: a mixer that reads what layers below it offer.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed: nn.Module = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = cast(
            "Sequence[EncoderBlock]", nn.ModuleList(EncoderBlock(config, dict(x)) for x in config.layers)
        )
        self.norm = BatchNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size)
        offers = Offers([block.mixer for block in self.blocks])
        for i, layer in enumerate(config.layers):
            if offers.concern(i):
                raise ConfigError(
                    f"layers[{i}]: expected a mixer that reads its own input alone, got {layer['mixer']}; an encoder "
                    "hands nothing from layer to layer, take --norm rms"
                )

    def hidden(self, inputs: Tensor, layout: Layout) -> Tensor:
        """Stream after the final norm, ``[b, t, d]``."""
        x_btd = self.embed(inputs)
        x_btd = x_btd.to(precise(x_btd.dtype))
        for block in self.blocks:
            x_btd = block(x_btd, layout)
        return self.norm(x_btd, chunks.kept(layout))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., vocabulary]`` of hidden states ``[..., d]``."""
        return self.lm_head(hidden)


def _as_products(x: Tensor) -> Tensor:
    """In the dtype that autocast computes products in: what lies between the norm and them is half the size then."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
