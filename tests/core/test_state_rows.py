"""Rows of a pool: the first ones shared, a smaller capacity cut and written, and rows emptied as they began."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.core.config import config_from_dict
from subquad.core.errors import ConfigError
from subquad.core.mixer import Mixer
from subquad.core.registry import load, methods
from subquad.core.state import State, axes

MIXERS = [
    (slug, name)
    for slug, card in methods("mixers").items()
    if card.causal and card.splittable
    for name in card.examples
]
D = 32


@dataclass(frozen=True)
class Cache(State):
    """One tensor grows along its third axis, one along its second, one not at all."""

    k_bgnk: Tensor = axes("b g n k", grows="n")
    score_bn: Tensor = axes("b n", precision="high", grows="n")
    conv_btd: Tensor = axes("b t d")
    seen_b: Tensor = axes("b", precision="index")


@dataclass(frozen=True)
class Pair(State):
    """States and bare tensors in tuples, whose declaration is that of the field."""

    caches: tuple[Cache, ...] = axes("b")
    plain: tuple[Tensor, ...] = axes("b n", grows="n")


def cache(b: int = 3, n: int = 6) -> Cache:
    seen_b = torch.arange(1, b + 1)
    return Cache(torch.randn(b, 2, n, 4), torch.randn(b, n), torch.randn(b, n, 5), seen_b)


def pair(b: int = 3, n: int = 6) -> Pair:
    return Pair((cache(b, n), cache(b, n)), (torch.randn(b, n), torch.randn(b, n)))


def shapes(state: State) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for _, t in state.tensors()]


def same(a: State, b: State) -> bool:
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(a.tensors(), b.tensors(), strict=True))


def mixer(slug: str, name: str) -> Mixer:
    cls: type[Mixer] = load("mixers", slug)
    values = {"d_model": D} | dict(methods("mixers")[slug].examples[name])
    return cls(config_from_dict(cls.Config, values, where=slug)).double()


def width_of(one: Mixer) -> int:
    config: Any = one.config
    return config.d_model


def filled(one: Mixer, rows: int, capacity: int, tokens: int) -> State:
    """A state in a pool whose rows have all read `tokens` tokens."""
    pool = one.init_state(rows, capacity)
    with torch.no_grad():
        _, update = one.read(torch.randn(rows, tokens, width_of(one), dtype=torch.float64), pool)
        update.commit_(pool, torch.arange(rows))
    return pool


def test_the_first_rows_share_their_memory() -> None:
    pool = pair(4)
    two = pool.first(2)
    assert two.batch == 2
    assert same(two, pool.select(torch.tensor([0, 1])))
    before = pool.snapshot()
    two.caches[1].score_bn.fill_(7.0)
    two.write_(torch.tensor([1]), pair(1))
    assert (pool.caches[1].score_bn[0] == 7).all()
    assert not same(pool.select(torch.tensor([1])), before.select(torch.tensor([1])))
    assert same(pool.select(torch.tensor([2, 3])), before.select(torch.tensor([2, 3])))
    assert pool.first(9).batch == 4
    assert pool.first(0).batch == 0


def test_a_cut_shortens_only_what_grows_and_shares_memory() -> None:
    state = pair(2, 6)
    short = state.cut(4)
    one = [(2, 2, 4, 4), (2, 4), (2, 6, 5), (2,)]
    assert shapes(short) == [*one, *one, (2, 4), (2, 4)]
    assert torch.equal(short.caches[0].k_bgnk, state.caches[0].k_bgnk[:, :, :4])
    short.plain[1].zero_()
    assert (state.plain[1][:, :4] == 0).all()
    assert (state.plain[1][:, 4:] != 0).all()
    assert shapes(state.cut(99)) == shapes(state)
    assert state.cut(0).caches[0].k_bgnk.shape == (2, 2, 0, 4)


def test_a_snapshot_of_a_cut_holds_no_more_bytes_than_it_counts() -> None:
    short = cache(1, 100).cut(3).snapshot()
    assert short.nbytes == 4 * (2 * 3 * 4 + 3 + 100 * 5) + 8
    buffers = {s.data_ptr(): s.nbytes() for _, t in short.tensors() if (s := t.untyped_storage())}
    # One for each dtype.
    assert len(buffers) == 2
    assert sum(buffers.values()) == short.nbytes


def test_rows_are_emptied_and_no_others() -> None:
    pool = pair(4)
    pool.plain[0][1] = torch.nan
    before = pool.snapshot()
    pool.clear_(torch.tensor([3, 1]))
    assert all((t[[1, 3]] == 0).all() for _, t in pool.tensors())
    assert same(pool.select(torch.tensor([0, 2])), before.select(torch.tensor([0, 2])))


@pytest.mark.parametrize("rows", [[2, 0], None])
def test_of_a_smaller_capacity_only_the_beginning_is_written(rows: list[int] | None) -> None:
    pool, other = cache(3, 6), cache(3 if rows is None else 2, 4)
    other = Cache(other.k_bgnk, other.score_bn, torch.randn(other.batch, 6, 5), other.seen_b)
    before = pool.snapshot()
    at = torch.arange(3) if rows is None else torch.tensor(rows)
    pool.write_(None if rows is None else at, other)
    assert same(pool.select(at).cut(4), other)
    assert torch.equal(pool.k_bgnk[:, :, 4:], before.k_bgnk[:, :, 4:])
    assert torch.equal(pool.score_bn[:, 4:], before.score_bn[:, 4:])
    if rows is not None:
        assert same(pool.select(torch.tensor([1])), before.select(torch.tensor([1])))


def test_an_empty_capacity_writes_only_what_does_not_grow() -> None:
    pool = cache(2, 6)
    before, none = pool.snapshot(), cache(1, 6).cut(0)
    pool.write_(torch.tensor([1]), none)
    assert torch.equal(pool.k_bgnk, before.k_bgnk)
    assert torch.equal(pool.conv_btd[1:], none.conv_btd)
    assert pool.seen_b.tolist() == [1, 1]


def test_a_larger_capacity_and_other_lengths_of_what_does_not_grow_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^state k_bgnk: expected shape \(2, 6, 4\) a row, got \(2, 8, 4\)"):
        cache(2, 6).write_(None, cache(2, 8))
    with pytest.raises(ConfigError, match=r"^state conv_btd: expected shape \(6, 5\) a row, got \(4, 5\)"):
        cache(2, 6).write_(None, cache(2, 4))


def test_an_axis_that_grows_is_one_that_is_there() -> None:
    with pytest.raises(AssertionError):
        axes("b n", grows="m")


@pytest.mark.parametrize(("slug", "name"), MIXERS)
def test_every_mixer_declares_what_grows_and_begins_empty(slug: str, name: str) -> None:
    one = mixer(slug, name)
    assert shapes(one.init_state(2, 9).cut(4)) == shapes(one.init_state(2, 4))
    pool = filled(one, 3, 9, 5)
    assert not same(pool, one.init_state(3, 9))
    pool.clear_(torch.arange(3))
    assert same(pool, one.init_state(3, 9))


@pytest.mark.parametrize(("slug", "name"), MIXERS)
def test_a_cut_state_in_another_pool_goes_on_bit_for_bit(slug: str, name: str) -> None:
    """All that was seen is in the cut: in a pool of the same size the next block gives the same numbers."""
    one = mixer(slug, name)
    pool = filled(one, 3, 9, 5)
    other = one.init_state(2, 9)
    other.write_(torch.tensor([1]), pool.select(torch.tensor([2])).cut(5).snapshot())
    block_btd = torch.randn(1, 3, width_of(one), dtype=torch.float64)
    with torch.no_grad():
        expected = one.read(block_btd, pool.select(torch.tensor([2])))[0]
        got = one.read(block_btd, other.select(torch.tensor([1])))[0]
    assert torch.equal(got, expected)
