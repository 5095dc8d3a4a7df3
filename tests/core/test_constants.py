"""What is made once is made once, and not where it could not be kept."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from subquad.core import constants as module
from subquad.core.constants import FEW, constant
from subquad.core.layout import Layout

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_made", {})


def test_what_is_made_once_is_the_same_afterwards() -> None:
    calls: list[int] = []

    def make() -> tuple[torch.Tensor, float]:
        calls.append(1)
        return torch.ones(2), 0.5

    first, again, other = (constant(key, CPU, make) for key in ("a", "a", "b"))
    assert first is again and first is not other and len(calls) == 2


def test_a_compiled_region_makes_its_own() -> None:
    def more(x: torch.Tensor) -> torch.Tensor:
        return x + constant("a", CPU, lambda: torch.ones(2))

    assert torch.compile(more, backend="eager", fullgraph=True)(torch.zeros(2)).tolist() == [1, 1]
    assert not module._made  # pyright: ignore[reportPrivateUsage]


def test_where_tensors_are_imagined_so_are_these() -> None:
    constant("a", CPU, lambda: torch.ones(2))
    with FakeTensorMode():
        assert isinstance(constant("a", CPU, lambda: torch.ones(2)), FakeTensor)
    assert constant("a", CPU, lambda: torch.zeros(2)).tolist() == [1, 1]


def test_no_tensor_of_a_kind_of_its_own_is_kept() -> None:
    constant("a", CPU, lambda: torch.nn.Parameter(torch.ones(2)))
    assert not module._made  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("n", [1, 3, FEW, FEW + 1])
def test_layouts_of_few_numbers_and_of_many_are_alike(n: int) -> None:
    start_b = torch.tensor([4, 7])
    for _ in range(2):
        steps = Layout.steps(start_b, n)
        assert [s.positions_bt[:, 0].tolist() for s in steps] == [[4 + i, 7 + i] for i in range(n)]
        assert all(s.lengths_b.tolist() == [1, 1] for s in steps)
        dense = Layout.dense(2, n, start_b=start_b)
        assert dense.positions_bt.tolist() == [list(range(s, s + n)) for s in (4, 7)]
        assert dense.lengths_b.tolist() == [n, n]
    one = Layout.dense(n, 1, start_b=torch.arange(n))
    assert one.lengths_b.tolist() == [1] * n and one.positions_bt[:, 0].tolist() == list(range(n))
