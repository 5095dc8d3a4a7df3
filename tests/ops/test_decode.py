"""Decode: courses of blocks of which some tokens are accepted, against the loop and against reading all in one shot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.ops import backends, decode, gdn, launch, norm, short_conv, ssd
from subquad.ops.decode import Block, DecodeState, Rule, Weights

triton_runs = torch.cuda.is_available() or backends.interpreted()
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not triton_runs, reason="needs Triton"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Layer:
    """A layer's rule, and the sizes and options that tests vary."""

    rule: Rule
    key_decay: bool = False
    beta: bool = False
    skip: bool = False
    conv: int = 4
    heads: tuple[int, int, int, int] = (2, 2, 2, 2)
    key: int = 20
    value: int = 33

    @property
    def channels(self) -> int:
        _, q, k, v = self.heads
        return v * self.value + (k + q) * self.key


LAYERS = {
    "ssd": Layer(Rule(delta=False, activation="silu"), beta=True, skip=True),
    "gla": Layer(Rule(delta=False, scale=0.5), key_decay=True, conv=0),
    "gdn": Layer(Rule(delta=True, activation="silu", l2_eps=1e-6, scale=0.3), beta=True),
    "delta of channels": Layer(Rule(delta=True, l2_eps=1e-6), key_decay=True, beta=True, conv=2),
}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    launch.poison = True
    yield
    launch.poison = False


def weights_of(layer: Layer, dtype: torch.dtype) -> Weights:
    d = layer.channels
    return Weights(
        (torch.randn(d, layer.conv) / 2).to(DEVICE, dtype) if layer.conv else None,
        torch.randn(d).to(DEVICE, dtype) if layer.conv else None,
        torch.randn(layer.heads[0]).to(DEVICE) if layer.skip else None,
    )


def block_of(layer: Layer, batch: int, time: int, dtype: torch.dtype) -> Block:
    """Tokens as views of one projection, channels in the order v, k, q."""
    h, hq, hk, hv = layer.heads
    wide = torch.randn(batch, time, layer.channels).to(DEVICE, dtype)
    v, k, q = wide.split((hv * layer.value, hk * layer.key, hq * layer.key), dim=-1)
    q, k, v = q.unflatten(-1, (hq, -1)), k.unflatten(-1, (hk, -1)), v.unflatten(-1, (hv, -1))
    g = -torch.rand(batch, time, h, layer.key if layer.key_decay else 1).to(DEVICE)
    return Block(q, k, v, g, torch.rand(batch, time, h).to(DEVICE) if layer.beta else None)


def pool_of(layer: Layer, rows: int, block: int, dtype: torch.dtype, state_dtype: torch.dtype | None) -> DecodeState:
    """Buffers in which everything that nobody wrote is NaN."""
    h, hq, hk, hv = layer.heads
    sizes: dict[str, Any] = {"heads": h, "q_heads": hq, "k_heads": hk, "v_heads": hv, "conv_width": layer.conv}
    sizes |= {"key_dim": layer.key, "value_dim": layer.value, "key_decay": layer.key_decay}
    pool = decode.init_pool(rows, block, **sizes, state_dtype=state_dtype, dtype=dtype, device=DEVICE)
    for _, x in pool.tensors():
        x.fill_(torch.nan)
    return pool


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def oracle(
    block: Block | None, state: Tensor, conv: Tensor | None, layer: Layer, weights: Weights, n: Tensor
) -> tuple[Tensor, Tensor | None]:
    if block is None or block.q_bthk.shape[1] == 0:
        return state, conv
    _, state, conv = decode.equation(block, state, conv, layer.rule, weights, n)
    return state, conv


