"""What is particular to softmax attention: it is the teacher's equation, and its buffers are bounded."""

from __future__ import annotations

import pytest
import torch

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.mixers.attention import Attention
from subquad.ops import attention


def build(**options: object) -> Attention:
    torch.manual_seed(0)
    config = Attention.Config(d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, **options)  # pyright: ignore[reportArgumentType]
    return Attention(config).double().requires_grad_(False)


@pytest.mark.parametrize("window", [None, 5])
def test_output_is_the_equation_on_its_projections(window: int | None) -> None:
    mixer = build(
        window=window, sinks=2 if window else 0, rotary={"theta": 1000.0, "dim": 8}, qk_norm=True, o_bias=True
    )
    x = torch.randn(2, 23, 32, dtype=torch.float64)
    q, k, v = mixer.qkv(x, Layout.dense(2, 23))
    distance = torch.arange(23)[:, None] - torch.arange(23)
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & ((distance < window) | (torch.arange(23) < 2))
    want = attention.equation(q, k, v, allowed.expand(2, -1, -1), 8**-0.5)
    torch.testing.assert_close(mixer(x), mixer.o_proj(want.flatten(2)), rtol=1e-11, atol=1e-11)


def test_a_window_as_long_as_the_text_is_full_attention() -> None:
    full = build(rotary={"theta": 1000.0, "dim": 8})
    cut = Attention.from_attention(full.weights(), window=50, sinks=4)
    x = torch.randn(1, 50, 32, dtype=torch.float64)
    torch.testing.assert_close(cut(x), full(x), rtol=1e-11, atol=1e-11)
    longer = torch.randn(1, 60, 32, dtype=torch.float64)
    assert (cut(longer)[:, 55:] - full(longer)[:, 55:]).norm() > 1e-3


def test_commit_beyond_capacity_is_refused_and_loses_nothing() -> None:
    mixer = build()
    state = mixer.init_state(1, capacity=4)
    state = mixer.read(torch.randn(1, 3, 32, dtype=torch.float64), state)[1].commit()
    _, update = mixer.read(torch.randn(1, 2, 32, dtype=torch.float64), state)
    with pytest.raises(ConfigError, match="capacity=4 tokens, got 5"):
        update.commit()
    assert update.commit(torch.tensor([1])).seen_b.tolist() == [4]  # pyright: ignore[reportAttributeAccessIssue]


def test_capacity_counts_the_document_that_goes_on() -> None:
    mixer = build()
    state = mixer.read(torch.randn(1, 3, 32, dtype=torch.float64), mixer.init_state(1, 4))[1].commit()
    _, update = mixer.read(torch.randn(1, 7, 32, dtype=torch.float64), state, Layout.packed([[2, 5]]))
    with pytest.raises(ConfigError, match="capacity=4 tokens, got 5"):
        update.commit(torch.tensor([2]))
    assert update.commit(torch.tensor([6])).seen_b.tolist() == [4]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match="capacity=4 tokens, got 5"):
        update.commit()


def test_in_place_commit_of_a_full_cache_keeps_it() -> None:
    """n = 0 at the last slot, and drafts that reach beyond the buffer, overwrite no key."""
    mixer = build()
    state = mixer.read(torch.randn(2, 6, 32, dtype=torch.float64), mixer.init_state(2, 6))[1].commit()
    before = state.snapshot()
    _, update = mixer.read(torch.randn(2, 3, 32, dtype=torch.float64), state)
    update.commit_(state, None, torch.tensor([0, 0]))
    for (_, a), (_, b) in zip(state.tensors(), before.tensors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"window": 0}, "at least 1"), ({"sinks": 4}, "needs a window"), ({"n_kv_heads": 3}, "multiple of n_kv_heads=3")],
)
def test_configurations_that_mean_nothing_are_refused(options: dict[str, int], says: str) -> None:
    values = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8} | options
    with pytest.raises(ConfigError, match=says):
        Attention(Attention.Config(**values))


def test_layout_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected shape \(1, 3\)"):
        build()(torch.randn(1, 3, 32, dtype=torch.float64), Layout.dense(1, 4))
