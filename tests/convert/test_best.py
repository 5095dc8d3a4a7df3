"""Chosen heads stay, maps learn fast and what came from the teacher slowly, and nothing else moves."""

import dataclasses
import json

import pytest
import torch

from subquad.cli import main
from subquad.convert.best import RECIPE
from subquad.models.load import load_model

SMALL = ["--batch", "2", "--seq", "144", "--measure-tokens", "384", "--eval-tokens", "192", "--held-out", "0.2"]
SMALL += ["--tokens", "2k", "--stage", "align.tokens=288", "--no-compile", "--set", "window=32"]
SMALL += ["--mixer", "windowed_linear", "--set", "features=8"]


@pytest.fixture
def heads(tmp_path):
    """A choice of heads, as `subquad inspect heads` writes it: all of layer 1, one of layer 2."""
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"kept": {"0.25": {"1": [0, 1], "2": [1]}}}))
    return str(path)


def test_heads_that_are_named_stay_attention_and_all_others_go(tiny_teacher, tiny_text, tmp_path, heads, capfd):
    out = tmp_path / "out"
    command = ["convert", tiny_teacher, "--out", str(out), "--recipe", "best", "--data", str(tiny_text), *SMALL]
    assert main([*command, "--keep", "0.25", "--heads", heads]) == 0, capfd.readouterr().err
    student, teacher = load_model(out).model, load_model(tiny_teacher).model
    kinds = [layer["mixer"] for layer in student.config.layers]
    assert kinds[1:3] == ["attention", "parallel"]
    assert {*kinds[:1], *kinds[3:]} == {"windowed_linear"}
    parts = student.config.layers[2]["parts"]
    assert [(part["mixer"], part["n_kv_heads"]) for part in parts] == [("attention", 1), ("windowed_linear", 1)]
    before = teacher.state_dict()
    for name, x in student.state_dict().items():
        if "mlp" in name or name.startswith(("embed", "lm_head")):
            assert torch.equal(x, before[name]), name
    assert not torch.equal(student.blocks[1].mixer.o_proj.weight, before["blocks.1.mixer.o_proj.weight"])
    assert not torch.equal(student.norm.weight, before["norm.weight"])


def test_maps_have_the_full_rate_and_copies_a_hundredth():
    distill = RECIPE.phases[-1]
    assert distill.new == ("*.k_map_*", "*.q_map_*")
    assert distill.rate.lr * distill.rate.old == pytest.approx(3e-5)
    assert dataclasses.asdict(RECIPE)["place"] == "chosen"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--keep", "0.25"],
            "this recipe's heads are chosen, expected --heads FILE, got none; make it with: subquad inspect",
        ),
        (["--keep", "0.5", "--heads", "HEADS"], "expected --keep 0.25, got 0.5"),
        (
            ["--keep", "0.25", "--heads", "HEADS", "--layers", "1"],
            "expected one --mixer for the heads that go, and no --layers",
        ),
        (["--keep", "0.25", "--heads", "nowhere.json"], "expected what subquad inspect heads --json wrote"),
    ],
)
def test_refusals(tiny_teacher, tiny_text, tmp_path, heads, capfd, more, message):
    command = [
        "convert",
        tiny_teacher,
        "--out",
        str(tmp_path / "out"),
        "--recipe",
        "best",
        "--data",
        str(tiny_text),
        *SMALL,
    ]
    assert main([*command, *(heads if word == "HEADS" else word for word in more)]) == 2
    assert message in capfd.readouterr().err
