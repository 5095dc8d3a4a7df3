"""The bookkeeping of rows: by hand, and the kernels as PyTorch."""

from __future__ import annotations

import pytest
import torch

from subquad.core.errors import ConfigError
from subquad.ops import backends
from subquad.ops.slots import Slots, emit_, keep_last_, lead

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(not (torch.cuda.is_available() or backends.interpreted()), reason="needs Triton")
both = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])


def slots(rows: int, width: int = 12) -> Slots:
    """Rows under way with 5 tokens left, which end at 7."""
    made = Slots.empty(rows, width, DEVICE)
    made.alive_b.fill_(1), made.left_b.fill_(5), made.last_b.fill_(3)
    return made._replace(ends_be=torch.tensor([[7, -2]] * rows, device=DEVICE))


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE)


@both
def test_a_block_is_the_last_token_and_what_may_be_guessed(backend: str) -> None:
    some = slots(4)
    some.left_b.copy_(ints(5, 3, 0, 5))
    some.alive_b[3] = 0
    with backends.use(backend):
        tokens_bt, count_b, length_b = lead(some, torch.arange(12, device=DEVICE).view(4, 3), ints(2, 3, 3, 3))
    assert tokens_bt.tolist() == [[3, 0, 1, 2], [3, 3, 4, 5], [3, 6, 7, 8], [3, 9, 10, 11]]
    assert (count_b.tolist(), length_b.tolist()) == ([3, 3, 1, 1], [2, 2, 0, 0])


@both
def test_a_row_ends_with_its_token_its_room_or_a_broken_one(backend: str) -> None:
    some = slots(6)
    some.left_b[2], some.alive_b[3] = 2, 0
    some.fill_b[1] = 4
    tokens_bt = torch.tensor([[1, 2, 4], [1, 7, 4], [1, 2, 4], [1, 2, 4], [-1, 2, 4], [1, 2, 7]], device=DEVICE)
    step_b = ints(0, 1, 2, 3, 4, 5)
    with backends.use(backend):
        given_b, told_bt = emit_(some, step_b, tokens_bt, ints(3, 3, 3, 3, 3, 2), ints(2, 2, 2, 0, 2, 2))
    assert given_b.tolist() == [3, 2, 2, 0, 1, 2]
    assert step_b.tolist() == [3, 3, 4, 3, 5, 7]
    assert torch.equal(told_bt, tokens_bt.clamp(min=0)) and some.out_bn[4, 0] == -1
    assert some.alive_b.tolist() == [1, 0, 0, 0, 0, 1]
    assert some.left_b.tolist() == [2, 3, 0, 5, 4, 3]
    assert some.last_b.tolist() == [4, 7, 2, 3, 0, 2]
    assert some.fill_b.tolist() == [3, 6, 2, 0, 1, 2]
    assert some.out_bn[1, 4:6].tolist() == [1, 7]
    assert (some.kept_b.tolist(), some.judged_b.tolist()) == ([2, 2, 2, 0, 1, 1], [2, 2, 2, 0, 1, 2])
    assert some.guessed_b.tolist() == [2, 2, 2, 0, 2, 2]


@needs_triton
def test_kernels_keep_the_books_as_pytorch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    books: list[Slots] = [slots(9, 30), slots(9, 30)]
    steps = {name: torch.arange(9, device=DEVICE) for name in ("torch", "triton")}
    for some in books:
        some.left_b.copy_(torch.arange(9, device=DEVICE) * 3)
    for _ in range(6):
        tokens_bt = torch.randint(-1, 60, (9, 5), generator=generator).to(DEVICE)
        n_b = torch.randint(1, 6, (9,), generator=generator).to(DEVICE)
        for name, some in zip(("torch", "triton"), books, strict=True):
            with backends.use(name):
                block_bt, _, length_b = lead(some, tokens_bt[:, 1:], n_b)
                emit_(some, steps[name], block_bt, n_b, length_b)
    assert torch.equal(steps["torch"], steps["triton"])
    for mine, theirs in zip(*books, strict=True):
        # What is not kept goes to the last column, or nowhere.
        assert torch.equal(mine[..., :30], theirs[..., :30])
    assert 0 < int(books[0].alive_b.sum()) < 9


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_vector_that_counts_is_kept(backend: str, dtype: torch.dtype) -> None:
    """A part of wider buffers, with more numbers than a program copies."""
    last_bd = torch.zeros(5, 1500, device=DEVICE, dtype=dtype)[:4, :1300]
    x_btd = torch.randn(4, 3, 1400, device=DEVICE).to(dtype)[..., 50:1350]
    want_bd = torch.stack((last_bd[0], x_btd[1, 0], x_btd[2, 2], x_btd[3, 1]))
    with backends.use(backend):
        keep_last_(last_bd, x_btd, ints(0, 1, 3, 2))
    assert torch.equal(last_bd, want_bd)


@needs_triton
def test_what_is_kept_is_not_written_between_others() -> None:
    last_bd, x_btd, n_b = (
        torch.zeros(3, 2, device=DEVICE).T,
        torch.ones(2, 1, 3, device=DEVICE),
        torch.ones(2, device=DEVICE),
    )
    with backends.use("triton"), pytest.raises(ConfigError, match="last_bd: expected a last axis that lies side"):
        keep_last_(last_bd, x_btd, n_b.long())


@needs_triton
def test_operator_keeps_its_contract() -> None:
    from subquad.ops.slots import on_triton

    x_btd, n_b = torch.randn(2, 3, 5, device=DEVICE), torch.tensor([3, 0], device=DEVICE)
    torch.library.opcheck(on_triton._keep_last, (torch.zeros(2, 5, device=DEVICE), x_btd, n_b))
