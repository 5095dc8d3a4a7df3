"""The benches of recurrences refuse wrong kernels, and their limits are the bytes that the tensors have."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from subquad.bench import decoding, scans
from subquad.bench.harness import Bench, GateError
from subquad.bench.scans import Scan, count
from subquad.ops import decode, launch

OPS = ("ssd", "gdn", "gla")


def scan_of(op: str) -> Scan:
    return importlib.import_module(f"subquad.bench.ops.{op}").SCAN


def bench_of(op: str, dtype: torch.dtype = torch.float32) -> Bench:
    return Bench(f"ops.{op}", dtype=dtype, smoke=True)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_least_bytes_are_those_of_arguments_and_results(op: str, dtype: torch.dtype) -> None:
    scan, bench = scan_of(op), bench_of(op, dtype)
    b, t, h, k, v = 2, 5, 3, 16, 24
    sizes = {"b": b, "t": t, "h": h, "k": k, "v": v, "e": dtype.itemsize}
    arguments = scan.draw(bench, b, t, h, k, v)
    results = scan.on("torch")(*arguments)
    read, written = (sum(x.nbytes for x in tensors) for tensors in (arguments, results))
    assert len(arguments) == len(scan.names)
    assert count(scan.moved, sizes) == read + written
    dy, gradients = results[0].nbytes, sum(x.nbytes for x in arguments[:-1])
    assert count(scan.train_moved, sizes) == read + written + read + dy + gradients


@pytest.mark.parametrize("op", OPS)
def test_least_arithmetic_is_the_products_with_the_state(op: str) -> None:
    # Each token reads the state for y and adds to it; the delta rule also reads what stands under the key.
    products = 3 if op == "gdn" else 2
    sizes = {"b": 2, "t": 5, "h": 3, "k": 16, "v": 24}
    assert count(scan_of(op).flops, sizes) == products * 2 * 2 * 5 * 3 * 16 * 24
    assert count(scan_of(op).train_flops, sizes) == 3 * count(scan_of(op).flops, sizes)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("wrong", ["y", "state", "gradient"])
def test_a_wrong_result_is_refused(op: str, wrong: str) -> None:
    scan, bench = scan_of(op), bench_of(op)

    def ours(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert launch.poison
        g = arguments[3] if wrong != "gradient" else arguments[3] * 0.99 + arguments[3].detach() * 0.01
        y, state = scan.op.scan(*arguments[:3], g, *arguments[4:])
        return y * (1.01 if wrong == "y" else 1), state * (1.01 if wrong == "state" else 1)

    name = {"y": "y at t=", "state": "final state", "gradient": "dg"}[wrong]
    with pytest.raises(GateError, match=f"gate '{name}.* is red"):
        scans._prove(bench, scan, ours, scan.draw(bench, 1, 30, 5, 16, 16))
    assert not launch.poison


def test_a_refused_op_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of("ssd")
    broken = SimpleNamespace(**vars(scan_of("ssd").op))
    broken.equation = lambda *arguments, **_: tuple(2 * x for x in scan_of("ssd").op.equation(*arguments))
    with pytest.raises(GateError):
        scans.run_scan(bench, replace(scan_of("ssd"), op=broken))
    assert [row.id for row in bench.rows if row.unit == "ms"] == []


def test_heads_taken_in_groups_give_the_whole() -> None:
    scan, bench = scan_of("gdn"), bench_of("gdn", torch.float64)
    arguments = scan.draw(bench, 2, 9, 6, 8, 16)
    dy, dstate = torch.randn_like(arguments[2]), torch.randn_like(arguments[-1])
    whole = scans._results(scan, scan.on("torch"), tuple(x.double() for x in arguments), dy, dstate.double())
    parts = scans._exact(scan, scan.on("torch"), arguments, dy, dstate)
    assert parts.keys() == whole.keys()
    for name, x in whole.items():
        # Float64 sums in another order, of 8 channels times 16 through 9 steps: at most 1,152 roundings of 1.1e-16.
        torch.testing.assert_close(parts[name], x, rtol=1e-12, atol=1e-12)


def test_without_the_library_there_is_no_baseline_and_the_row_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    scan, bench = scan_of("ssd"), bench_of("ssd")
    monkeypatch.setattr(scans.importlib.util, "find_spec", lambda name: None)
    assert scans._library(bench, scan, ()) == ({}, "flash-linear-attention is not wired up for this operation")
    monkeypatch.setattr(Scan, "has", lambda self, backend: True)
    found, why = scans._library(bench, scan, ())
    bench.gate("one is one", torch.ones(1), torch.ones(1), rtol=0.0)
    arguments = scan.draw(bench, 1, 8, 1, 8, 8)
    shape = {"b": 1, "t": 8, "h": 1, "k": 8, "v": 8, "e": 4}
    contenders = {"ours": scan.on("torch")} | scans._softmaxes(bench, arguments)
    scans._forward(bench, scan, contenders | found, arguments, shape, why)
    alone, beside = bench.rows
    assert alone.baseline == "" and "not installed" in alone.shape["no_baseline"] and "moved" in alone.shape
    assert beside.baseline == "causal SDPA" and beside.value == alone.value


def test_a_library_that_computes_something_else_is_no_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    scan, bench = scan_of("ssd"), bench_of("ssd")
    arguments = scan.draw(bench, 1, 8, 1, 8, 8)
    monkeypatch.setattr(scans.importlib.util, "find_spec", lambda name: name)
    right = scan.op.scan
    monkeypatch.setattr(Scan, "on", lambda self, backend: right)
    assert list(scans._library(bench, scan, arguments)[0]) == [scans.FLA]
    monkeypatch.setattr(Scan, "on", lambda self, backend: lambda *given: (right(*given)[0] * 1.06, given[-1]))
    assert scans._library(bench, scan, arguments) == ({}, "flash-linear-attention's outputs differ by 6.0%")


@pytest.mark.parametrize("op", OPS)
def test_a_step_that_computes_something_else_is_refused(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = importlib.import_module(f"subquad.bench.ops.{op}").STEP
    right, bench = decode.advance_, bench_of(op)
    sizes = decoding._Sizes(2, 16, 16)

    def forgets_to_commit(block, *, pool, rule, weights, seen_b, n_b, rows_b):  # type: ignore[no-untyped-def]
        return right(block, pool, rule, weights, seen_b, torch.zeros_like(n_b), rows_b)

    decoding._prove(bench, step, sizes, 3, "torch")
    monkeypatch.setattr(decode, "advance_", forgets_to_commit)
    with pytest.raises(GateError, match="block 2"):
        decoding._prove(bench, step, sizes, 3, "torch")


def test_a_pool_is_larger_than_the_cache_and_every_row_is_used_once() -> None:
    bench = Bench("ops.ssd")
    step, sizes = importlib.import_module("subquad.bench.ops.ssd").STEP, decoding._Sizes(2, 16, 16)
    bench.smoke, cache = False, decoding.cache_bytes
    decoding.cache_bytes = lambda device: 2**18
    try:
        pool, batches = decoding._pools(bench, step, sizes, 3, 5)
    finally:
        decoding.cache_bytes = cache
    assert pool.recurrent_bhkv.nbytes >= 4 * 2**18
    rows = torch.cat([rows_b for rows_b, _, _ in batches])
    assert rows.tolist() == list(range(pool.recurrent_bhkv.shape[0]))
    assert all((n_b >= 1).all() and (n_b <= 5).all() for _, _, n_b in batches)
    shape = decoding._shape(sizes, 3, 5)
    assert count(decoding.MOVED, shape) == 2 * pool.recurrent_bhkv[:3].nbytes