def course(
    backend: str, layer: Layer, sizes: tuple[int, ...], dtype: torch.dtype, state_dtype: torch.dtype | None = None
) -> tuple[float, float]:
    """Errors of outputs and states, ours and the bfloat16 loop's, over blocks of which random tokens are accepted."""
    rows = torch.tensor([3, -1, 0], device=DEVICE)
    active, others = torch.tensor([0, 2]), torch.tensor([1, 2, 4])
    h, _, _, _ = layer.heads
    weights, pool = weights_of(layer, dtype), pool_of(layer, 5, max(sizes), dtype, state_dtype)
    pool.recurrent_bhkv[rows[active]] = torch.randn(2, h, layer.key, layer.value).to(pool.recurrent_bhkv)
    exact = pool.recurrent_bhkv[rows.clamp(min=0)].double()
    naive = exact.to(torch.bfloat16)
    conv = low_conv = None
    if layer.conv:
        conv = torch.zeros(3, layer.channels, layer.conv - 1, dtype=torch.float64, device=DEVICE)
        low_conv = conv.to(torch.bfloat16)
    seen = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    n, pending = seen.clone(), None
    ours, theirs = list[float](), list[float]()
    for time in sizes:
        block = block_of(layer, 3, time, dtype)
        exact, conv = oracle(pending, exact, conv, layer, weights, n)
        naive, low_conv = oracle(pending, naive, low_conv, layer, weights, n)
        with backends.use(backend):
            y = decode.advance_(block, pool, layer.rule, weights, seen, n, rows)
        pairs = [(pool.recurrent_bhkv[rows[active]], naive[active], exact[active])]
        if time:
            want, low = (
                decode.equation(block, *start, layer.rule, weights)[0] for start in ((exact, conv), (naive, low_conv))
            )
            pairs.append((y[active], low[active], want[active]))
        ours.extend(error(a, c) for a, _, c in pairs)
        theirs.extend(error(b, c) for _, b, c in pairs)
        assert y.dtype == dtype
        assert not y[1].any()
        assert pool.recurrent_bhkv[others].isnan().all()
        seen, pending = seen + n, block
        n = torch.randint(0, time + 1, (3,)).to(DEVICE)
    return max(ours), max(theirs)


# Blocks of one token; of several sizes, one of them none at all, a commit alone. The rings go round more than once.
SINGLE, MIXED = (1, 1, 1, 1), (5, 1, 3, 0, 5, 5)


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("sizes", [SINGLE, MIXED], ids=["single", "mixed"])
@pytest.mark.parametrize("name", LAYERS)
def test_course_equals_the_loop(name: str, sizes: tuple[int, ...], backend: str) -> None:
    """Sums of at most 33 terms, two in a row, over a few tokens: some tens of float32 roundings."""
    assert course(backend, LAYERS[name], sizes, torch.float32)[0] <= 40 * 2**-24


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ssd", "gla", "gdn"])
def test_bfloat16_course_is_as_good_as_the_loop_in_bfloat16(name: str, state_dtype: torch.dtype, backend: str) -> None:
    ours, naive = course(backend, LAYERS[name], (5, 1, 3, 5), torch.bfloat16, state_dtype)
    assert ours <= 2 * naive


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": (4, 4, 2, 1), "key": 16, "value": 16},
        {"heads": (4, 1, 2, 4), "key": 8, "value": 17, "conv": 3},
        {"conv": 0, "key": 40, "value": 5},
    ],
    ids=["grouped", "shared queries", "no convolution"],
)
@pytest.mark.parametrize("name", ["ssd", "gdn"])
@pytest.mark.skipif(not triton_runs, reason="needs Triton")
def test_groups_and_odd_widths(name: str, changes: dict[str, Any]) -> None:
    layer = replace(LAYERS[name], **changes)
    for backend in ("torch", "triton"):
        assert course(backend, layer, (3, 3), torch.float32)[0] <= 40 * 2**-24


