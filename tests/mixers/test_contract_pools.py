"""What every mixer's pools keep: commits in place, rows that decode, forks, and what was promised to be kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subquad.core.layout import Layout
from subquad.core.mixer import Mixer, Update
from subquad.core.state import State
from subquad.engine.chains import select

from .conftest import CAPACITY, EXACT, block


def commit_all(
    mixer: Mixer, pool: State, updates: tuple[Update, Update], n_b: Tensor, start_b: Tensor, counts: bool
) -> State:
    """What a state, a value of the pool and the pool are behind the same tokens, and go on alike; the state."""
    plain, update = updates
    state, value = plain.commit(n_b), update.commit(n_b)
    if counts:
        update.store_(pool, None, n_b).count_(n_b)
    else:
        update.commit_(pool, None, n_b)
    probe, at = block(mixer, 3, 7, seed=99), Layout.dense(3, 7, start_b=start_b)
    want_btd = mixer.read(probe, state, at)[0]
    torch.testing.assert_close(mixer.read(probe, value, at)[0], want_btd, **EXACT)
    torch.testing.assert_close(mixer.read(probe, pool.settled(), at)[0], want_btd, **EXACT)
    return state


def test_commit_in_place_equals_pure(mixer: Mixer) -> None:
    pool = mixer.init_state(5, CAPACITY)
    rows = torch.tensor([4, 0, 2])
    for step, (size, kept) in enumerate([(9, [9, 4, 0]), (4, [0, 4, 2]), (1, [1, 0, 1]), (20, [20, 3, 11])]):
        x_btd, n_b = block(mixer, 3, size, seed=step), torch.tensor(kept)
        state = pool.select(rows)
        start_b = torch.full((3,), step)
        _, update = mixer.read(x_btd, state, Layout.dense(3, size, start_b=start_b))
        pure = update.commit(n_b)
        mixer.commit_(pool, rows, update, n_b)
        probe, at = block(mixer, 3, 7, seed=99), Layout.dense(3, 7, start_b=start_b + n_b)
        in_place_btd, _ = mixer.read(probe, pool.select(rows), at)
        torch.testing.assert_close(in_place_btd, mixer.read(probe, pure, at)[0], **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("counts", [False, True])
def test_a_pool_that_decodes_equals_states(mixer: Mixer, counts: bool) -> None:
    """Blocks of rows that keep some or none of them, read behind the norm of their stream."""
    norm = torch.nn.RMSNorm(mixer.config.d_model, eps=1e-5).double()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    everything, n_b = mixer.init_pool(4, CAPACITY, 5), torch.tensor([9, 4, 0])
    _, update = mixer.read(block(mixer, 3, 9), mixer.init_state(3, CAPACITY), Layout.ragged(n_b, 9))
    state, start_b = update.commit(n_b), n_b
    update.commit_(everything, torch.arange(3), n_b)
    pool = everything.first(3)
    for step, (size, kept) in enumerate(
        [(4, [4, 1, 0]), (1, [1, 0, 1]), (5, [0, 5, 2]), (1, [0, 1, 1]), (20, [20, 3, 0])]
    ):
        x_btd, at = block(mixer, 3, size, seed=step), Layout.dense(3, size, start_b=start_b)
        want_btd, plain = mixer.read(norm(x_btd), state, at)
        y_btd, update = mixer.read_stream(x_btd, norm, pool, at) or mixer.read(norm(x_btd), pool, at)
        torch.testing.assert_close(y_btd, want_btd, **EXACT)
        n_b = torch.tensor(kept)
        start_b = start_b + n_b
        state = commit_all(mixer, pool, (plain, update), n_b, start_b, counts)


@torch.no_grad()
@pytest.mark.parametrize("counts", [False, True])
def test_a_token_known_to_be_kept_equals_one_that_was_not(mixer: Mixer, counts: bool) -> None:
    """Whether a mixer commits on the way or not, by the rows of a pool that keep their token and those that don't."""
    everything, n_b = mixer.init_pool(4, CAPACITY, 1), torch.tensor([9, 4, 0])
    _, update = mixer.read(block(mixer, 3, 9), mixer.init_state(3, CAPACITY), Layout.ragged(n_b, 9))
    state, start_b = update.commit(n_b), n_b
    update.commit_(everything, torch.arange(3), n_b)
    before, pool = everything.snapshot(), everything.first(3)
    for step, kept in enumerate([[1, 1, 0], [1, 0, 1], [0, 1, 1]]):
        x_btd, n_b = block(mixer, 3, 1, seed=step), torch.tensor(kept)
        want_btd, plain = mixer.read(x_btd, state, Layout.dense(3, 1, start_b=start_b))
        y_btd, update = mixer.read(x_btd, pool, Layout.dense(3, 1, start_b=start_b, kept_b=n_b))
        torch.testing.assert_close(y_btd, want_btd, **EXACT)
        start_b = start_b + n_b
        state = commit_all(mixer, pool, (plain, update), n_b, start_b, counts)
    last = torch.tensor([3])
    for (name, now), (_, then) in zip(everything.select(last).tensors(), before.select(last).tensors(), strict=True):
        assert torch.equal(now, then), name


@torch.no_grad()
def test_what_was_read_of_a_fork_is_committed_into_the_pool(mixer: Mixer) -> None:
    pool, start_b = mixer.init_pool(2, CAPACITY, 4), torch.tensor([9, 5])
    prompt = block(mixer, 2, 9)
    mixer.read(prompt, mixer.init_state(2, CAPACITY), Layout.ragged(start_b, 9))[1].commit_(pool, None, start_b)
    x_btd, n_b, at = block(mixer, 4, 3, seed=2), torch.tensor([2, 3]), torch.tensor([1, 2])
    _, update = mixer.read(x_btd, pool.fork(2), Layout.dense(4, 3, start_b=start_b.repeat_interleave(2)))
    select(update, at).commit_(pool, torch.arange(2), n_b)
    probe = block(mixer, 2, 5, seed=3)
    y_btd, _ = mixer.read(probe, pool.settled(), Layout.dense(2, 5, start_b=start_b + n_b))
    for row, (chain, kept) in enumerate(zip(at.tolist(), n_b.tolist(), strict=True)):
        true = torch.cat((prompt[row, : int(start_b[row])], x_btd[chain, :kept], probe[row]))[None]
        torch.testing.assert_close(y_btd[row], mixer(true)[0, -5:], **EXACT)
