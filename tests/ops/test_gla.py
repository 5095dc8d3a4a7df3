"""Gated linear attention: the chunked form in PyTorch against the loop over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.errors import ConfigError, UnsupportedError
from subquad.ops import backends, gla, ssd


def arguments(
    t: int, *, decay: float = 1.0, dtype: torch.dtype = torch.float64, k: int = 5, v: int = 3
) -> dict[str, Tensor]:
    """Two rows, two heads, unequal key and value channels, unit keys; log decays uniform in [-decay, 0]."""
    rng = torch.Generator().manual_seed(0)
    b, h = 2, 2
    made = {
        "q_bthk": torch.randn(b, t, h, k, generator=rng, dtype=torch.float64),
        "k_bthk": F.normalize(torch.randn(b, t, h, k, generator=rng, dtype=torch.float64), dim=-1),
        "v_bthv": torch.randn(b, t, h, v, generator=rng, dtype=torch.float64),
        "g_bthk": -decay * torch.rand(b, t, h, k, generator=rng, dtype=torch.float64),
        "state_bhkv": torch.randn(b, h, k, v, generator=rng, dtype=torch.float64),
    }
    return {name: x.to(dtype) for name, x in made.items()}


def without_q(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in values.items() if name != "q_bthk"}


def columns(values: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: x if name == "state_bhkv" else x[:, start:stop] for name, x in values.items()}


def doubled(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() for name, x in values.items()}


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def gradients(function: Callable[..., Any], values: dict[str, Tensor], weight: Tensor, **options: Any) -> list[Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in values.items()}
    y, end = function(**leaves, **options)
    # Both results count, the state's channels each with a weight of its own.
    factor = torch.linspace(-1, 1, end[0].numel(), dtype=end.dtype).view(end.shape[1:])
    return list(torch.autograd.grad((y * weight).sum() + (end * factor).sum(), list(leaves.values())))


@pytest.mark.parametrize("decay", [0.0, 1.0, 100.0, 1e5])
@pytest.mark.parametrize("t", [0, 1, 2, 3, 63, 64, 65, 130, 1000])
def test_scan_equals_equation(t: int, decay: float) -> None:
    values = arguments(t, decay=decay)
    y, state = gla.equation(**values)
    got, end = gla.scan(**values)
    torch.testing.assert_close(got, y, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(end, state, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gla.final_state(**without_q(values)), state, rtol=1e-9, atol=1e-11)


def test_one_decay_for_all_channels_is_ssd() -> None:
    """An oracle of its own: where all channels of a head decay alike, the recurrence is SSD's."""
    values = arguments(100)
    g_bth = values["g_bthk"][..., 0]
    values["g_bthk"] = g_bth[..., None].expand_as(values["g_bthk"])
    others = {name: x for name, x in values.items() if name != "g_bthk"}
    for got, want in zip(gla.equation(**values), ssd.equation(**others, g_bth=g_bth), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_each_key_channel_decays_on_its_own() -> None:
    """Two tokens by hand: a channel that keeps all and one that keeps a quarter."""
    k_bthk = torch.tensor([[[[1.0, 2.0]], [[0.0, 1.0]]]])
    v_bthv = torch.tensor([[[[3.0]], [[5.0]]]])
    g_bthk = torch.tensor([[[[0.0, 0.0]], [[0.0, 0.25]]]]).log().nan_to_num(neginf=0.0)
    q_bthk = torch.tensor([[[[1.0, 0.0]], [[1.0, 1.0]]]])
    y, state = gla.scan(q_bthk, k_bthk, v_bthv, g_bthk, torch.zeros(1, 1, 2, 1))
    torch.testing.assert_close(state.flatten(), torch.tensor([3.0, 6.0 / 4 + 5.0]))
    torch.testing.assert_close(y.flatten(), torch.tensor([3.0, 3.0 + 6.5]))


@pytest.mark.parametrize("form", ["equation", "scan"])
def test_documents_and_padding_equal_separate_sequences(form: str) -> None:
    t = 200
    values = arguments(t)
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
    y, end = getattr(gla, form)(**spoiled, **where)
    torch.testing.assert_close(gla.final_state(**without_q(spoiled), **where), end, rtol=1e-9, atol=1e-11)
    for row, parts in enumerate(lengths):
        start = 0
        for document, n in enumerate(parts):
            alone = {name: x[row : row + 1] for name, x in columns(values, start, start + n).items()}
            if document > 0:
                alone["state_bhkv"] = torch.zeros_like(alone["state_bhkv"])
            want, state = gla.equation(**alone)
            torch.testing.assert_close(y[row : row + 1, start : start + n], want, rtol=1e-9, atol=1e-11)
            start += n
        torch.testing.assert_close(end[row : row + 1], state, rtol=1e-9, atol=1e-11)


def test_final_state_keeps_any_prefix() -> None:
    t = 70
    values = arguments(t)
    documents_bt = torch.tensor([0] * 20 + [1] * 30 + [2] * 20).expand(2, -1)
    for n in (0, 1, 19, 20, 21, 64, 70):
        for documents in (None, documents_bt):
            valid_bt = torch.arange(t) < torch.tensor([n, t - n])[:, None]
            got = gla.final_state(**without_q(values), valid_bt=valid_bt, documents_bt=documents)
            for row, kept in enumerate((n, t - n)):
                cut = {name: x[row : row + 1] for name, x in columns(values, 0, kept).items()}
                inside = None if documents is None else documents[row : row + 1, :kept]
                state = gla.equation(**cut, documents_bt=inside)[1]
                torch.testing.assert_close(got[row : row + 1], state, rtol=1e-9, atol=1e-11)


def test_splits_equal_one_shot() -> None:
    t = 150
    values = arguments(t)
    whole, end = gla.scan(**values)
    state, start, pieces = values["state_bhkv"], 0, []
    for n in (1, 63, 2, 65, 0, 19):
        piece = columns(values, start, start + n) | {"state_bhkv": state}
        pieces.append(gla.scan(**piece)[0])
        state, start = gla.final_state(**without_q(piece)), start + n
    assert start == t
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(state, end, rtol=1e-9, atol=1e-11)


def test_grouped_heads_equal_repeated_ones() -> None:
    values = arguments(70)
    few = {name: x[:, :, :1] if name[0] in "qkv" else x for name, x in values.items()}
    many = {name: x.expand(-1, -1, 2, -1) if name[0] in "qkv" else x for name, x in few.items()}
    for got, want in zip(gla.scan(**few), gla.equation(**many), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("decay", [0.0, 1.0, 300.0])
@pytest.mark.parametrize("t", [1, 65, 130])
def test_gradients_equal_those_of_the_equation(t: int, decay: float) -> None:
    values = arguments(t, decay=decay)
    weight = torch.randn(2, t, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    documents_bt = (torch.arange(t) >= 40).long().expand(2, -1)
    for options in ({}, {"documents_bt": documents_bt, "valid_bt": torch.arange(t) < torch.tensor([[t], [t - 1]])}):
        got = gradients(gla.scan, values, weight, **options)
        want = gradients(gla.equation, values, weight, **options)
        for name, a, b in zip(values, got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_gradcheck() -> None:
    values = arguments(5)

    def check(function: Callable[..., Any], inputs: dict[str, Tensor]) -> bool:
        leaves = tuple(x.requires_grad_() for x in inputs.values())
        return torch.autograd.gradcheck(lambda *xs: function(**dict(zip(inputs, xs, strict=True))), leaves)

    assert check(gla.scan, values)
    assert check(gla.final_state, without_q(values))


@pytest.mark.parametrize("g", [0.0, -80.0, -1e4, -1e30, -torch.inf])
def test_any_decay_stays_finite(g: float) -> None:
    values = arguments(130, dtype=torch.float32)
    values["g_bthk"][:, ::3] = g
    values["g_bthk"][..., 0] = 0
    want = gla.equation(**doubled(values))[0]
    torch.testing.assert_close(gla.scan(**values)[0].double(), want, rtol=1e-4, atol=1e-5)
    for name, gradient in zip(values, gradients(gla.scan, values, torch.ones(2, 130, 2, 3)), strict=True):
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("decay", ["none", "slow", "mixed"])
def test_float32_is_as_exact_as_the_loop(decay: str) -> None:
    """At most twice the error of the naive float32 loop, also where one token forgets all and its neighbours little."""
    values = arguments(700, decay={"none": 0.0, "slow": 0.01, "mixed": 0.01}[decay], dtype=torch.float32, k=64, v=8)
    if decay == "mixed":
        values["g_bthk"][:, ::40, :, ::2] = -900.0
    exact, naive = gla.equation(**doubled(values)), gla.equation(**values)
    assert error(gla.scan(**values)[0], exact[0]) <= 2 * error(naive[0], exact[0])
    assert error(gla.final_state(**without_q(values)), exact[1]) <= 2 * error(naive[1], exact[1])


@pytest.mark.parametrize("decay", [0.0, 0.01, 100.0])
def test_float32_gradients(decay: float) -> None:
    """At most twice the naive loop's error, or that of three products in a row of 64 terms each, sqrt(64) roundings.

    The gradient of a log decay sums such terms over a chunk: sqrt(64) times more.
    """
    values = arguments(300, decay=decay, dtype=torch.float32, k=64, v=32)
    weight, rounding = torch.randn(2, 300, 2, 32), 3 * 8 * 2**-24
    want = gradients(gla.equation, doubled(values), weight.double())
    got, naive = (gradients(f, values, weight) for f in (gla.scan, gla.equation))
    for name, a, b, c in zip(values, got, naive, want, strict=True):
        assert error(a, c) <= max(2 * error(b, c), rounding * (8 if name == "g_bthk" else 1)), name


def test_bfloat16_inputs_accumulate_in_float32() -> None:
    values = arguments(300, decay=0.01, dtype=torch.bfloat16)
    values["state_bhkv"] = values["state_bhkv"].float()
    exact, end = gla.equation(**doubled(values))
    y, state = gla.scan(**values)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    # Rounding the result is all that may be lost.
    assert error(y, exact) <= 2 * error(exact.to(torch.bfloat16), exact)
    assert error(state, end) < 1e-5
    low, _ = gla.equation(**values, dtype=torch.bfloat16)
    assert error(low, exact) > 4 * error(y, exact)


def test_autocast_leaves_the_state_precise() -> None:
    values = arguments(100, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gla.scan(**values)[0]
    torch.testing.assert_close(got, gla.scan(**values)[0], rtol=0, atol=0)


def test_a_token_changes_nothing_before_it() -> None:
    values = arguments(130)
    before = gla.scan(**values)[0]
    for name in values:
        if name != "state_bhkv":
            values[name][:, 100:] *= 0.5
    after = gla.scan(**values)[0]
    torch.testing.assert_close(after[:, :100], before[:, :100], rtol=0, atol=1e-13)
    assert (after[:, 100:] - before[:, 100:]).abs().amin(dim=(0, 2, 3)).max() > 1e-3


def test_nan_in_a_decay_spoils_all_behind_it() -> None:
    values = arguments(130)
    values["g_bthk"][0, 70, 0, 2] = torch.nan
    y, end = gla.scan(**values)
    assert y[0, 70:, 0].isnan().all() and end[0, 0, 2].isnan().all()
    assert y[0, :64].isfinite().all() and y[1].isfinite().all() and y[:, :, 1].isfinite().all()


def test_without_decay_it_is_causal_linear_attention() -> None:
    values = arguments(130, decay=0.0)
    values["state_bhkv"].zero_()
    q, k, v = (values[name].transpose(1, 2) for name in ("q_bthk", "k_bthk", "v_bthv"))
    want = ((q @ k.mT).tril() @ v).transpose(1, 2)
    torch.testing.assert_close(gla.scan(**values)[0], want, rtol=1e-9, atol=1e-11)


def test_flash_linear_attention_runs_only_where_it_can() -> None:
    """Named on a machine without it, or on tensors of another device, it says so."""
    with (
        pytest.raises((ConfigError, UnsupportedError), match="install subquad|needs a CUDA device"),
        backends.use("fla"),
    ):
        gla.scan(**arguments(3))