@pytest.mark.skipif(not triton_runs, reason="needs Triton")
@pytest.mark.parametrize("name", ["gla", "gdn"])
def test_several_blocks_of_values_share_keys_and_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from subquad.ops.decode import on_triton

    monkeypatch.setattr(on_triton, "tiling", lambda *_, **__: on_triton.Tiling(16, 1))
    layer = replace(LAYERS[name], heads=(2, 1, 1, 1), conv=3, value=20)
    assert course("triton", layer, (9, 2, 9), torch.float32)[0] <= 40 * 2**-24


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("name", ["ssd", "gdn"])
def test_accepted_tokens_equal_one_shot(name: str, backend: str) -> None:
    """What was accepted over the whole course, read at once by the chunked scan, gives the same outputs and state."""
    layer = replace(LAYERS[name], skip=False, heads=(2, 2, 1, 1))
    weights, pool = weights_of(layer, torch.float32), pool_of(layer, 2, 4, torch.float32, None)
    pool.recurrent_bhkv.zero_()
    seen = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    accepted = torch.zeros_like(seen)
    tokens: list[list[Block]] = [[], []]
    outputs: list[list[Tensor]] = [[], []]
    for time in (4, 4, 1, 4, 0):
        block = block_of(layer, 2, time, torch.float32)
        with backends.use(backend):
            y = decode.advance_(block, pool, layer.rule, weights, seen, accepted)
        seen = seen + accepted
        accepted = torch.randint(0, time + 1, (2,), dtype=torch.int32).to(DEVICE)
        for row, n in enumerate(accepted.tolist()):
            parts = (x[row : row + 1, :n] for x in (block.q_bthk, block.k_bthk, block.v_bthv, block.g_bthk))
            tokens[row].append(Block(*parts, None if block.beta_bth is None else block.beta_bth[row : row + 1, :n]))
            outputs[row].append(y[row : row + 1, :n])
    for row in range(2):
        q, k, v, g, beta = (
            torch.cat([getattr(x, name).double() for x in tokens[row]], dim=1)
            for name in ("q_bthk", "k_bthk", "v_bthv", "g_bthk", "beta_bth")
        )
        raw = torch.cat([x.flatten(2) for x in (v, k, q)], dim=-1)
        history = raw.new_zeros(1, layer.channels, layer.conv - 1)
        assert weights.conv_dw is not None and weights.bias_d is not None
        mixed = F.silu(short_conv.parallel(raw, weights.conv_dw.double(), weights.bias_d.double(), history))
        v, k, q = (
            y.unflatten(-1, x.shape[2:])
            for y, x in zip(mixed.split([x.shape[2] * x.shape[3] for x in (v, k, q)], -1), (v, k, q), strict=True)
        )
        start = raw.new_zeros(1, 2, layer.key, layer.value)
        if name == "ssd":
            written = v.repeat_interleave(2, dim=2) * beta[..., None]
            want, state = ssd.scan(q, k, written, g.squeeze(-1), start)
        else:
            q, k = norm.l2(q, 1e-6) * layer.rule.scale, norm.l2(k, 1e-6)
            want, state = gdn.scan(q, k, v, g.squeeze(-1), beta, start)
        assert error(torch.cat(outputs[row], dim=1), want) <= 40 * 2**-24
        assert error(pool.recurrent_bhkv[row : row + 1], state) <= 40 * 2**-24
        assert int(seen[row]) == q.shape[1]
        assert torch.equal(pool.conv(torch.tensor([row]), seen[row : row + 1], layer.conv)[0].mT.double(), raw[0, -3:])


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_a_prompt_loaded_goes_on_where_it_ended(backend: str) -> None:
    layer = LAYERS["gdn"]
    weights, pool = weights_of(layer, torch.float32), pool_of(layer, 4, 3, torch.float32, None)
    prompt, block = block_of(layer, 2, 7, torch.float32), block_of(layer, 2, 3, torch.float32)
    start = torch.zeros(2, 2, layer.key, layer.value, dtype=torch.float64, device=DEVICE)
    conv = torch.zeros(2, layer.channels, 3, dtype=torch.float64, device=DEVICE)
    lengths, rows = torch.tensor([7, 2], device=DEVICE), torch.tensor([2, 0], device=DEVICE)
    _, state, conv = decode.equation(prompt, start, conv, layer.rule, weights, lengths)
    assert conv is not None
    pool.load_(rows, state, conv, lengths)
    torch.testing.assert_close(pool.conv(rows, lengths, 4), conv.float(), rtol=0, atol=0)
    with backends.use(backend):
        y = decode.advance_(block, pool, layer.rule, weights, lengths, torch.zeros_like(lengths), rows)
    assert error(y, decode.equation(block, state, conv, layer.rule, weights)[0]) <= 40 * 2**-24


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("name", LAYERS)
def test_nan_in_a_decay_shows_from_its_token_on(name: str, backend: str) -> None:
    layer = replace(LAYERS[name], conv=0)
    weights, pool = weights_of(layer, torch.float32), pool_of(layer, 1, 4, torch.float32, None)
    pool.recurrent_bhkv.zero_()
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    block = block_of(layer, 1, 4, torch.float32)
    block.g_bthk[0, 2, 0, 0] = torch.nan
    with backends.use(backend):
        y = decode.advance_(block, pool, layer.rule, weights, zero, zero)
        assert y[0, :2].isfinite().all() and y[0, 2:, 0].isnan().all() and y[0, :, 1].isfinite().all()
        empty = block_of(layer, 1, 0, torch.float32)
        decode.advance_(empty, pool, layer.rule, weights, zero, zero + 2)
        assert pool.recurrent_bhkv.isfinite().all()


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("g", [-80.0, -torch.inf])
def test_any_decay_stays_finite(g: float, backend: str) -> None:
    for name in ("gla", "gdn"):
        layer = replace(LAYERS[name], conv=0)
        weights, pool = weights_of(layer, torch.float32), pool_of(layer, 1, 3, torch.float32, None)
        pool.recurrent_bhkv.normal_()
        state, zero = pool.recurrent_bhkv.double(), torch.zeros(1, dtype=torch.int64, device=DEVICE)
        block = block_of(layer, 1, 3, torch.float32)
        block.g_bthk[:, 1] = g
        want, after, _ = decode.equation(block, state, None, layer.rule, weights)
        with backends.use(backend):
            y = decode.advance_(block, pool, layer.rule, weights, zero, zero)
            decode.advance_(block, pool, layer.rule, weights, zero, zero + 3)
        assert error(y, want) <= 40 * 2**-24
        assert error(pool.recurrent_bhkv, after) <= 40 * 2**-24


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_no_rows(backend: str) -> None:
    layer = LAYERS["gdn"]
    weights, pool = weights_of(layer, torch.float32), pool_of(layer, 1, 2, torch.float32, None)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    with backends.use(backend):
        y = decode.advance_(block_of(layer, 0, 2, torch.float32), pool, layer.rule, weights, none, none, none)
    assert y.shape == (0, 2, 2, layer.value)


