"""Beginnings of prompts are read once: what is kept, what goes, and that it changes nobody's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.packed import Packed
from subquad.core.registry import methods
from subquad.core.state import State
from subquad.engine.engine import Engine
from subquad.engine.generate import generate
from subquad.engine.prefix import PrefixCache
from subquad.engine.request import Limits, Request
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack, StackState

V, B = 31, 4
ATTENTION = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rotary": {"theta": 100.0, "dim": 8}}
FIRST = {
    slug: {"mixer": slug, **next(iter(methods("mixers")[slug].examples.values()))}
    for slug in ("mamba2", "windowed_linear", "parallel")
}
STACKS: dict[str, tuple[Mapping[str, Any], ...]] = {
    "attention": (ATTENTION, ATTENTION),
    "window": ({**ATTENTION, "window": 5, "sinks": 1},),
    "recurrent": (FIRST["mamba2"], FIRST["mamba2"]),
    "hybrid": (FIRST["parallel"], FIRST["windowed_linear"], ATTENTION),
}


def build(name: str) -> Stack:
    torch.manual_seed(0)
    layers = tuple({k: v for k, v in layer.items() if k != "d_model"} for layer in STACKS[name])
    model = Stack(ModelConfig(V, max(layer.get("d_model", 16) for layer in STACKS[name]), 48, layers))
    with torch.no_grad():
        for p in model.parameters():  # far from uniform logits, and no special starts
            p.add_(0.1 * torch.randn_like(p))
    return model.double().requires_grad_(False)


@pytest.fixture(params=STACKS)
def model(request: pytest.FixtureRequest) -> Stack:
    return build(request.param)


@pytest.fixture(scope="module")
def tiny() -> Stack:
    return build("attention")


def text(n: int, seed: int = 0) -> list[int]:
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def same(a: State, b: State) -> bool:
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(a.tensors(), b.tensors(), strict=True))


def state(model: Stack, tokens: int) -> Packed:
    return Packed.of(model.init_state(1, tokens))


class Reads:
    """Counts the tokens that the stack reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens = 0
        read = Stack.read

        def spy(
            model: Stack,
            tokens_bt: Tensor,
            state: StackState,
            lengths_b: Tensor | None = None,
            layout: Layout | None = None,
            aux_layers: Sequence[int] = (),
        ) -> Any:
            lengths_b = lengths_b if layout is None else layout.lengths_b
            self.tokens += tokens_bt.numel() if lengths_b is None else int(lengths_b.sum())
            return read(model, tokens_bt, state, None if layout is not None else lengths_b, layout, aux_layers)

        monkeypatch.setattr(Stack, "read", spy)

    def of(self, engine: Engine, *prompts: Sequence[int], n: int = 1) -> tuple[int, list[list[int]]]:
        """Tokens read while the prompts are continued by n tokens each, and these."""
        self.tokens = 0
        ids = [engine.submit(Request(prompt, Limits(n, end_tokens=[]))) for prompt in prompts]
        got: dict[int, list[int]] = {id: [] for id in ids}
        while engine.busy:
            for piece in engine.step():
                got.setdefault(piece.row, []).append(piece.token)
        return self.tokens, [got[id] for id in ids]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def test_the_longest_beginning_is_found(tiny: Stack) -> None:
    cache, prompt = PrefixCache(1 << 20, block=B), text(20)
    assert cache.find(prompt) is None
    for n in (4, 12):
        cache.keep(prompt[:n], state(tiny, n))
    for length, tokens in ((3, None), (4, 4), (11, 4), (12, 12), (20, 12)):
        found = cache.find(prompt[:length])
        assert (None if found is None else found.tokens) == tokens
    other = [*prompt[:7], (prompt[7] + 1) % V, *prompt[8:]]
    assert getattr(cache.find(other), "tokens", None) == 4
    assert cache.find([(prompt[0] + 1) % V, *prompt[1:]]) is None
    # A block counts only behind all before it.
    assert cache.find(prompt[4:]) is None
    assert (cache.hits, cache.misses, cache.tokens_saved) == (5, 4, 4 + 4 + 12 + 12 + 4)


