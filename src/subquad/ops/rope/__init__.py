"""Rotary position embedding with the context extensions of published checkpoints."""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
from torch import Tensor

from subquad.core.attention import RotarySpec
from subquad.core.constants import constant
from subquad.core.errors import ConfigError, UnsupportedError, nearest
from subquad.core.layout import Layout
from subquad.core.state import precise
from subquad.ops.backends import Backends
from subquad.ops.rope import on_torch

_backends = Backends(__name__)


def frequencies(
    spec: RotarySpec, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """Angular frequency of each rotated pair, in radians a position, and the factor on cosine and sine.

    Plain RoPE is ``theta ** (-2 i / dim)`` (arXiv 2104.09864, section 3.2.2). ``linear`` divides every frequency by
    ``factor`` (arXiv 2306.15595); ``llama3`` divides the slow ones and blends between ``low_freq_factor`` and
    ``high_freq_factor`` turns of the original context (as released with Llama 3.1); ``yarn`` blends by turns with a
    linear ramp and scales cosine and sine (arXiv 2309.00071, equations 18 to 24).

    Args:
        spec: what to compute.
        dtype: arithmetic of the frequencies; float32 reproduces the published checkpoints.
        device: where to compute them, by default the CPU.

    Returns:
        ``[dim / 2]`` frequencies and the factor.

    Raises:
        ConfigError: a scaling parameter is missing.
        UnsupportedError: a scaling that depends on the length of the current input, which no cached key survives.
    """
    if spec.dim % 2:
        raise ConfigError(f"rotary dim={spec.dim} must be even; give the number of rotated channels of a head")
    plain = 1.0 / spec.theta ** (torch.arange(0, spec.dim, 2, dtype=torch.int64, device=device).to(dtype) / spec.dim)
    kind = spec.scaling.get("rope_type", "default")

    def parameter(name: str, default: float | None = None) -> float:
        value = spec.scaling.get(name, default)
        if value is None:
            raise ConfigError(f"rope_type={kind!r} needs {name!r}, got {sorted(spec.scaling)}; add it to the scaling")
        return float(value)

    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / parameter("factor"), 1.0
    if kind == "llama3":
        original = parameter("original_max_position_embeddings")
        low, high = parameter("low_freq_factor"), parameter("high_freq_factor")
        wavelength = 2 * math.pi / plain
        slow = plain / parameter("factor")
        blend = (original / wavelength - low) / (high - low)
        mixed = (1 - blend) * slow + blend * plain
        out = torch.where(wavelength > original / low, slow, plain)
        between = (wavelength >= original / high) & (wavelength <= original / low)
        return torch.where(between, mixed, out), 1.0
    if kind == "yarn":
        factor, original = parameter("factor"), parameter("original_max_position_embeddings")

        def pair_of(turns: float) -> float:
            return spec.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

        low, high = pair_of(parameter("beta_fast", 32.0)), pair_of(parameter("beta_slow", 1.0))
        if spec.scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, spec.dim - 1)
        width = high - low if high != low else 0.001
        slow_share = ((torch.arange(spec.dim // 2, dtype=dtype, device=device) - low) / width).clamp(0, 1)

        def scale_of(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

        over, under = spec.scaling.get("mscale"), spec.scaling.get("mscale_all_dim")
        usual = scale_of(over) / scale_of(under) if over and under else scale_of(1.0)
        given = spec.scaling.get("attention_factor")
        return plain / factor * slow_share + plain * (1 - slow_share), usual if given is None else float(given)
    if kind in ("dynamic", "longrope"):
        raise UnsupportedError(
            f"rope_type={kind!r} changes its frequencies with the length of the input, so cached keys would no longer "
            "fit; use a checkpoint with linear, llama3 or yarn scaling, or set a fixed one"
        )
    raise ConfigError(f"unknown rope_type {kind!r}{nearest(kind, ('default', 'linear', 'llama3', 'yarn'))}")


def tables(spec: RotarySpec, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[b, t, 1, dim / 2]`` at a layout's positions, in at least float32; b is 1 where rows are alike.

    Computed at a layout's first call and kept with it: all layers of a model turn by the same angles.

    Args:
        spec: the embedding.
        layout: where the tokens stand.
        dtype: of what is to be rotated.
    """
    wide = precise(dtype)
    if layout.part is not None:
        whole, rows = layout.part
        cos, sin = tables(spec, whole, dtype)
        return cos[rows], sin[rows]

    def make() -> tuple[Tensor, Tensor]:
        cos, sin, factor = _turns(spec, _rows(layout), layout.run, wide)
        return (cos, sin) if factor == 1 else (cos * factor, sin * factor)

    return layout.once((*_name(spec), wide), make)


def tables_back(spec: RotarySpec, layout: Layout, window: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """With these `rotate` takes back what `tables` did to the oldest `count` of the `window` tokens before a layout.

    Those tokens stand in the document of the layout's first column, right before it. Kept with the layout as well.

    Args:
        spec, layout, dtype: as in `tables`.
        window: tokens back from the first column to the first token.
        count: tokens from there on.
    """
    wide = precise(dtype)

    def make() -> tuple[Tensor, Tensor]:
        cos, sin, factor = _turns(spec, _rows(layout)[:, :1] - window, count, wide)
        return cos / factor, -sin / factor

    return layout.once((*_name(spec), wide, window, count), make)


def _rows(layout: Layout) -> Tensor:
    """Where runs start, of rows that are one in memory only the first."""
    return layout.starts_bn if layout.starts_bn.stride(0) else layout.starts_bn[:1]


def _name(spec: RotarySpec) -> tuple[Hashable, ...]:
    return spec.theta, spec.dim, tuple(sorted(spec.scaling.items()))


def _frequencies(spec: RotarySpec, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, float]:
    """`frequencies`, computed once: in a round of decoding they are as many launches as a layer."""
    key = ("frequencies", *_name(spec), dtype, device)
    return constant(key, device, lambda: frequencies(spec, dtype=dtype, device=device))


def _turns(spec: RotarySpec, starts_bn: Tensor, run: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Cosine and sine ``[b, n * run, 1, dim / 2]`` of the angles, and the factor on both."""
    freq_f, factor = _frequencies(spec, dtype, starts_bn.device)
    plain = torch.is_grad_enabled() or dtype != torch.float32
    cos, sin = (on_torch if plain else _backends.choose(freq_f, starts_bn)).turns(starts_bn, run, freq_f)
    return cos, sin, factor


def rotate(x_bthk: Tensor, tables_: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first ``dim`` channels of every head, channel i paired with channel ``i + dim / 2``.

    Args:
        x_bthk: queries or keys; the result is rounded to their dtype once.
        tables_: what `tables` returned for their positions.
    """
    return on_torch.rotate(x_bthk, *tables_)


def rotate_both(q_bthk: Tensor, k_btgk: Tensor, tables_: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Queries and keys of one dtype, each as `rotate` gives it; where no gradient is asked for, in one launch."""
    if torch.is_grad_enabled() or q_bthk.dtype == torch.float64 or q_bthk.dtype != k_btgk.dtype:
        return on_torch.rotate_both(q_bthk, k_btgk, *tables_)
    return _backends.choose(q_bthk, k_btgk, *tables_).rotate_both(q_bthk, k_btgk, *tables_)
