"""SSD and the gated delta rule: every form against the loop over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import gdn, ssd

OPS = {"ssd": ssd, "gdn": gdn}


def arguments(
    op: str, t: int, *, decay: float = 1.0, dtype: torch.dtype = torch.float64, k: int = 5, v: int = 3
) -> dict[str, Tensor]:
    """Two rows, two heads, unequal key and value channels, unit keys; log decays uniform in [-decay, 0]."""
    rng = torch.Generator().manual_seed(0)
    b, h = 2, 2
    made = {
        "q_bthk": torch.randn(b, t, h, k, generator=rng, dtype=torch.float64),
        "k_bthk": F.normalize(torch.randn(b, t, h, k, generator=rng, dtype=torch.float64), dim=-1),
        "v_bthv": torch.randn(b, t, h, v, generator=rng, dtype=torch.float64),
        "g_bth": -decay * torch.rand(b, t, h, generator=rng, dtype=torch.float64),
        "beta_bth": torch.rand(b, t, h, generator=rng, dtype=torch.float64),
        "state_bhkv": torch.randn(b, h, k, v, generator=rng, dtype=torch.float64),
    }
    if op == "ssd":
        del made["beta_bth"]
    return {name: x.to(dtype) for name, x in made.items()}


def without_q(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in values.items() if name != "q_bthk"}


def columns(values: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: x if name == "state_bhkv" else x[:, start:stop] for name, x in values.items()}


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("decay", [0.0, 1.0, 100.0, 1e5])
@pytest.mark.parametrize("t", [1, 2, 63, 64, 65, 130, 1000])
def test_scan_equals_equation(op: str, t: int, decay: float) -> None:
    values = arguments(op, t, decay=decay)
    y, state = OPS[op].equation(**values)
    got, end = OPS[op].scan(**values)
    torch.testing.assert_close(got, y, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(end, state, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(OPS[op].final_state(**without_q(values)), state, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", ["equation", "scan"])
def test_documents_and_padding_equal_separate_sequences(op: str, form: str) -> None:
    module, t = OPS[op], 200
    values = arguments(op, t)
    lengths = [[70, 1, 58, 40], [3, 64, 90]]
    documents_bt = torch.zeros(2, t, dtype=torch.int64)
    valid_bt = torch.zeros(2, t, dtype=torch.bool)
    for row, parts in enumerate(lengths):
        valid_bt[row, : sum(parts)] = True
        documents_bt[row, : sum(parts)] = torch.arange(len(parts)).repeat_interleave(torch.tensor(parts))
        # Columns without a token carry anything, documents of their own included.
        documents_bt[row, sum(parts) :] = len(parts) + 5
    spoiled = {
        n: x if n == "state_bhkv" else x.masked_fill(~valid_bt.view(2, t, *[1] * (x.dim() - 2)), torch.nan)
        for n, x in values.items()
    }
    where = {"valid_bt": valid_bt, "documents_bt": documents_bt}
    got = getattr(module, form)(**spoiled, **where)
    y, end = got
    torch.testing.assert_close(module.final_state(**without_q(spoiled), **where), end, rtol=1e-9, atol=1e-11)
    for row, parts in enumerate(lengths):
        start = 0
        for document, n in enumerate(parts):
            alone = {name: x[row : row + 1] for name, x in columns(values, start, start + n).items()}
            if document > 0:
                alone["state_bhkv"] = torch.zeros_like(alone["state_bhkv"])
            want, state = module.equation(**alone)
            torch.testing.assert_close(y[row : row + 1, start : start + n], want, rtol=1e-9, atol=1e-11)
            start += n
        torch.testing.assert_close(end[row : row + 1], state, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("op", OPS)
def test_more_chunks_than_a_chunk_has_tokens(op: str) -> None:
    module, t = OPS[op], 64 * 64 + 100
    values = arguments(op, t, decay=1e-3)
    documents_bt = (torch.arange(t) >= torch.tensor([[900], [64 * 64]])).long()
    for documents in (None, documents_bt):
        y, _ = module.equation(**values, documents_bt=documents)
        torch.testing.assert_close(module.scan(**values, documents_bt=documents)[0], y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("op", OPS)
def test_final_state_keeps_any_prefix(op: str) -> None:
    module, t = OPS[op], 70
    values = arguments(op, t)
    documents_bt = torch.tensor([0] * 20 + [1] * 30 + [2] * 20).expand(2, -1)
    for n in (0, 1, 19, 20, 21, 64, 70):
        for documents in (None, documents_bt):
            valid_bt = torch.arange(t) < torch.tensor([n, t - n])[:, None]
            got = module.final_state(**without_q(values), valid_bt=valid_bt, documents_bt=documents)
            for row, kept in enumerate((n, t - n)):
                cut = {name: x[row : row + 1] for name, x in columns(values, 0, kept).items()}
                state = cut["state_bhkv"]
                if kept:
                    inside = None if documents is None else documents[row : row + 1, :kept]
                    state = module.equation(**cut, documents_bt=inside)[1]
                torch.testing.assert_close(got[row : row + 1], state, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("op", OPS)
def test_splits_equal_one_shot(op: str) -> None:
    module, t = OPS[op], 150
    values = arguments(op, t)
    whole, end = module.scan(**values)
    state, start, pieces = values["state_bhkv"], 0, []
    for n in (1, 63, 2, 65, 0, 19):
        piece = columns(values, start, start + n) | {"state_bhkv": state}
        if n:
            pieces.append(module.scan(**piece)[0])
        state, start = module.final_state(**without_q(piece)), start + n
    assert start == t
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(state, end, rtol=1e-9, atol=1e-11)


def gradients(function: Callable[..., Any], values: dict[str, Tensor], weight: Tensor, **options: Any) -> list[Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in values.items()}
    y, end = function(**leaves, **options)
    # Both results count, the state's channels each with a weight of its own.
    factor = torch.linspace(-1, 1, end[0].numel(), dtype=end.dtype, device=end.device).view(end.shape[1:])
    return list(torch.autograd.grad((y * weight).sum() + (end * factor).sum(), list(leaves.values())))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("decay", [0.0, 1.0, 300.0])
@pytest.mark.parametrize("t", [1, 65, 130])
def test_gradients_equal_those_of_the_equation(op: str, t: int, decay: float) -> None:
    values = arguments(op, t, decay=decay)
    weight = torch.randn(2, t, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    documents_bt = (torch.arange(t) >= 40).long().expand(2, -1)
    for options in ({}, {"documents_bt": documents_bt, "valid_bt": torch.arange(t) < torch.tensor([[t], [t - 1]])}):
        got = gradients(OPS[op].scan, values, weight, **options)
        want = gradients(OPS[op].equation, values, weight, **options)
        for name, a, b in zip(values, got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op: str) -> None:
    values = arguments(op, 5)

    def check(function: Callable[..., Any], inputs: dict[str, Tensor]) -> bool:
        leaves = tuple(x.requires_grad_() for x in inputs.values())
        return torch.autograd.gradcheck(lambda *xs: function(**dict(zip(inputs, xs, strict=True))), leaves)

    assert check(OPS[op].scan, values)
    assert check(OPS[op].final_state, without_q(values))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("g", [0.0, -80.0, -1e4, -1e30, -torch.inf])
def test_any_decay_stays_finite(op: str, g: float) -> None:
    values = arguments(op, 130, dtype=torch.float32)
    values["g_bth"][:, ::3] = g
    want = OPS[op].equation(**{name: x.double() for name, x in values.items()})[0]
    torch.testing.assert_close(OPS[op].scan(**values)[0].double(), want, rtol=1e-4, atol=1e-5)
    for name, gradient in zip(values, gradients(OPS[op].scan, values, torch.ones(2, 130, 2, 3)), strict=True):
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("decay", ["none", "slow", "mixed"])
def test_float32_is_as_exact_as_the_loop(op: str, decay: str) -> None:
    """At most twice the error of the naive float32 loop, also where one token forgets all and its neighbours little."""
    values = arguments(op, 700, decay={"none": 0.0, "slow": 0.01, "mixed": 0.01}[decay], dtype=torch.float32, k=64, v=8)
    if decay == "mixed":
        values["g_bth"][:, ::40] = -900.0
    exact = OPS[op].equation(**{name: x.double() for name, x in values.items()})
    naive = OPS[op].equation(**values)
    assert error(OPS[op].scan(**values)[0], exact[0]) <= 2 * error(naive[0], exact[0])
    assert error(OPS[op].final_state(**without_q(values)), exact[1]) <= 2 * error(naive[1], exact[1])


@pytest.mark.parametrize("op", OPS)
def test_bfloat16_inputs_accumulate_in_float32(op: str) -> None:
    values = arguments(op, 300, decay=0.01, dtype=torch.bfloat16)
    values["state_bhkv"] = values["state_bhkv"].float()
    exact, end = OPS[op].equation(**{name: x.double() for name, x in values.items()})
    y = OPS[op].scan(**values)[0]
    assert y.dtype == torch.bfloat16
    # Rounding the result is all that may be lost.
    assert error(y, exact) <= 2 * error(exact.to(torch.bfloat16), exact)
    state = OPS[op].final_state(**without_q(values))
    assert state.dtype == torch.float32
    assert error(state, end) < 1e-5


@pytest.mark.parametrize("op", OPS)
def test_autocast_leaves_the_state_precise(op: str) -> None:
    values = arguments(op, 100, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = OPS[op].scan(**values)[0]
    torch.testing.assert_close(got, OPS[op].scan(**values)[0], rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_a_token_changes_nothing_before_it(op: str) -> None:
    values = arguments(op, 130)
    before = OPS[op].scan(**values)[0]
    for name in values:
        if name != "state_bhkv":
            values[name][:, 100:] *= 0.5
    after = OPS[op].scan(**values)[0]
    torch.testing.assert_close(after[:, :100], before[:, :100], rtol=0, atol=1e-13)
    assert (after[:, 100:] - before[:, 100:]).abs().amin(dim=(0, 2, 3)).max() > 1e-3


def test_delta_rule_replaces_what_a_key_holds() -> None:
    """With no decay and beta 1 reading a written unit key returns its last value, and a zero key writes nothing."""
    k = F.normalize(torch.randn(1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    k_bthk = k.expand(1, 90, 1, 8).clone()
    k_bthk[:, 50] = 0
    v_bthv = torch.arange(90, dtype=torch.float64).view(1, 90, 1, 1)
    g_bth, beta_bth = torch.zeros(1, 90, 1, dtype=torch.float64), torch.ones(1, 90, 1, dtype=torch.float64)
    state_bhkv = torch.zeros(1, 1, 8, 1, dtype=torch.float64)
    y = gdn.scan(k.expand(1, 90, 1, 8), k_bthk, v_bthv, g_bth, beta_bth, state_bhkv)[0].flatten()
    want = torch.arange(90, dtype=torch.float64)
    want[50] = 49
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)


def test_ssd_without_decay_is_causal_linear_attention() -> None:
    values = arguments("ssd", 130, decay=0.0)
    values["state_bhkv"].zero_()
    q, k, v = (values[name].transpose(1, 2) for name in ("q_bthk", "k_bthk", "v_bthv"))
    want = ((q @ k.mT).tril() @ v).transpose(1, 2)
    torch.testing.assert_close(ssd.scan(**values)[0], want, rtol=1e-9, atol=1e-11)


CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("decay", [0.0, 0.01, 100.0])
def test_float32_outputs_and_gradients(op: str, decay: float, device: str) -> None:
    """At most twice the naive loop's error, or that of three products in a row of 64 terms each, sqrt(64) roundings.

    The gradient of a log decay is a running sum over a chunk of differences of such sums: sqrt(64) times more.
    """
    values = arguments(op, 300, decay=decay, dtype=torch.float32, k=64, v=32)
    exact = {name: x.double() for name, x in values.items()}
    single = {name: x.to(device) for name, x in values.items()}
    weight, rounding = torch.randn(2, 300, 2, 32), 3 * 8 * 2**-24
    pairs = [(OPS[op].scan(**single)[0], OPS[op].equation(**single)[0], OPS[op].equation(**exact)[0])]
    pairs.append((OPS[op].final_state(**without_q(single)), *(OPS[op].equation(**x)[1] for x in (single, exact))))
    got, naive = (gradients(f, single, weight.to(device)) for f in (OPS[op].scan, OPS[op].equation))
    pairs.extend(zip(got, naive, gradients(OPS[op].equation, exact, weight.double()), strict=True))
    for name, (a, b, c) in zip(("y", "state", *values), pairs, strict=True):
        limit = max(2 * error(b.cpu(), c), rounding * (8 if name == "g_bth" else 1))
        assert error(a.cpu(), c) <= limit, name