def test_state_is_read_against_once_and_kept_where_nothing_was_accepted() -> None:
    """Reading changes no bit of a state, in bfloat16 too, where writing it back would be no matter of course."""
    layer = LAYERS["ssd"]
    weights, pool = weights_of(layer, torch.bfloat16), pool_of(layer, 1, 2, torch.bfloat16, torch.bfloat16)
    pool.recurrent_bhkv.normal_()
    before, zero = pool.recurrent_bhkv.clone(), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for time in (2, 1, 2):
        decode.advance_(block_of(layer, 1, time, torch.bfloat16), pool, layer.rule, weights, zero, zero)
    assert torch.equal(pool.recurrent_bhkv, before)


def triton_arguments(layer: Layer) -> tuple[Any, ...]:
    block, weights = block_of(layer, 2, 2, torch.float32), weights_of(layer, torch.float32)
    pool = pool_of(layer, 2, 2, torch.float32, None)
    for _, x in pool.tensors():
        x.zero_()
    count = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    mine = (block.q_bthk, block.k_bthk, block.v_bthv, block.g_bthk, block.beta_bth, weights.skip_h)
    buffers = tuple(x for _, x in pool.tensors())
    rule = layer.rule
    options = (rule.delta, rule.activation == "silu", rule.l2_eps, rule.scale)
    return *mine, weights.conv_dw, weights.bias_d, *buffers, count, count, None, *options


@pytest.mark.skipif(not triton_runs, reason="needs Triton")
def test_operator_is_well_declared() -> None:
    from subquad.ops.decode import on_triton

    layer = replace(LAYERS["gdn"], heads=(1, 1, 1, 1), key=4, value=4)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(on_triton._advance, triton_arguments(layer), test_utils=checks)


