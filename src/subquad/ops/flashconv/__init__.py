"""Long convolution with an explicit filter, gates and bias, causal or both ways: H3, Hyena and S4 mix time with it."""

from __future__ import annotations

from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.ops.backends import Backends
from subquad.ops.flashconv import on_torch
from subquad.ops.flashconv.equation import equation

__all__ = ["equation", "parallel", "past"]

_backends = Backends(__name__)


def parallel(
    u_btd: Tensor,
    k_gl: Tensor,
    bias_d: Tensor | None = None,
    *,
    behind_gl: Tensor | None = None,
    gate_in_btd: Tensor | None = None,
    gate_out_btd: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """The outputs of `equation`, all tokens at once; sums in at least float32.

    With filters `behind_gl`, each token's output takes in those behind it, too: ``sum_{j >= t} behind_{j-t} u'_j``
    is added before the gate. By the Fourier way both directions share all but the filters' own transforms.

    PyTorch's form computes in float32 throughout; Triton's rounds what it multiplies to the dtype of inputs and gates.

    Right padding needs no mask, but its values must be finite: a transform spreads NaN over its whole row.

    Raises:
        ConfigError: an empty filter, channels that the groups don't divide, or a gate, bias or documents of another
            shape than the inputs'.
    """
    _check("k_gl", u_btd.shape[2], k_gl)
    if behind_gl is not None:
        _check("behind_gl", u_btd.shape[2], behind_gl)
        if len(behind_gl) != len(k_gl):
            raise ConfigError(f"behind_gl: expected {len(k_gl)} filters as in k_gl, got {len(behind_gl)}; give as many")
    b, t, d = u_btd.shape
    for name, x, shape in (
        ("bias_d", bias_d, (d,)),
        ("gate_in_btd", gate_in_btd, (b, t, d)),
        ("gate_out_btd", gate_out_btd, (b, t, d)),
        ("documents_bt", documents_bt, (b, t)),
    ):
        if x is not None and x.shape != shape:
            raise ConfigError(f"{name}: expected shape {shape} as of the inputs, got {tuple(x.shape)}; reshape it")
    if u_btd.numel() == 0:
        return u_btd.clone()
    gates = [x for x in (gate_in_btd, gate_out_btd) if x is not None]
    return _backends.choose(u_btd, k_gl, *gates).parallel(
        u_btd, k_gl, bias_d, behind_gl=behind_gl, gate_in_btd=gate_in_btd, gate_out_btd=gate_out_btd,
        documents_bt=documents_bt,
    )  # fmt: skip


def past(history_bsd: Tensor, seen_b: Tensor, k_gl: Tensor, length: int) -> Tensor:
    """What the tokens before a block give to it: ``sum_{j < seen} k_{seen + i - j} history_j`` at its i-th token.

    A block's convolution is `parallel` of its own inputs plus this, before the gate behind it: so a convolution goes on
    from block to block, and from token to token at the cost of its whole history.

    Args:
        history_bsd: gated inputs of earlier tokens, the oldest first.
        seen_b: int64 ``[b]``, how many of them each row holds; what stands behind them is finite and not read.
        k_gl: filters as in `equation`.
        length: tokens of the block.

    Returns:
        ``[b, length, d]`` in the dtype of the history.

    Raises:
        ConfigError: an empty filter, or channels that the groups don't divide.
    """
    _check("k_gl", history_bsd.shape[2], k_gl)
    if history_bsd.numel() == 0 or length == 0:
        return history_bsd.new_zeros(len(history_bsd), length, history_bsd.shape[2])
    return on_torch.past(history_bsd, seen_b, k_gl, length)


def _check(name: str, d: int, k_gl: Tensor) -> None:
    if k_gl.dim() != 2 or 0 in k_gl.shape:
        raise ConfigError(
            f"{name}: expected filters [groups, taps], got shape {tuple(k_gl.shape)}; give at least one tap"
        )
    if d % len(k_gl):
        raise ConfigError(f"{name}: expected a number of filters that divides {d} channels, got {len(k_gl)}")
