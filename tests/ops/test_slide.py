"""A block slides through a window in one launch: what that writes is what the plain commit writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from subquad.core.layout import Layout
from subquad.core.mixer import Mixer
from subquad.core.state import State
from subquad.mixers.attention import Attention
from subquad.mixers.windowed_linear import WindowedLinear
from subquad.ops import backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() or backends.interpreted()), reason="needs Triton")
HEADS: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "window": 7, "sinks": 3}
T, ROWS = 12, 5


def mixer(name: str) -> Mixer:
    torch.manual_seed(0)
    if name == "window":
        return Attention(Attention.Config(**HEADS)).to(DEVICE).requires_grad_(False)
    return WindowedLinear(WindowedLinear.Config(**HEADS, features=6)).to(DEVICE).requires_grad_(False)


def committed(one: Mixer, pool: State, before: State, n_b: torch.Tensor, backend: str) -> State:
    """A settled copy of `pool` after a block of T columns behind `before` went into its rows 3, 0 and 4."""
    x_btd = torch.randn(3, T, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    layout = Layout.ragged(n_b, T, start_b=torch.tensor([0, 2, 30], device=DEVICE))
    _, update = one.read(x_btd, before, layout)
    pool = pool.snapshot()
    with backends.use(backend):
        update.commit_(pool, torch.tensor([3, 0, 4], device=DEVICE), n_b)
    return pool.settled()


@pytest.mark.parametrize("ring", [False, True], ids=["right aligned", "ring"])
@pytest.mark.parametrize("name", ["window", "linear"])
def test_one_launch_writes_what_the_plain_commit_does(name: str, ring: bool) -> None:
    """Rows that have seen nothing, less than the sinks and more than the window; blocks kept in part, whole, not."""
    one = mixer(name)
    state = one.init_state(3, device=DEVICE, dtype=torch.float32)
    for n in ([0, 2, 9], [0, 0, 12], [0, 0, 9]):
        n_b = torch.tensor(n, device=DEVICE)
        x_btd = torch.randn(3, T, 32, device=DEVICE)
        state = one.read(x_btd, state, Layout.ragged(n_b, T))[1].commit(n_b)
    with backends.use("triton" if ring else "torch"):
        pool = one.init_pool(ROWS, 64, 2)
    assert ("Ring" in type(pool).__name__) == ring
    for _, x in pool.tensors():
        x.copy_(torch.randint(0, 3, x.shape, device=DEVICE))
    for kept in ([12, 12, 12], [1, 3, 0], [0, 5, 8], [10, 0, 1]):
        n_b = torch.tensor(kept, device=DEVICE)
        want, got = (committed(one, pool, state, n_b, backend) for backend in ("torch", "triton"))
        for (path, x), (_, y) in zip(want.tensors(), got.tensors(), strict=True):
            # What a row has not seen is arbitrary in its sinks.
            seen_b = torch.as_tensor([0, 2, 30], device=DEVICE) + n_b
            rows = [3, 0, 4] if "sink" in path else list(range(ROWS))
            for i, row in enumerate(rows):
                few = slice(None) if "sink" not in path else slice(0, int(seen_b[i]))
                a, b = (z[row] if z.dim() < 3 or "sink" not in path else z[row][:, few] for z in (x, y))
                # At most 12 float32 products of order one are summed, in another order: 12 * 2^-24 = 7e-7.
                assert torch.allclose(b, a, rtol=1e-6, atol=1e-6), (path, kept, row)
