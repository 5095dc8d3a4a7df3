"""Chosen heads stay, maps learn fast and what came from the teacher slowly, and nothing else moves."""

import dataclasses
import json

import pytest
import torch

from subquad.cli import main
from subquad.convert.best import RECIPE
from subquad.convert.transplant.placement import parse_options
from subquad.models.load import load_model

SMALL = ["--batch", "2", "--seq", "144", "--measure-tokens", "384", "--eval-tokens", "192", "--held-out", "0.2"]
SMALL += ["--tokens", "2k", "--stage", "align.tokens=288", "--no-compile"]


# The shares are named, and the recipe's is one of them.
CHOICE = {"heads": dict.fromkeys("0123", 2), "kept": {"0.25": {"1": [0, 1], "2": [1]}, "0.125": {"1": [0]}}}


@pytest.fixture
def heads(tmp_path):
    """A choice of heads, as `subquad inspect heads` writes it: all of layer 1, one of layer 2."""
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(CHOICE))
    return str(path)


@pytest.mark.parametrize("mixer", [[], ["--mixer", "windowed_linear"]])
def test_the_options_are_the_recipes_unless_told_otherwise(tiny_teacher, tiny_text, tmp_path, heads, capfd, mixer):
    out = tmp_path / "out"
    command = ["convert", tiny_teacher, "--out", str(out), "--recipe", "best", "--data", str(tiny_text), *SMALL, *mixer]
    # The window is longer than this teacher's text, and nothing can be measured beyond it.
    command += ["--heads", heads, "--set", "features=8", "--measure-tokens", "0"]
    assert main(command) == 0, capfd.readouterr().err
    options = parse_options(RECIPE.options, RECIPE.mixers)["windowed_linear"] | {"features": 8}
    layers = load_model(out).model.config.layers
    for layer in (layers[0], layers[2]["parts"][1], layers[3]):
        assert {name: layer[name] for name in options} == options


def test_heads_that_are_named_stay_attention_and_all_others_go(tiny_teacher, tiny_text, tmp_path, heads, capfd):
    out = tmp_path / "out"
    command = ["convert", tiny_teacher, "--out", str(out), "--recipe", "best", "--data", str(tiny_text), *SMALL]
    command += ["--set", "window=32", "--set", "features=8"]
    assert main([*command, "--heads", heads]) == 0, capfd.readouterr().err
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
        (["--keep", "0.5", "--heads", "HEADS"], "expected --keep 0.25, 0.125, got 0.5"),
        (
            ["--keep", "0.25", "--heads", "HEADS", "--layers", "1"],
            "expected one --mixer for the heads that go, and no --layers",
        ),
        (["--keep", "0.25", "--heads", "nowhere.json"], "expected what subquad inspect heads --json wrote"),
        (["--heads", "HEADS", "--stage", "distill.seq=300"], "expected sequences of at most the 288 tokens of a batch"),
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


def test_heads_chosen_for_another_model(tiny_teacher, tiny_text, tmp_path, capfd):
    path = tmp_path / "heads.json"
    command = ["convert", tiny_teacher, "--out", str(tmp_path / "out"), "--recipe", "best", "--data", str(tiny_text)]
    command += [*SMALL, "--heads", str(path), "--tokens", "0", "--set", "window=32"]

    def told(**content):
        path.write_text(json.dumps(CHOICE | content))
        assert main(command) == 2
        return capfd.readouterr().err

    for counts in (dict.fromkeys("01234", 2), dict.fromkeys("0123", 1)):
        total = sum(counts.values())
        message = f"expected a choice for 8 key/value heads in 4 attention layers, got one for {total} in {len(counts)}"
        assert message in told(heads=counts)
    # An older file says no more than the model's name.
    assert f"expected a choice for {tiny_teacher}, got one for other" in told(heads=None, settings={"model": "other"})
    path.write_text(json.dumps(CHOICE | {"settings": {"model": "other"}}))
    assert main(command) == 0
    assert f"heads.json was chosen for other, not for {tiny_teacher}" in capfd.readouterr().err
