from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from subquad.evals import memo
from subquad.evals.memo import Memo, digest, fingerprint
from subquad.models.teachers import LoadedModel


@dataclass(frozen=True)
class Kept:
    name: str
    values_n: Tensor
    texts: tuple[str, ...]


def never():
    raise AssertionError("measured again")


def same(a, b):
    return (a.name, a.texts) == (b.name, b.texts) and torch.equal(a.values_n, b.values_n)


def test_a_figure_is_measured_once(tmp_path):
    first = Kept("a", torch.tensor([0.1, torch.pi], dtype=torch.float64), ("x", "y"))
    assert Memo(tmp_path / "deep").get(Kept, "k", lambda: first) is first
    assert same(Memo(tmp_path / "deep").get(Kept, "k", never), first)
    other = Kept("b", torch.tensor([1, 2]), ())
    assert same(Memo(tmp_path / "deep").get(Kept, "l", lambda: other), other)


@pytest.mark.parametrize("damage", [b"", b"not a figure", None])
def test_a_damaged_file_is_measured_again(tmp_path, damage):
    kept, memo = Kept("a", torch.ones(2), ()), Memo(tmp_path)
    memo.get(Kept, "k", lambda: kept)
    whole = (tmp_path / "k.pt").read_bytes()
    (tmp_path / "k.pt").write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert memo.get(Kept, "k", lambda: kept) is kept
    assert same(memo.get(Kept, "k", never), kept)
    torch.save({"name": "fields of another time"}, tmp_path / "k.pt")
    assert memo.get(Kept, "k", lambda: kept) is kept


def test_a_folder_that_can_not_be_written_costs_no_figure(tmp_path):
    (tmp_path / "file").write_text("")
    kept = Kept("a", torch.ones(2), ())
    with pytest.warns(UserWarning, match="not kept for the next run"):
        assert Memo(tmp_path / "file").get(Kept, "k", lambda: kept) is kept


def test_digests_tell_everything_apart():
    x = torch.arange(6)
    parts = [
        (x,),
        (x.view(2, 3),),
        (x.int(),),
        (x + 1,),
        ("x",),
        (x, "x"),
        ("x", x),
        (),
        (("x", 1),),
        ("x", 1),
        (1.0,),
        (1,),
    ]
    assert len({digest(*part) for part in parts}) == len(parts)
    assert digest(x.view(2, 3).T) == digest(x.view(2, 3).T.contiguous())
    assert digest(x.bfloat16(), torch.tensor(1.0)) == digest(x.bfloat16(), torch.tensor(1.0))


def test_fingerprints_change_with_what_a_figure_depends_on(make_model, tokenizer, monkeypatch):
    def prints(model, words=tokenizer):
        return fingerprint(LoadedModel(model, words, "m", "m"))

    plain = prints(make_model(60, {}))
    assert prints(make_model(60, {})) == plain
    touched = make_model(60, {})
    with torch.no_grad():
        touched.norm.weight[3] += 1e-9
    found = {plain, prints(touched), prints(make_model(60, {"window": 8})), prints(make_model(60, {}).float())}
    assert len(found) == 4
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", None)
        assert prints(make_model(60, {})) != plain
    monkeypatch.setattr(memo, "source", lambda: "other code")
    assert prints(make_model(60, {})) != plain