def test_a_state_is_worth_keeping_at_the_last_block_and_where_prompts_part(tiny: Stack) -> None:
    cache, prompt = PrefixCache(1 << 20, block=B), text(22)
    assert cache.marks(prompt[:3]) == []
    assert cache.marks(prompt) == [20]
    parts = [*prompt[:9], *text(8, seed=1)]
    assert cache.marks(parts) == [8, 16]
    # What is kept is not asked for again.
    cache.keep(prompt[:8], state(tiny, 8))
    assert cache.marks([*prompt[:8], *text(8, seed=2)]) == [16]
    cache.keep(prompt[:20], state(tiny, 20))
    assert cache.marks(prompt) == []
    assert cache.marks(prompt[:14]) == [12]


def test_bytes_are_counted_and_the_longest_unused_goes_first(tiny: Stack) -> None:
    one = state(tiny, 8).nbytes
    # Keys and values of 8 tokens, 8 channels each, in float64, of two layers; and three counts of tokens.
    assert one == 2 * 2 * 8 * 8 * 8 + 3 * 8
    cache = PrefixCache(3 * one, block=B)
    prompts = [text(8, seed) for seed in range(5)]
    for i in range(3):
        cache.keep(prompts[i], state(tiny, 8))
        assert (len(cache), cache.nbytes) == (i + 1, (i + 1) * one)
    assert cache.find(prompts[0]) is not None
    cache.keep(prompts[3], state(tiny, 8))
    assert (len(cache), cache.nbytes) == (3, 3 * one)
    assert [cache.find(p) is not None for p in prompts] == [True, False, True, True, False]
    # One that takes as much as two: 0 and 2 are the longest unused now.
    wide = text(16, 9)
    cache.keep(wide, state(tiny, 16))
    assert (len(cache), cache.nbytes) == (2, one + state(tiny, 16).nbytes)
    assert [cache.find(p) is not None for p in (prompts[0], prompts[2], prompts[3], wide)] == [False, False, True, True]


def test_a_state_that_is_too_large_is_not_kept_and_drives_nobody_out(tiny: Stack) -> None:
    small, large = state(tiny, 4), state(tiny, 8)
    cache = PrefixCache(large.nbytes - 1, block=B)
    cache.keep(text(4), small)
    cache.keep(text(8, 1), large)
    assert (len(cache), cache.nbytes) == (1, small.nbytes)
    assert cache.find(text(4)) is not None
    assert cache.find(text(8, 1)) is None
    exact = PrefixCache(large.nbytes, block=B)
    exact.keep(text(8), large)
    assert (len(exact), exact.nbytes) == (1, large.nbytes)


def test_the_same_beginning_is_kept_once(tiny: Stack) -> None:
    cache = PrefixCache(1 << 20, block=B)
    for _ in range(3):
        cache.keep(text(8), state(tiny, 8))
    assert (len(cache), cache.nbytes) == (1, state(tiny, 8).nbytes)
    cache.clear()
    assert (len(cache), cache.nbytes, cache.find(text(8)), cache.marks(text(8))) == (0, 0, None, [8])


@pytest.mark.parametrize(("nbytes", "block"), [(0, 1), (1, 0), (-1, 64)])
def test_a_cache_of_nothing_is_refused(nbytes: int, block: int) -> None:
    with pytest.raises(ConfigError, match="^prefix cache: expected bytes and block of at least 1"):
        PrefixCache(nbytes, block=block)


@pytest.mark.parametrize("chunk", [3, 1024])
def test_a_beginning_is_read_twice_and_never_again(model: Stack, reads: Reads, chunk: int) -> None:
    """Each prompt's own last token is read by its first round; all else once, or not at all."""
    cache = PrefixCache(1 << 24, block=B)
    engine = Engine(model, rows=2, capacity=64, prefixes=cache, chunk=chunk)
    shared = text(18)  # four whole blocks
    prompts = [[*shared, *text(7, seed)] for seed in range(1, 5)]
    expected = [generate(model, [p], limits=Limits(1, end_tokens=[]))[0].tokens for p in prompts]
    results = [reads.of(engine, prompt) for prompt in prompts]
    assert [tokens for _, (tokens,) in results] == expected
    # The second finds nothing, since a state was kept only at the first one's last block, and leaves one at 16.
    assert [n for n, _ in results] == [25, 25, 25 - 16, 25 - 16]
    assert reads.of(engine, prompts[0])[0] == 25 - 24
    assert (cache.hits, cache.misses, cache.tokens_saved) == (3, 2, 16 + 16 + 24)
    assert reads.of(engine, [*prompts[1], 3, 4])[0] == 27 - 24


