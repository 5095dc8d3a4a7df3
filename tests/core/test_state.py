"""State: explicit, batch-first, a pytree, and the same after any journey."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from subquad.core import state as state_module
from subquad.core.errors import CheckpointError, ConfigError
from subquad.core.state import State, axes, precise


@dataclass(frozen=True)
class Inner(State):
    s_bhkv: Tensor = axes("b h k v", shard="h", precision="high")
    conv_btd: Tensor = axes("b t d")


@dataclass(frozen=True)
class Outer(State):
    layers: tuple[Inner, ...]
    seen_b: Tensor = axes("b", precision="index")


def inner(b: int = 3) -> Inner:
    return Inner(torch.randn(b, 2, 4, 5), torch.randn(b, 3, 6))


def outer(b: int = 3) -> Outer:
    return Outer((inner(b), inner(b)), torch.arange(b))


def leaves(state: State) -> list[Tensor]:
    return [t for _, t in state.tensors()]


def assert_equal(a: State, b: State) -> None:
    assert type(a) is type(b)
    assert [n for n, _ in a.tensors()] == [n for n, _ in b.tensors()]
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def test_names_batch_and_bytes():
    state = outer()
    assert [n for n, _ in state.tensors()] == [
        "layers.0.s_bhkv", "layers.0.conv_btd", "layers.1.s_bhkv", "layers.1.conv_btd", "seen_b",
    ]  # fmt: skip
    assert state.batch == 3
    assert state.nbytes == 2 * (3 * 40 * 4 + 3 * 18 * 4) + 3 * 8
    assert Outer((), torch.zeros(0)).batch == 0


def test_meta_tells_the_bytes_for_free():
    assert outer().to("meta").nbytes == outer().nbytes


def test_select_repeats_and_reorders():
    state = outer()
    picked = state.select(torch.tensor([2, 0, 2]))
    assert picked.seen_b.tolist() == [2, 0, 2]
    assert torch.equal(picked.layers[1].s_bhkv, state.layers[1].s_bhkv[[2, 0, 2]])


def test_fork_repeats_each_row_in_succession():
    assert outer(2).fork(3).seen_b.tolist() == [0, 0, 0, 1, 1, 1]


def test_snapshot_is_out_of_reach():
    state = outer()
    copy = state.snapshot()
    state.layers[0].s_bhkv.zero_()
    assert copy.layers[0].s_bhkv.abs().sum() > 0


def test_to_keeps_recurrent_states_precise_and_integers_whole():
    cast = outer().to(dtype=torch.bfloat16)
    assert [t.dtype for t in leaves(cast)] == [torch.float32, torch.bfloat16] * 2 + [torch.int64]
    assert [t.dtype for t in leaves(outer().to(dtype=torch.float64))] == [torch.float64] * 4 + [torch.int64]
    assert precise(torch.float16) == torch.float32


def test_write_touches_only_the_named_rows():
    pool, new = outer(4), outer(2)
    before = pool.snapshot()
    pool.write_(torch.tensor([3, 1]), new)
    assert_equal(pool.select(torch.tensor([3, 1])), new)
    assert_equal(pool.select(torch.tensor([0, 2])), before.select(torch.tensor([0, 2])))
    pool.write_(None, before)
    assert_equal(pool, before)


def test_write_casts_to_the_pool():
    pool = inner(2).to(dtype=torch.bfloat16)
    new = inner(1)
    pool.write_(torch.tensor([1]), new)
    assert torch.equal(pool.conv_btd[1:], new.conv_btd.to(torch.bfloat16))


def test_write_refuses_another_capacity():
    with pytest.raises(ConfigError, match=r"conv_btd: expected shape \(3, 6\)"):
        inner(2).write_(None, Inner(torch.randn(2, 2, 4, 5), torch.randn(2, 4, 6)))


def test_cat_is_the_inverse_of_select():
    state = outer()
    assert_equal(State.cat([state.select(torch.tensor([0])), state.select(torch.tensor([1, 2]))]), state)
    with pytest.raises(ConfigError, match="one kind"):
        State.cat([inner(), outer()])
    longer = Inner(torch.randn(1, 2, 4, 5), torch.randn(1, 4, 6))
    with pytest.raises(ConfigError, match=r"conv_btd: expected one shape a row, got \[\(3, 6\), \(4, 6\)\]"):
        State.cat([inner(), longer])
    with pytest.raises(ConfigError, match="got none"):
        State.cat([])


def test_is_a_pytree():
    doubled = pytree.tree_map(lambda t: t * 2, outer())
    assert isinstance(doubled, Outer)
    assert doubled.seen_b.tolist() == [0, 2, 4]


def test_save_and_load_bit_for_bit(tmp_path):
    state = outer().to(dtype=torch.bfloat16)
    state.save(tmp_path / "s.safetensors")
    assert_equal(State.load(tmp_path / "s.safetensors"), state)


def test_header_names_kind_and_schema(tmp_path):
    inner().save(tmp_path / "s.safetensors")
    with safe_open(str(tmp_path / "s.safetensors"), "pt") as f:
        header = json.loads(f.metadata()["subquad_state"])
    assert header["kind"].endswith(".Inner")
    assert header["schema"] == 1


def test_load_refuses_what_is_no_state(tmp_path):
    save_file({"a": torch.ones(1)}, str(tmp_path / "a.safetensors"))
    with pytest.raises(CheckpointError, match="another safetensors file"):
        State.load(tmp_path / "a.safetensors")


def test_load_refuses_what_is_absent_or_damaged(tmp_path):
    with pytest.raises(CheckpointError, match="expected a saved state, got .*save it again"):
        State.load(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="could not be written .*choose another folder"):
        inner().save(tmp_path / "nowhere" / "s.safetensors")
    inner().save(tmp_path / "s.safetensors")
    content = (tmp_path / "s.safetensors").read_bytes()
    (tmp_path / "s.safetensors").write_bytes(content[:-9])
    with pytest.raises(CheckpointError, match="expected a saved state, got .*save it again"):
        State.load(tmp_path / "s.safetensors")


def test_load_refuses_an_unknown_kind(tmp_path, monkeypatch):
    inner().save(tmp_path / "s.safetensors")
    monkeypatch.setattr(state_module, "_KINDS", {})
    with pytest.raises(CheckpointError, match="import the module"):
        State.load(tmp_path / "s.safetensors")


def test_an_older_schema_migrates_or_is_refused(tmp_path, monkeypatch):
    state = inner()
    state.save(tmp_path / "s.safetensors")
    monkeypatch.setattr(Inner, "schema", 2)
    with pytest.raises(CheckpointError, match="expected schema 2, got 1"):
        State.load(tmp_path / "s.safetensors")

    def migrate(cls, fields, schema):
        assert schema == 1
        return fields | {"conv_btd": fields["conv_btd"] * 2}

    monkeypatch.setattr(Inner, "migrate", classmethod(migrate))
    assert torch.equal(State.load(tmp_path / "s.safetensors").conv_btd, state.conv_btd * 2)


@pytest.mark.parametrize(
    "declare", [lambda: axes("h b"), lambda: axes("b h", shard="k"), lambda: axes("b", precision="low")]
)
def test_axes_guards_its_declaration(declare):
    with pytest.raises(AssertionError):
        declare()
