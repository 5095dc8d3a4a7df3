"""Which implementation runs: by device, by name, by refusal; and the checks that every launcher makes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from subquad.core.errors import ConfigError, UnsupportedError
from subquad.ops import backends, gdn, launch, ssd


class Fake:
    """An implementation that refuses what it is told to."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason

    def refusal(self, *_: torch.Tensor) -> str | None:
        return self.reason


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> backends.Backends:
    made = backends.Backends(ssd.__name__)
    backends._families.remove(made)
    monkeypatch.setattr(backends, "_families", [made])
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.setattr(backends, "PREFERRED", {"cpu": ("fast",)})
    found = backends._names
    monkeypatch.setattr(backends, "_names", lambda operation: [*found(operation), "fast"])
    made.names = backends._names("ssd")
    return made


def test_a_refusal_falls_back_and_is_said_once(family: backends.Backends) -> None:
    x = torch.zeros(2)
    assert family.choose(x) is family._loaded["torch"]
    family._loaded["fast"] = Fake(None)
    assert family.choose(x) is family._loaded["fast"]
    family._loaded["fast"] = Fake("it is too wide")
    with pytest.warns(UserWarning, match="ssd: it is too wide; PyTorch's form runs instead"):
        assert family.choose(x) is family._loaded["torch"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert family.choose(x) is family._loaded["torch"]


def test_a_named_backend_runs_or_refuses(family: backends.Backends) -> None:
    x = torch.zeros(2)
    family._loaded["fast"] = Fake(None)
    with backends.use("torch"):
        assert family.choose(x) is family._loaded["torch"]
        with backends.use("fast"):
            assert family.choose(x) is family._loaded["fast"]
        assert family.choose(x) is family._loaded["torch"]
    family._loaded["fast"] = Fake("it is too wide")
    with backends.use("fast"), pytest.raises(UnsupportedError, match="ssd on fast: it is too wide; leave"):
        family.choose(x)
    with pytest.raises(ConfigError, match="unknown backend 'trton'.*"), backends.use("trton"):
        pass


def test_shapes_are_compared_by_the_names_of_their_axes() -> None:
    x = torch.zeros(2, 5, 3, 4)
    assert launch.axes(q_bthk=x, v_bthv=x[..., :2], g_bth=x[..., 0], valid_bt=None) == {
        **{"b": 2, "t": 5, "k": 4, "v": 2, "h": 3}
    }
    with pytest.raises(ConfigError, match="g_bth: expected t=5 as in q_bthk, got 6"):
        launch.axes(q_bthk=x, g_bth=torch.zeros(2, 6, 3))
    with pytest.raises(ConfigError, match=r"g_bth: expected 3 axes, b t h, got shape \(2, 5\)"):
        launch.axes(g_bth=torch.zeros(2, 5))
    with pytest.raises(ConfigError, match="k_bthk: expected a number of heads that divides h=4, got 3"):
        launch.heads(4, k_bthk=x)


def test_operands_share_a_dtype_and_keep_their_strides() -> None:
    wide = torch.zeros(2, 5, 24)
    q, k = wide[..., :12].unflatten(-1, (3, 4)), wide[..., 12:].unflatten(-1, (3, 4)).bfloat16()
    got_q, got_k = launch.operands(q, k)
    assert got_q.data_ptr() == q.data_ptr()
    assert got_q.stride() == q.stride()
    assert got_k.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {x.dtype for x in launch.operands(q, k)} == {torch.bfloat16}
    assert launch.operands(q.mT)[0].stride(-1) == 1


def test_float32_products_follow_pytorchs_setting() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for setting, want in (("highest", "ieee"), ("high", "tf32x3"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert launch.precision(torch.float32) == want
            assert launch.precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_documents_are_counted_anew() -> None:
    """Whatever the numbers, the kernels see 0 for what continues the state, and one more at every change."""
    documents_bt = torch.tensor([[0, 0, 3, 3, 2**40], [2**32, 2**32, 2**33, 0, 7]])
    valid_bt = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    got = launch.documents(documents_bt.T.contiguous().T, valid_bt)
    assert got is not None and got.is_contiguous() and got.dtype == torch.int32
    assert got.tolist() == [[0, 0, 1, 1, 2], [1, 1, 2, 2, 2]]
    assert launch.documents(None, valid_bt) is None


def test_devices_are_compared_by_name() -> None:
    x = torch.zeros(2, 5)
    with pytest.raises(ConfigError, match="valid_bt: expected device cpu as of documents_bt, got meta"):
        launch.axes(documents_bt=x, valid_bt=x.to("meta"))


@pytest.mark.parametrize("op", [ssd, gdn])
def test_an_empty_block_gives_a_state_of_its_own(op: Any) -> None:
    q, g, state = torch.zeros(2, 0, 3, 4), torch.zeros(2, 0, 3), torch.randn(2, 3, 4, 4)
    y, end = op.scan(q, q, q, g, *((g,) if op is gdn else ()), state)
    assert y.shape == q.shape
    assert torch.equal(end, state) and end.data_ptr() != state.data_ptr()
