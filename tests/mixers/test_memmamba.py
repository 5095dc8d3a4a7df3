"""What is particular to MemMamba: its notes and its pool, token by token, its start as Mamba."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.mixer import NOTHING
from subquad.mixers.mamba1 import Mamba1
from subquad.mixers.memmamba import MemMamba
from subquad.ops import summaries


def moved(**config: float) -> MemMamba:
    """A mixer in float64 whose parameters are all away from their start, as recall's projection must be to matter."""
    mixer = MemMamba(MemMamba.Config(d_model=8, state_dim=3, summary_dim=4, **config)).double().requires_grad_(False)
    for parameter in mixer.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))
    return mixer


@pytest.mark.parametrize(
    "options", [{}, {"take_above": 0.8, "recall_above": 0.0}, {"take_above": 0.0}, {"below": 1}], ids=str
)
@pytest.mark.parametrize("pool", [1, 3, 100])
def test_equals_a_loop_over_tokens(pool: int, options: dict[str, float]) -> None:
    """Each token recalls from a queue of notes, and from that of a layer below, then its own note joins its queue."""
    mixer, lower = moved(pool=pool, **options), moved(pool=2, take_above=0.6)
    config, queue, theirs = mixer.config, deque(maxlen=pool), deque(maxlen=2)
    plain = Mamba1(Mamba1.Config(d_model=8, state_dim=3)).double().requires_grad_(False)
    plain.load_state_dict({name: x for name, x in mixer.state_dict().items() if name in plain.state_dict()})
    (x_td, below_td), restored, taken = torch.randn(2, 150, 8, dtype=torch.float64), [], 0
    offered = lower.begin(below_td[None])[1].offers()
    shared = {f"0.{name}": x for name, x in offered.items()} if config.below else NOTHING
    for x, below in zip(x_td, below_td, strict=True):
        wish, recalled = torch.sigmoid(mixer.forgotten(x)), torch.zeros(4, dtype=torch.float64)
        if queue or theirs:
            notes = torch.stack((*queue, *theirs))
            recalled = torch.softmax(notes @ mixer.query(x) / 4**0.5, 0) @ notes
        restored.append(x + wish * mixer.fuse(recalled) if wish > config.recall_above else x)
        importance = torch.sigmoid(mixer.importance(x))
        if importance > config.take_above:
            queue.append(importance * mixer.note(x))
            taken += 1
        if config.below and torch.sigmoid(lower.importance(below)) > 0.6:
            theirs.append(torch.sigmoid(lower.importance(below)) * lower.note(below))
    assert bool(theirs) == bool(config.below)
    assert taken > 3 and (taken < 150 or config.take_above == 0)
    y_btd, update = mixer.begin(x_td[None], shared=shared)
    # Float64 by chunks and by steps, thousands of roundings of 1e-16.
    torch.testing.assert_close(y_btd, plain(torch.stack(restored)[None]), rtol=1e-10, atol=1e-10)
    kept = update.commit().pool
    assert kept.held_b.item() == len(queue) == min(pool, taken)
    torch.testing.assert_close(kept.summaries_bpm[0, pool - len(queue) :], torch.stack(tuple(queue)))
    assert (kept.summaries_bpm[0, : pool - len(queue)] == 0).all()


def test_what_left_the_pool_changes_nothing() -> None:
    """Of 150 tokens that all leave a note, the next one sees the last three."""
    mixer = moved(pool=3, take_above=0.0)
    x_btd, other_btd = torch.randn(2, 1, 150, 8, dtype=torch.float64)
    other_btd[:, -3:] = x_btd[:, -3:]
    pools = [mixer.read(x, mixer.init_state(1))[1].commit().pool for x in (x_btd, other_btd)]
    assert torch.equal(pools[0].summaries_bpm, pools[1].summaries_bpm)
    q_btm = torch.randn(1, 5, 4, dtype=torch.float64)
    nothing = summaries.Notes(torch.zeros_like(q_btm), torch.zeros(1, 5, dtype=torch.bool), pools[0])
    one = summaries.read(q_btm, [nothing], None)
    assert one.norm() > 0
    # A second document begins with an empty pool.
    documents_bt = torch.tensor([[0, 0, 1, 1, 1]])
    two = summaries.read(q_btm, [nothing], documents_bt)
    assert torch.equal(two[:, :2], one[:, :2]) and (two[:, 2:] == 0).all()


def test_starts_as_mamba() -> None:
    mixer = MemMamba(MemMamba.Config(d_model=8))
    plain = Mamba1(Mamba1.Config(d_model=8))
    plain.load_state_dict({name: x for name, x in mixer.state_dict().items() if name in plain.state_dict()})
    x_btd = torch.randn(2, 70, 8)
    torch.testing.assert_close(mixer(x_btd), plain(x_btd), rtol=0, atol=0)


def test_every_part_learns() -> None:
    """The threshold itself has no gradient; the importance stands in the note, the wish in what is recalled."""
    mixer = moved(pool=3).requires_grad_(True)
    mixer(torch.randn(1, 30, 8, dtype=torch.float64)).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name


def test_no_note_is_taken_of_what_is_not_committed() -> None:
    mixer = moved(pool=4, take_above=0.0)
    _, update = mixer.read(torch.randn(2, 6, 8, dtype=torch.float64), mixer.init_state(2))
    assert update.commit(torch.tensor([0, 3])).pool.held_b.tolist() == [0, 3]
    padded = mixer.read(
        torch.randn(2, 6, 8, dtype=torch.float64), mixer.init_state(2), Layout.ragged(torch.tensor([1, 6]), 6)
    )
    assert padded[1].commit().pool.held_b.tolist() == [1, 4]


def test_rates_and_state_stay_in_float32() -> None:
    mixer = MemMamba(MemMamba.Config(d_model=16)).to(torch.bfloat16)
    assert {p.dtype for p in mixer.ssm.rates.parameters()} == {torch.float32}
    y_btd, update = mixer.read(torch.randn(2, 5, 16).bfloat16(), mixer.init_state(2))
    after = update.commit(torch.tensor([3, 5]))
    low = torch.bfloat16
    assert (y_btd.dtype, after.ssm.recurrent_bdn.dtype, after.pool.summaries_bpm.dtype) == (low, torch.float32, low)


def test_state_has_the_documented_size() -> None:
    mixer = MemMamba(MemMamba.Config(d_model=16, state_dim=5, d_inner=24, summary_dim=7, pool=9)).to(torch.bfloat16)
    for capacity in (0, 10**6):
        want = 3 * (4 * 24 * 5 + 2 * 24 * 3 + 2 * 9 * 7 + 8)
        assert mixer.init_state(3, capacity, device="meta").nbytes == want


def test_bad_configs_say_what_to_do() -> None:
    for field, value, message in (
        ("pool", 0, "pool: expected at least 1, got 0"),
        ("summary_dim", 0, "summary_dim: expected at least 1"),
        ("take_above", 1.0, "take_above: expected at least 0 and below 1, got 1.0"),
        ("recall_above", -0.1, "recall_above: expected at least 0"),
        ("below", -1, "below: expected at least 0, got -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            MemMamba(MemMamba.Config(d_model=16, **{field: value}))
