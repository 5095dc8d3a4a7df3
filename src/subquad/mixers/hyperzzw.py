"""HyperZ.Z.W: convolutions over a whole image or line, with kernels that a small network makes and the input weighs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.core.card import Card
from subquad.core.errors import ConfigError, UnsupportedError
from subquad.core.layout import Layout
from subquad.core.mixer import NOTHING, Mixer, Shared
from subquad.core.precise import Precise
from subquad.core.state import State, precise
from subquad.ops import chunks

CARD = Card(
    title="HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction",
    entry="HyperZZW",
    arxiv="2401.17948",
    gives="every pixel meets every other with weights that depend on the image: to classify images, not to generate",
    status="incubating",
    claim="state of the art in pixel-level image classification, in 1D and 2D, with fewer parameters and no residuals",
    measured="not reproduced: it takes the paper's whole network; the layer has 2.3 times attention's speed at 64 x 64",
    result="mixers.hyperzzw.cpu.json",
    causal=False,
    splittable=False,
    examples={
        "image": {"d_model": 6, "shape": [14, 15], "hidden": 5},
        "line": {"d_model": 4, "shape": [210], "hidden": 4, "layers": 2, "local_sizes": [1, 5]},
    },
)


class SlowNet(Precise):
    """A hyper-kernel from coordinates x: ``h_1 = f_1``, ``h_i = (W_i h_{i-1} + b_i) f_i``, ``f_i = sin(R_i x + s_i)``.

    A multiplicative filter network (ICLR 2021, Fathony et al.); x runs from -1 to 1 along each axis. Parameters stay in
    at least float32 whatever the module is cast to: in bfloat16 neighbours would have the same coordinates.

    Args:
        shape: of the kernel.
        channels: kernels.
        hidden, layers: width and depth.
        omega: largest of the filters' frequencies R at the start, in radians.
    """

    def __init__(self, shape: tuple[int, ...], channels: int, hidden: int, layers: int, omega: float) -> None:
        super().__init__()
        self.shape = shape
        high = precise(torch.get_default_dtype())
        self.frequency = nn.Parameter(torch.empty(layers, hidden, len(shape), dtype=high).uniform_(-omega, omega))
        self.phase = nn.Parameter(torch.empty(layers, hidden, dtype=high).uniform_(-math.pi, math.pi))
        self.mix = nn.ModuleList(nn.Linear(hidden, hidden, dtype=high) for _ in range(layers - 1))
        self.out = nn.Linear(hidden, channels, bias=False, dtype=high)
        # A sum over all places of a kernel is of order one.
        nn.init.normal_(self.out.weight, std=(hidden * math.prod(shape)) ** -0.5)

    def forward(self) -> Tensor:
        """``[channels, *shape]``."""
        axes = [torch.linspace(-1, 1, n, device=self.phase.device, dtype=self.phase.dtype) for n in self.shape]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        filters = [torch.sin(grid @ r.T + s) for r, s in zip(self.frequency, self.phase, strict=True)]
        h = filters[0]
        for linear, f in zip(self.mix, filters[1:], strict=True):
            h = linear(h) * f
        return self.out(h).movedim(-1, 0)


class HyperZZW(Mixer):
    """``g_p = sum_q W_q z_q z_{p-q}`` over all places q of an image or line, ``l_p = z_p sum_q w_q z_{p+q}`` near p.

    arXiv 2401.17948: a hyper-kernel W, made from coordinates by a slow network, is multiplied by the activations z, and
    what comes out convolves z again. Places count modulo the shape in g. ``y = out([z, std(g), std(l), ...])``, where
    std standardises a channel over the tokens of its image.

    Each row, or each document of one, is an image in raster order; places behind its last token are blank.

    Example:
        >>> import torch
        >>> mixer = HyperZZW(HyperZZW.Config(d_model=8, shape=(4, 4)))
        >>> mixer(torch.randn(2, 16, 8)).shape
        torch.Size([2, 16, 8])
    """

    @dataclass(frozen=True)
    class Config:
        """Shape and start.

        Attributes:
            d_model: width of the model.
            shape: rows and columns of an image, or the length of a line.
            local_sizes: side of each small hyper-kernel, odd; none for the global one alone.
            hidden, layers: width and depth of the networks that make the kernels.
            omega: largest frequency in them at the start, in radians from the middle to the border.
            norm_eps: added to the variance where features are standardised.
        """

        d_model: int
        shape: tuple[int, ...]
        local_sizes: tuple[int, ...] = (3, 7)
        hidden: int = 32
        layers: int = 3
        omega: float = 10.0
        norm_eps: float = 1e-5

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.shape = tuple(config.shape)
        if len(self.shape) not in (1, 2) or min(self.shape, default=0) < 1:
            raise ConfigError(f"shape={config.shape}: expected one or two sizes of at least 1; give rows and columns")
        if any(n < 1 or n % 2 == 0 for n in config.local_sizes):
            raise ConfigError(
                f"local_sizes={config.local_sizes}: expected odd sizes, with a middle; add 1 to the others"
            )
        if min(config.hidden, config.layers) < 1:
            raise ConfigError(
                f"hidden={config.hidden}, layers={config.layers}: expected at least 1 of each; raise the other"
            )
        d, made = config.d_model, (config.d_model, config.hidden, config.layers, config.omega)
        self.in_proj = nn.Linear(d, d)
        self.whole = SlowNet(self.shape, *made)
        self.near = cast(
            "list[SlowNet]",
            nn.ModuleList(SlowNet((n,) * len(self.shape), *made) for n in config.local_sizes),
        )
        self.out_proj = nn.Linear((2 + len(self.near)) * d, d)

    def init_state(self, batch: int, capacity: int = 0, **factory: Any) -> NoReturn:
        """Refused: there is no state.

        Raises:
            UnsupportedError: with the reason.
        """
        raise _refusal()

    def read(self, x_btd: Tensor, state: State, layout: Layout | None = None, shared: Shared = NOTHING) -> NoReturn:
        """Refused: see `forward` for what it does.

        Raises:
            UnsupportedError: with the reason.
        """
        raise _refusal()

    def forward(self, x_btd: Tensor, layout: Layout | None = None, shared: Shared = NOTHING) -> Tensor:
        """Mix whole images.

        Args:
            x_btd: ``[b, t, d]``, an image a row in raster order, or one a document where rows are packed.
            layout: how many tokens each row has, and which document they belong to; None is an image a row.
            shared: not used.

        Raises:
            ConfigError: an image of more tokens than the shape has.
        """
        layout = self.dense_layout(x_btd, layout)
        if x_btd.shape[1] == 0:
            return x_btd.clone()
        places = math.prod(self.shape)
        slot_bt, images = self._slots(layout, places)
        valid_bt = layout.valid_bt
        (z_btd,) = chunks.blank(valid_bt, self.in_proj(x_btd))
        canvas_sd = z_btd.new_zeros(images * places, z_btd.shape[2]).index_add(
            0, slot_bt.flatten(), z_btd.flatten(0, 1)
        )
        taken_s = z_btd.new_zeros(images * places).index_add(0, slot_bt.flatten(), valid_bt.flatten().to(z_btd))
        with torch.autocast(x_btd.device.type, enabled=False):
            dtype = precise(z_btd.dtype)
            z_mdp = canvas_sd.to(dtype).unflatten(0, (images, places)).mT
            taken_m1p = taken_s.to(dtype).unflatten(0, (images, 1, places))
            branches = [self.whole_product(z_mdp), *(self._near_product(z_mdp, net) for net in self.near)]
            mixed = [_standardise(y_mdp, taken_m1p, self.config.norm_eps) for y_mdp in branches]
        mixed_sd = torch.cat(mixed, dim=1).mT.flatten(0, 1).to(z_btd.dtype)
        return self.out_proj(torch.cat((z_btd, mixed_sd[slot_bt]), dim=-1))

    def _slots(self, layout: Layout, places: int) -> tuple[Tensor, int]:
        """int64 ``[b, t]``, the place of each token among those of all images, and how many images there are."""
        valid_bt = layout.valid_bt
        at_bt = layout.index_bt(torch.zeros_like(layout.lengths_b))
        longest = int(at_bt.masked_fill(~valid_bt, -1).max()) + 1
        if longest > places:
            raise ConfigError(
                f"expected images of at most {places} tokens, shape {self.shape}, got one of {longest}; "
                "cut or resize them, or pack several as documents"
            )
        row_b1, of_row = torch.arange(layout.shape[0], device=valid_bt.device)[:, None], 1
        if layout.documents_bt is not None:
            documents_bt = cast("Tensor", chunks.settle(layout.documents_bt, valid_bt))
            of_row = int(documents_bt.max()) + 1
            row_b1 = row_b1 * of_row + documents_bt
        # Padding adds nothing, wherever it goes.
        return row_b1 * places + at_bt.clamp(max=places - 1), layout.shape[0] * of_row

    def whole_product(self, z_mdp: Tensor) -> Tensor:
        """``sum_q W_q z_q z_{p-q}`` by FFT."""
        axes = tuple(range(-len(self.shape), 0))
        z = z_mdp.unflatten(-1, self.shape)
        kernel = self.whole().to(z.dtype) * z
        product = torch.fft.rfftn(kernel, dim=axes) * torch.fft.rfftn(z, dim=axes)
        return torch.fft.irfftn(product, s=self.shape, dim=axes).flatten(len(axes) * -1)

    def _near_product(self, z_mdp: Tensor, net: SlowNet) -> Tensor:
        """``z_p sum_q w_q z_{p+q}``, blank outside the image."""
        z = z_mdp.unflatten(-1, self.shape)
        convolve = F.conv1d if len(self.shape) == 1 else F.conv2d
        kernel = net().to(z.dtype)[:, None]
        return (z * convolve(z, kernel, padding=net.shape[0] // 2, groups=z.shape[1])).flatten(2)


def _standardise(y_mdp: Tensor, taken_m1p: Tensor, eps: float) -> Tensor:
    """Mean 0 and variance 1 over the places that are taken."""
    n_m11 = taken_m1p.sum(-1, keepdim=True).clamp(min=1)
    centred_mdp = (y_mdp - (y_mdp * taken_m1p).sum(-1, keepdim=True) / n_m11) * taken_m1p
    return centred_mdp * (centred_mdp.square().sum(-1, keepdim=True) / n_m11 + eps).rsqrt()


def _refusal() -> UnsupportedError:
    return UnsupportedError(
        "hyperzzw: a token's output depends on tokens behind it, the whole image, so no state of what came before can "
        "stand for them; use forward over whole images, or a causal mixer to generate"
    )
