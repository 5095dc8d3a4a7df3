"""The long convolution in Triton: by Toeplitz products over short reaches, by Fourier transforms over long ones."""

from __future__ import annotations

import triton
from torch import Tensor

from subquad.ops import launch
from subquad.ops.flashconv import fourier, toeplitz
from subquad.ops.flashconv.both import both_ways

# Toeplitz products cost what the taps cost that a token meets, half its row with a filter as long; transforms hardly
# more in long rows than in short, nor for filters in both directions. Up to so many taps a token in the mean the
# products win.
MET = 384

# As far as it was tried. The more tiles, the slower: beyond are PyTorch's transforms.
LONGEST = 262_144


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run these, or are not the better way, or None; inputs, filters and gates."""
    b, t, _ = tensors[0].shape
    if t > LONGEST:
        return f"beyond {LONGEST} tokens PyTorch's Fourier transforms are faster, got {t}"
    if triton.cdiv(t, toeplitz.TILE) * b > launch.GRID * toeplitz.MASKED.width:
        return f"the Triton kernels take up to {launch.GRID * toeplitz.MASKED.width} tiles of {toeplitz.TILE} tokens"
    return launch.refusal(*tensors, widths=())


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
    """`subquad.ops.flashconv.parallel`; documents, which a transform would mix, are always Toeplitz products."""
    gates = [x for x in (gate_in_btd, gate_out_btd) if x is not None]
    operands = iter(launch.operands(u_btd, *gates))
    u = next(operands)
    gate_in = None if gate_in_btd is None else next(operands)
    gate_out = None if gate_out_btd is None else next(operands)
    t = u.shape[1]
    k_gl, behind_gl = k_gl[:, :t], None if behind_gl is None else behind_gl[:, :t]
    bias_d = None if bias_d is None else bias_d.contiguous()
    directions = 1 if behind_gl is None else 2
    if documents_bt is None and directions * met(t, k_gl.shape[1]) > MET:
        return fourier.convolve(u, k_gl, behind_gl, bias_d, gate_in, gate_out).to(u_btd.dtype)

    def forwards(u: Tensor, k_gl: Tensor, bias_d: Tensor | None = None, **others: Tensor | None) -> Tensor:
        documents = launch.documents(others["documents_bt"], None)
        return toeplitz.convolve(u, k_gl, bias_d, others["gate_in_btd"], others["gate_out_btd"], documents)

    others = {"gate_in_btd": gate_in, "gate_out_btd": gate_out, "documents_bt": documents_bt}
    return both_ways(forwards, u, k_gl, bias_d, behind_gl, **others).to(u_btd.dtype)


def met(t: int, taps: int) -> float:
    """The taps of a filter that a token of a row of `t` meets, in the mean."""
    return taps - taps**2 / (2 * t)