def test_tokens_are_the_same_with_and_without(model: Stack, reads: Reads) -> None:
    """Prompts of all lengths around the blocks, some of them beginnings of others, in few rows and twice."""
    long = text(21)
    prompts = [*(long[:n] for n in (1, 4, 5, 8, 9, 16, 17, 21)), [*long[:10], *text(9, 1)], [*long[:12], *text(3, 2)]]
    limits = Limits(7, end_tokens=[])
    expected = [generate(model, [p], limits=limits)[0].tokens for p in prompts]
    cache = PrefixCache(1 << 24, block=B)
    engine = Engine(model, rows=3, capacity=32, prefixes=cache, chunk=5, rounds=2)
    assert reads.of(engine, *prompts, n=7)[1] == expected
    saved = cache.tokens_saved
    assert reads.of(engine, *prompts[::-1], n=7)[1] == expected[::-1]
    # All whole blocks before the last token are there by now.
    assert cache.tokens_saved - saved == sum((len(p) - 1) // B * B for p in prompts)


def test_what_is_kept_is_never_changed(model: Stack, reads: Reads) -> None:
    """By decoding on in the row that it came from, by later rows in its slot, and by those that begin with it."""
    cache = PrefixCache(1 << 24, block=B)
    engine = Engine(model, rows=2, capacity=48, prefixes=cache)
    prompt = text(18)
    engine.submit(Request(prompt, Limits(12, end_tokens=[])))
    engine.step()
    found = cache.find(prompt[:-1])
    assert found is not None
    assert found.tokens == 16
    before = found.state.snapshot()
    reads.of(engine, prompt, [*prompt, *text(5, 3)], text(30, 4), text(9, 5), n=12)
    assert cache.find(prompt[:-1]) is found
    assert same(found.state, before)
    assert found.state.seen_b.tolist() == [16]


def test_what_is_kept_holds_only_its_own_tokens(model: Stack, reads: Reads) -> None:
    """Bytes do not grow with the capacity of the rows, and memory is what is counted."""
    counted: list[int] = []
    for capacity in (32, 256):
        cache = PrefixCache(1 << 24, block=B)
        engine = Engine(model, rows=2, capacity=capacity, prefixes=cache)
        bare = engine.nbytes
        reads.of(engine, text(18))
        found = cache.find(text(18))
        assert found is not None
        # Its tensors share buffers.
        held = sum({s.data_ptr(): s.nbytes() for _, t in found.state.tensors() if (s := t.untyped_storage())}.values())
        assert held == found.state.nbytes == cache.nbytes == engine.nbytes - bare
        assert cache.nbytes == model.init_state(1, 16, device="meta").nbytes
        counted.append(held)
    assert counted[0] == counted[1]


def test_a_beginning_is_found_after_another_had_to_go(model: Stack, reads: Reads) -> None:
    one = model.init_state(1, 16, device="meta").nbytes
    cache = PrefixCache(2 * one, block=B)
    engine = Engine(model, rows=1, capacity=48, prefixes=cache)
    a, b, c = (text(18, seed) for seed in (1, 2, 3))
    expected = [generate(model, [p], limits=Limits(5, end_tokens=[]))[0].tokens for p in (a, b, c)]
    costs = []
    for prompt, wanted in ((a, 0), (b, 1), (a, 0), (c, 2), (a, 0), (c, 2), (b, 1)):
        cost, got = reads.of(engine, prompt, n=5)
        assert got == [expected[wanted]]
        assert cache.nbytes <= 2 * one
        costs.append(cost)
    full, hit = 18 + 4, 2 + 4
    assert costs == [full, full, hit, full, hit, hit, full]


def test_a_paused_row_keeps_what_it_found(model: Stack, reads: Reads) -> None:
    """It goes on from its own state, and asks for nothing again."""
    cache = PrefixCache(1 << 24, block=B)
    engine = Engine(model, rows=1, capacity=48, prefixes=cache, chunk=3)
    prompt = text(18)
    limits = Limits(6, end_tokens=[])
    expected = generate(model, [prompt], limits=limits)[0].tokens
    reads.of(engine, prompt)
    row = engine.submit(Request([*prompt, *text(8, 7)], limits))
    assert engine.step() == []
    assert engine.pause(row)
    got = [piece.token for _ in iter(lambda: engine.busy, False) for piece in engine.step()]
    assert got == generate(model, [[*prompt, *text(8, 7)]], limits=limits)[0].tokens
    assert cache.hits == 1
    assert reads.of(engine, prompt, n=6)[1] == [expected]