@pytest.mark.skipif(not triton_runs, reason="needs Triton")
def test_compiles_without_a_break() -> None:
    layer = replace(LAYERS["gdn"], heads=(1, 1, 1, 1))
    weights = weights_of(layer, torch.float32)
    pools = [pool_of(layer, 2, 3, torch.float32, None) for _ in range(2)]
    for pool in pools:
        pool.recurrent_bhkv.fill_(1)

    def step(block: Block, pool: DecodeState, seen: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * decode.advance_(block, pool, layer.rule, weights, seen, n), seen + n

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    counters = [torch.zeros(2, dtype=torch.int64, device=DEVICE)] * 2
    for n in (0, 3, 1):
        block = block_of(layer, 2, 3, torch.float32)
        accepted = torch.tensor([n, 0], device=DEVICE)
        with backends.use("triton"):
            y, counters[0] = step(block, pools[0], counters[0], accepted)
            z, counters[1] = compiled(block, pools[1], counters[1], accepted)
        assert torch.equal(y, z) and torch.equal(*counters)
    assert torch.equal(pools[0].recurrent_bhkv, pools[1].recurrent_bhkv)


def test_errors_say_what_does_not_fit() -> None:
    layer = LAYERS["gdn"]
    weights, pool = weights_of(layer, torch.float32), pool_of(layer, 2, 3, torch.float32, None)
    block, count = block_of(layer, 2, 3, torch.float32), torch.zeros(2, dtype=torch.int64, device=DEVICE)

    def refused(match: str, **changes: Any) -> None:
        given: dict[str, Any] = {"block": block, "pool": pool, "rule": layer.rule, "weights": weights}
        given |= {"seen_b": count, "n_b": count} | changes
        with pytest.raises(ConfigError, match=match):
            decode.advance_(**given)

    refused("block: expected at most 3 tokens.*got 4", block=block_of(layer, 2, 4, torch.float32))
    refused("pool: expected at least 2 rows, got 1", pool=pool_of(layer, 1, 3, torch.float32, None))
    refused("n_b: expected b=2 as in q_bthk, got 1", n_b=count[:1])
    refused(
        r"g_bthk: expected shape \(2, 3, 2, 1\) or \(2, 3, 2, 20\)", block=replace(block, g_bthk=block.g_bthk[:, :1])
    )
    refused("pool: expected heads and channels", pool=pool_of(replace(layer, key=21), 2, 3, torch.float32, None))
    refused("beta_bth: expected a tensor for the delta rule", block=replace(block, beta_bth=None))
    refused("unknown activation 'relu'", rule=replace(layer.rule, activation="relu"))
    refused("pool: expected room for 6 inputs", pool=pool_of(replace(layer, conv=2), 2, 3, torch.float32, None))
    refused("conv_dw: expected the 146 channels", weights=replace(weights, conv_dw=torch.zeros(5, 4, device=DEVICE)))
    refused("block: expected q, k and v of the pool's", block=replace(block, q_bthk=block.q_bthk.bfloat16()))
    refused("pool: expected contiguous", pool=replace(pool, values_bnhv=pool.values_bnhv.mT.contiguous().mT))
    refused(
        r"beta_bth: expected shape \(2, 3, 2\), got \(2, 3, 1\)", block=replace(block, beta_bth=block.beta_bth[..., :1])
    )
    refused(r"skip_h: expected shape \(2,\), got \(1,\)", weights=replace(weights, skip_h=torch.ones(1, device=DEVICE)))
    refused(r"bias_d: expected shape \(146,\)", weights=replace(weights, bias_d=torch.ones(5, device=DEVICE)))
    refused("n_b: expected int32 or int64, got torch.float32", n_b=count.float())


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_counters_of_any_stride_and_no_gradient_into_the_pool(backend: str) -> None:
    layer = LAYERS["ssd"]
    weights = weights_of(layer, torch.float32)
    first, second = (block_of(layer, 2, 3, torch.float32) for _ in range(2))
    second = replace(second, v_bthv=second.v_bthv.requires_grad_())
    seen, n = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.tensor([1, 3], device=DEVICE)
    pools = [pool_of(layer, 2, 3, torch.float32, None) for _ in range(2)]
    outputs = []
    for pool, apart in zip(pools, (False, True), strict=True):
        for _, x in pool.tensors():
            x.zero_()
        given = [
            torch.stack((x, x + 7), dim=1)[:, 0] if apart else x for x in (seen, n, torch.tensor([1, 0], device=DEVICE))
        ]
        skip = None if weights.skip_h is None else torch.stack((weights.skip_h, -weights.skip_h), 1)[:, 0]
        mine = replace(weights, skip_h=skip) if apart else weights
        with backends.use(backend):
            decode.advance_(first, pool, layer.rule, mine, given[0], seen, given[2])
            outputs.append(decode.advance_(second, pool, layer.rule, mine, *given))
        assert not any(x.requires_grad for _, x in pool.tensors()) and not outputs[-1].requires_grad
    assert torch.equal(*outputs)
    assert torch.equal(pools[0].recurrent_bhkv, pools[1].recurrent_bhkv)
