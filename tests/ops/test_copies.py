"""Copies from a text: against a search of all of it, and the kernels as PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subquad.ops import backends, copies

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not (torch.cuda.is_available() or backends.interpreted()), reason="needs Triton")
GAMMAS, K, CAPACITY, BUCKETS, STRETCH = (3, 1), 7, 70, 1 << 12, 2


def search(text: list[int]) -> tuple[list[int], int]:
    """The K tokens behind the last run like the text's last, by looking at all of it, and how many have a ground."""
    for gamma in GAMMAS:
        ends = (end for end in range(len(text) - 1, gamma - 1, -1) if text[end - gamma : end] == text[-gamma:])
        if len(text) >= gamma and (end := next(ends, None)) is not None:
            alike = next((i for i in range(end) if text[end - 1 - i] != text[-1 - i]), end)
            return [text[end + i % (len(text) - end)] for i in range(K)], min(STRETCH * alike, K)
    return [], 0


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_finds_what_a_search_of_the_text_finds(backend: str) -> None:
    generator, rows = torch.Generator().manual_seed(1), 4
    tokens_bn, length_b = torch.zeros(rows, CAPACITY + 2, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    table_gbm = torch.full((len(GAMMAS), rows, BUCKETS + 1), -1, dtype=torch.int64)
    state: tuple[Tensor, ...] = tuple(x.to(DEVICE) for x in (tokens_bn, length_b, table_gbm))
    texts: list[list[int]] = [[] for _ in range(rows)]
    found, grounds = 0, set[int]()
    for _ in range(11):
        # Few tokens, some of them large, so that much repeats.
        new_bt = torch.randint(0, 4, (rows, 6), generator=generator) * 16_411
        n_b = torch.randint(0, 7, (rows,), generator=generator)
        with backends.use(backend):
            copies.enter_(state[0], state[1], state[2], GAMMAS, new_bt.to(DEVICE), n_b.to(DEVICE))
            tokens_bk, count_b, grounded_b = copies.find(state[0], state[1], state[2], GAMMAS, K, STRETCH)
        for row, text in enumerate(texts):
            text += new_bt[row, : n_b[row]].tolist()
            want, grounded = search(text)
            assert count_b[row] == len(want)
            assert tokens_bk[row, : len(want)].tolist() == want
            assert grounded_b[row] == grounded
            found += bool(want)
            grounds.add(grounded)
    assert found > 20
    assert grounds == {0, *range(STRETCH, K, STRETCH), K}
    assert state[1].tolist() == [len(text) for text in texts]
