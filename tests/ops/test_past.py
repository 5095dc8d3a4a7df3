"""One token's sum over a history: the kernel as the sum of PyTorch."""

from __future__ import annotations

import pytest
import torch

from subquad.ops import backends, flashconv, past

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(not (torch.cuda.is_available() or backends.interpreted()), reason="needs Triton")
@pytest.mark.parametrize(("s", "g"), [(1, 35), (40, 70), (300, 35)])
@torch.no_grad()
def test_the_kernel_is_the_sum_over_what_was_seen(s: int, g: int) -> None:
    # A row that has seen nothing, one that has seen all, and what stands behind a row's tokens is not read.
    seen_b = torch.tensor([0, s, s // 2], device=DEVICE)
    buffer = torch.randn(3, 2, s, 70, device=DEVICE)
    k_gl = torch.randn(g, s + 1, device=DEVICE)
    want_b1d = flashconv.past(buffer[:, 1], seen_b, k_gl, 1)
    spoilt = torch.where(torch.arange(s, device=DEVICE)[:, None] < seen_b[:, None, None, None], buffer, torch.nan)
    with backends.use("triton"):
        got_bd = past.read(spoilt[:, 1], seen_b, k_gl.mT)
    assert got_bd is not None
    torch.testing.assert_close(got_bd, want_b1d[:, 0], rtol=1e-4, atol=1e-4)
    with backends.use("torch"):
        assert past.read(buffer[:, 1], seen_b, k_gl.mT) is None
