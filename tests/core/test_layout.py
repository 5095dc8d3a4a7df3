"""Where tokens stand: every way to build a layout, and every way to cut one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout

DOCUMENTS = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3)


def test_positions_behind_a_counter_are_made_when_asked_for_and_once() -> None:
    seen_b = torch.tensor([4, 7])
    layout = Layout.ragged(torch.tensor([3, 1]), 3, start_b=seen_b)
    assert layout.starts_bn.data_ptr() == seen_b.data_ptr() and layout.shape == (2, 3)
    for _ in range(2):
        assert layout.positions_bt.tolist() == [[4, 5, 6], [7, 8, 9]]
        seen_b.add_(1)


def test_dense_starts_where_told():
    layout = Layout.dense(2, 3, start_b=torch.tensor([5, 0]))
    assert layout.shape == (2, 3)
    assert layout.positions_bt.tolist() == [[5, 6, 7], [0, 1, 2]]
    assert layout.lengths_b.tolist() == [3, 3]
    assert layout.valid_bt.all()
    assert not layout.padded
    assert Layout.dense(2, 3, start_b=4).positions_bt.tolist() == [[4, 5, 6]] * 2


def test_what_layers_share_is_made_once():
    made = []
    layout, other = Layout.dense(1, 2), Layout.dense(1, 2)
    for where, key in ((layout, "a"), (layout, "a"), (layout, "b"), (other, "a")):
        assert where.once(key, lambda key=key: made.append(key) or [key]) == [key]
    assert made == ["a", "b", "a"]
    assert layout.once("a", list) is layout.once("a", list)


def test_ragged_marks_the_padding():
    layout = Layout.ragged(torch.tensor([0, 2, 3]), 3, start_b=4)
    assert layout.valid_bt.tolist() == [[False] * 3, [True, True, False], [True] * 3]
    assert layout.positions_bt[1].tolist() == [4, 5, 6]
    assert layout.padded


def test_packed_counts_documents_and_restarts_positions():
    layout = Layout.packed([[2, 3], [4]])
    assert layout.positions_bt.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]
    assert layout.documents_bt.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert layout.lengths_b.tolist() == [5, 4]
    assert layout.padded
    assert not Layout.packed([[2, 3], [5]]).padded


def test_packed_refuses_an_empty_document():
    with pytest.raises(ConfigError, match="at least 1"):
        Layout.packed([[2, 0]])


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_from_mask_gathers_the_tokens_to_the_left(side):
    x = {"left": [[0, 0, 7, 8], [5, 6, 7, 8]], "right": [[7, 8, 0, 0], [5, 6, 7, 8]]}.get(side, [[0, 7, 8, 0]])
    x_bt = torch.tensor(x)
    layout, columns_bt = Layout.from_mask((x_bt != 0).long())
    rows = x_bt.gather(1, columns_bt)
    for i, n in enumerate(layout.lengths_b.tolist()):
        assert rows[i, :n].tolist() == [v for v in x[i] if v]
        assert layout.positions_bt[i, :n].tolist() == list(range(n))


def test_from_mask_takes_an_empty_row_and_refuses_a_hole():
    assert Layout.from_mask(torch.zeros(1, 3))[0].lengths_b.tolist() == [0]
    with pytest.raises(ConfigError, match="got a hole"):
        Layout.from_mask(torch.tensor([[1, 0, 1]]))


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.data())
def test_narrow_keeps_positions_and_document_borders(lengths, data):
    """A cut anywhere: tokens keep their positions, and "starts from an empty state" falls on the same tokens."""
    layout = Layout.packed(lengths)
    b, t = layout.shape
    start = data.draw(st.integers(0, t))
    stop = data.draw(st.integers(start, t))
    part = layout.narrow(start, stop)
    assert part.shape == (b, stop - start)
    assert torch.equal(part.valid_bt, layout.valid_bt[:, start:stop])
    assert torch.equal(part.positions_bt, layout.positions_bt[:, start:stop])

    def fresh(documents_bt, before_b1):
        return torch.diff(documents_bt, dim=1, prepend=before_b1) != 0

    zeros_b1 = torch.zeros(b, 1, dtype=torch.int64)
    whole = fresh(layout.documents_bt, zeros_b1)[:, start:stop] & part.valid_bt
    assert torch.equal(fresh(part.documents_bt, zeros_b1) & part.valid_bt, whole)


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.data())
def test_index_and_tail_agree_with_counting(lengths, data):
    layout = Layout.packed(lengths)
    seen = [data.draw(st.integers(0, 9)) for _ in lengths]
    keep = [data.draw(st.integers(0, sum(row))) for row in lengths]
    index_bt = layout.index_bt(torch.tensor(seen))
    kept_bt, continues_b = layout.tail(torch.tensor(keep))
    for i, row in enumerate(lengths):
        document = [j for j, n in enumerate(row) for _ in range(n)]
        for column, j in enumerate(document):
            before = sum(d == j for d in document[:column]) + (seen[i] if j == 0 else 0)
            assert index_bt[i, column] == before
        last = document[keep[i] - 1] if keep[i] else 0
        expected = [c < keep[i] and document[c] == last for c in range(len(document))]
        assert kept_bt[i, : len(document)].tolist() == expected
        assert not kept_bt[i, len(document) :].any()
        assert continues_b[i] == (last == 0)


def test_index_and_tail_of_one_document():
    layout = Layout.ragged(torch.tensor([3, 1]), 3)
    assert layout.index_bt(torch.tensor([0, 7])).tolist() == [[0, 1, 2], [7, 8, 9]]
    kept_bt, continues_b = layout.tail(torch.tensor([2, 0]))
    assert kept_bt.tolist() == [[True, True, False], [False] * 3]
    assert continues_b.all()
