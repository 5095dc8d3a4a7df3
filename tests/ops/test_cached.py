"""Attention over a cache, and its writes: every backend against the equation, with nothing read behind a row's end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from subquad.core.attention import RotarySpec
from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.ops import backends, cached, launch, rope

triton_runs = torch.cuda.is_available() or backends.interpreted()
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not triton_runs, reason="needs Triton"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    # b, t, h, g, k, v, n
    "one token": (2, 1, 4, 2, 16, 16, 70),
    "a block": (3, 3, 6, 2, 20, 12, 300),
    "many heads of one": (1, 5, 8, 1, 64, 64, 1100),
    "no group": (2, 2, 3, 3, 8, 8, 40),
}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    launch.poison = True
    yield
    launch.poison = False


def draw(shape: tuple[int, ...], dtype: torch.dtype, beyond: float) -> tuple[Tensor, ...]:
    """Queries, a block and a cache whose slots behind a row's tokens hold `beyond`."""
    b, t, h, g, k, v, n = shape
    q, k_, v_ = (torch.randn(*s, dtype=dtype, device=DEVICE) for s in ((b, t, h, k), (b, g, t, k), (b, g, t, v)))
    cache_k, cache_v = (torch.randn(b, g, n, c, dtype=dtype, device=DEVICE) for c in (k, v))
    seen_b = torch.randint(0, n + 1, (b,), device=DEVICE)
    seen_b[0] = 0 if b > 1 else n - 3
    for i, seen in enumerate(seen_b.tolist()):
        cache_k[i, :, seen:], cache_v[i, :, seen:] = beyond, beyond
    return q, k_, v_, cache_k, cache_v, seen_b


@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_is_the_equation_and_reads_nothing_behind_a_rows_end(
    name: str, dtype: torch.dtype, shares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not triton_runs:
        pytest.skip("needs Triton")
    from subquad.ops.cached import on_triton

    monkeypatch.setattr(on_triton, "shares", lambda *_: shares)
    *tensors, seen_b = draw(SHAPES[name], dtype, float("nan"))
    with torch.no_grad(), backends.use("triton"):
        y, _ = cached.attend(*tensors, seen_b, 0.3)
    want = cached.equation(*(x.double() for x in tensors), seen_b, 0.3)
    # In bfloat16 the weights are rounded before they meet the values.
    bound = {torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]
    assert float((y.double() - want).norm() / want.norm()) < bound


@pytest.mark.parametrize("name", SHAPES)
def test_pytorch_is_the_equation(name: str) -> None:
    *tensors, seen_b = draw(SHAPES[name], torch.float64, 0.0)
    with backends.use("torch"):
        y, _ = cached.attend(*tensors, seen_b, 0.3)
    torch.testing.assert_close(y, cached.equation(*tensors, seen_b, 0.3))


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "dim"), [(32, 32), (64, 64), (24, 24), (32, 16)])
def test_tables_turn_queries_and_the_blocks_keys(k: int, dim: int, dtype: torch.dtype, backend: str) -> None:
    q, k_, v_, cache_k, cache_v, seen_b = draw((3, 2, 4, 2, k, 16, 70), dtype, 0.0)
    for start_b in (seen_b, 5):
        layout = Layout.dense(3, 2, start_b=start_b, device=DEVICE)
        tables = rope.tables(RotarySpec(theta=1e4, dim=dim), layout, dtype)
        with torch.no_grad(), backends.use(backend):
            y, turned = cached.attend(q, k_, v_, cache_k, cache_v, seen_b, 0.3, tables)
        wide = [x.double() for x in (q, k_, v_, cache_k, cache_v)]
        exact = rope.tables(RotarySpec(theta=1e4, dim=dim), layout, torch.float64)
        wide[0], keys = rope.rotate_both(wide[0], wide[1].transpose(1, 2), exact)
        wide[1] = keys.transpose(1, 2)
        want = cached.equation(*wide, seen_b, 0.3)
        bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        assert float((y.double() - want).norm() / want.norm()) < bound
        assert float((turned.double() - wide[1]).norm() / wide[1].norm()) < bound


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize(("rows", "first"), list(itertools.product([False, True], repeat=2)))
def test_a_write_changes_the_kept_tokens_slots_and_nothing_else(rows: bool, first: bool, backend: str) -> None:
    b, g, t, k, v, n, spare = 3, 2, 4, 6, 5, 20, 2
    block = torch.randn(b, g, t, k, device=DEVICE), torch.randn(b, g, t, v, device=DEVICE)
    cache = [torch.randn(b + spare, g, n, c, device=DEVICE) for c in (k, v)]
    seen_b = torch.randint(0, n - t, (b + spare,), device=DEVICE)
    n_b = torch.tensor([0, 2, 4], device=DEVICE)
    at = torch.tensor([4, 0, 2], device=DEVICE) if rows else None
    first_b = torch.tensor([0, 1, 4], device=DEVICE) if first else None
    start_b = torch.tensor([3, 0, 7], device=DEVICE) if first else None
    want, want_seen = [x.clone() for x in cache], seen_b.clone()
    for i in range(b):
        row, skip = int(at[i]) if at is not None else i, int(first_b[i]) if first_b is not None else 0
        begin, count = int(start_b[i]) if start_b is not None else int(seen_b[row]), int(n_b[i]) - skip
        for buffer, new in zip(want, block, strict=True):
            buffer[row, :, begin : begin + count] = new[i, :, skip : skip + count]
        want_seen[row] = begin + count
    with torch.no_grad(), backends.use(backend):
        cached.append_(*cache, seen_b, *block, n_b, at, first_b, start_b)
    assert all(torch.equal(got, expected) for got, expected in zip(cache, want, strict=True))
    assert torch.equal(seen_b, want_seen)


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shares", [1, 3])
def test_what_attends_and_writes_is_what_attends_and_a_write(
    shares: int, turned: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        from subquad.ops.cached import on_triton

        monkeypatch.setattr(on_triton, "shares", lambda *_: shares)
    q, k, v, *cache, seen_b = draw((3, 4, 4, 2, 16, 8, 30), torch.float32, 0.0)
    # The last row has room for two tokens of four.
    seen_b[2] = 28
    tables = rope.tables(RotarySpec(theta=1e4, dim=16), Layout.dense(3, 4, start_b=seen_b, device=DEVICE), q.dtype)
    where = tables if turned else None
    wanted, counted_b = [x.clone() for x in cache], seen_b.clone()
    with torch.no_grad(), backends.use(backend):
        want, keys = cached.attend(q, k, v, *cache, seen_b, 0.3, where)
        got = cached.attend_(q, k, v, *cache, seen_b, 0.3, where)
        cached.append_(*wanted, counted_b, keys, v, (30 - seen_b).clamp(max=4))
    assert torch.equal(got, want)
    assert all(torch.equal(mine, other) for mine, other in zip(cache, wanted, strict=True))
    assert seen_b[2] == 28


def test_heads_that_do_not_fit_are_refused() -> None:
    q, k, v, cache_k, cache_v, seen_b = draw(SHAPES["one token"], torch.float32, 0.0)
    with pytest.raises(ConfigError, match="same heads"):
        cached.attend(q, k[:, :1], v[:, :1], cache_k, cache_v, seen_b, 1.0)
    with pytest.raises(ConfigError, match="divides"):
        cached.attend(q[:, :, :3], k, v, cache_k, cache_v, seen_b, 1.0)
