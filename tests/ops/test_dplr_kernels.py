"""The Cauchy sums' Triton kernels, on a GPU or interpreted: kernel and gradients against PyTorch's complex sums."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.ops import backends, dplr, hippo, launch
from subquad.ops.dplr import on_torch

if importlib.util.find_spec("triton") is None or not (torch.cuda.is_available() or backends.interpreted()):
    pytest.skip("needs Triton, on a GPU or interpreted", allow_module_level=True)

from subquad.ops.dplr import on_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def results(module: Any, system: dplr.System, length: int) -> list[Tensor]:
    """The impulse response and gradients of all that makes it."""
    leaves = [x.detach().clone().requires_grad_() for x in system]
    kernel_gl = module.kernel(dplr.System(*leaves), length)
    weight_gl = torch.linspace(-1, 2, kernel_gl.numel(), dtype=torch.float64, device=DEVICE).view_as(kernel_gl)
    return [kernel_gl.detach(), *torch.autograd.grad((kernel_gl * weight_gl).sum(), leaves)]


# One block of frequencies, with and without one at the end of the circle, and two.
@pytest.mark.parametrize("length", [1, 6, 7, 260])
def test_sums_and_gradients_equal_pytorchs(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "poison", True)
    poles_n, low_n, input_n = (x.expand(2, -1) for x in hippo.normal_plus_low_rank(6))
    output_gn = torch.randn(2, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    system = dplr.System(poles_n, low_n, input_n, output_gn, torch.tensor([1e-3, 0.2], dtype=torch.float64))
    system = dplr.System(*(x.to(DEVICE) for x in system))
    for got, want in zip(results(on_triton, system, length), results(on_torch, system, length), strict=True):
        assert (got - want).norm() <= 1e-11 * want.norm()
