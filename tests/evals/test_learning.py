"""Training on tasks: what can learn does, what can't stays at chance, and a run goes on where it stopped."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest
import torch

from subquad import cli
from subquad.core.errors import ConfigError
from subquad.core.registry import methods
from subquad.evals.learning import load_task
from subquad.evals.learning.batches import Batches
from subquad.evals.learning.model import Learner, checked, layers_of
from subquad.evals.learning.stage import TaskStage, answers
from subquad.evals.learning.task import IGNORE, Batch
from subquad.evals.learning.training import Settings, accuracy_of, learn
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import StoppedError

SIZES = ["length=8", "vocab=6"]
# Parts, and the order of what was distilled, follow from no width.
LACKING = {"parallel", "laughing_hyena"}


def settings(layers=1, steps=80, mixers=("gla",), options=None, **other):
    task = load_task("recall", SIZES)
    made = layers_of(mixers, layers, 32, options or {"gla": {"conv_width": 2, "gate_rank": 4}}, task)
    values = {"d_model": 32, "batch": 32, "lr": 1e-2, "held_out": 400, **other}
    return task, Settings("recall", {"length": 8, "vocab": 6}, made, steps=steps, **values)


def test_a_layer_learns_to_recall_and_none_stays_at_chance(tmp_path):
    task, with_layer = settings()
    learned = learn(with_layer, task, RunFolder(tmp_path / "one"))
    assert learned.accuracy.low > 0.9 and learned.loss < 0.3
    assert learned.course[0][0] == 0 and learned.course[0][2] < 0.7
    # One of two values, whatever came before.
    assert 0.5 <= learned.commonest < 0.6
    task, without = settings(layers=0, steps=40)
    blind = learn(without, task, RunFolder(tmp_path / "none"))
    assert blind.accuracy.low < 0.5 < blind.accuracy.high + 0.05
    assert blind.loss > 0.6


def test_the_rate_rises_for_the_share_that_is_asked_for(tmp_path):
    task, of = settings(layers=0, steps=20, warmup=0.5)
    learn(of, task, RunFolder(tmp_path))
    rates = [line["lr"] for line in RunFolder(tmp_path).lines()]
    assert rates[:10] == pytest.approx([1e-2 * i / 10 for i in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[-1] < 1e-3


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    task, of = settings(steps=24)
    whole = learn(of, task, RunFolder(tmp_path / "whole"))

    def stop(progress):
        if progress.step == 9:
            signal.raise_signal(signal.SIGTERM)

    so_far = []
    with pytest.raises(StoppedError):
        learn(of, task, RunFolder(tmp_path / "cut"), display=stop, stopped=so_far.append)
    assert so_far[0].steps == 10 and so_far[0].rows == whole.rows
    with pytest.raises(ConfigError, match="holds a run already"):
        learn(of, task, RunFolder(tmp_path / "cut"))
    with pytest.raises(ConfigError, match="steps 24 .now 25."):
        learn(settings(steps=25)[1], task, RunFolder(tmp_path / "cut"), resume=True)
    again = learn(of, task, RunFolder(tmp_path / "cut"), resume=True)
    assert (again.accuracy, again.loss) == (whole.accuracy, whole.loss)
    assert [(n, share) for n, _, share in again.course] == [(n, share) for n, _, share in whole.course]
    one, two = (RunFolder(tmp_path / name) for name in ("whole", "cut"))
    assert [line["loss"] for line in one.lines()] == [line["loss"] for line in two.lines()]
    weights = [folder.load()["weights"] for folder in (one, two)]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
    # What is finished is read.
    assert learn(of, task, two, resume=True) == again


def test_a_run_begins_with_what_another_learned(tmp_path):
    """At its first step it is where the other ended, with a rate and a course of its own."""
    task, first = settings(steps=20)
    learn(first, task, RunFolder(tmp_path / "first"))
    where = str(tmp_path / "first")
    weights = RunFolder(tmp_path / "first").load()["weights"]

    # A step at no rate to speak of.
    second = replace(first, start=where, lr=1e-30, steps=1)
    learn(second, task, RunFolder(tmp_path / "second"))
    after = RunFolder(tmp_path / "second").load()["weights"]
    torch.testing.assert_close(after, weights, rtol=1e-6, atol=1e-12)
    with pytest.raises(ConfigError, match="expected the weights of a model like this one, got others for"):
        learn(replace(second, d_model=first.d_model * 2), task, RunFolder(tmp_path / "wider"))


def test_batches_made_ahead_are_the_same():
    task = load_task("recall", SIZES)
    ahead, here = Batches(task, 3, 4, workers=1), Batches(task, 3, 4)
    try:
        for step in (0, 1, 2):
            assert torch.equal(ahead(step).inputs, here(step).inputs)
    finally:
        ahead.close()


def test_rows_drawn_once_come_again_every_epoch():
    task = load_task("listops", ["short"])
    few = Batches(task, 3, 4, total=6)
    seen = [few(step) for step in range(3)]
    assert [len(batch) for batch in seen] == [4, 4, 4]
    rows = [tuple(row[:n].tolist()) for b in seen for row, n in zip(b.inputs, b.lengths_b, strict=True)]
    assert sorted(rows[:6]) == sorted(rows[6:]) and len(set(rows)) == 6
    assert torch.equal(seen[1].inputs, few(1).inputs)
    drawn = task.batch("train", 3, 0, 6)
    assert {tuple(row[:n].tolist()) for row, n in zip(drawn.inputs, drawn.lengths_b, strict=True)} == set(rows)


def test_rows_in_parts_give_the_gradients_of_the_whole(tmp_path):
    task = load_task("listops", ["short"])
    gradients = []
    for halvings in (0, 2):
        torch.manual_seed(0)
        model = Learner(task, layers_of(["gla"], 1, 16, {}, task), 16).double()
        stage = TaskStage(task, model, Batches(task, 0, 8))
        for _ in range(halvings):
            stage.fewer_rows()
        figures = stage.step()
        gradients.append([p.grad for p in model.parameters()])
        assert set(figures) == {"loss", "accuracy", "held_out"}
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_padding_does_not_reach_a_row():
    """A class is that of the row alone, whatever stands behind its end."""
    task = load_task("listops", ["short"])
    torch.manual_seed(0)
    model = Learner(task, layers_of(["attention", "gla"], 2, 16, {}, task), 16).double()
    batch = task.batch("train", 0, 0, 4)
    other = Batch(batch.inputs.clone(), batch.targets, batch.lengths_b)
    for row, n in zip(other.inputs, batch.lengths_b.tolist(), strict=True):
        row[n:] = 7
    torch.testing.assert_close(model(batch), model(other))
    alone = torch.cat([model(batch.rows(i, i + 1)) for i in range(4)])
    torch.testing.assert_close(model(batch), alone)


def test_values_enter_by_a_linear_layer():
    task = load_task("pathfinder", ["32"])
    model = Learner(task, (), 8)
    batch = Batch(torch.randn(2, 5, 1), torch.zeros(2, dtype=torch.int64), torch.tensor([5, 3]))
    assert model(batch).shape == (2, 2)


def test_answers_are_counted_where_they_are_asked_for():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [5.0, 0.0]]])
    loss, right = answers(logits, torch.tensor([[0, 0, IGNORE]]))
    assert right.tolist() == [[True, False, False]]
    torch.testing.assert_close(loss, torch.tensor([[0.126928, 1.313262, 0.0]]), rtol=1e-4, atol=1e-6)


def test_an_interval_is_over_rows():
    one = torch.ones(100, dtype=torch.int64)
    assert accuracy_of(one, one).low < 0.97 and accuracy_of(one, one).high == 1
    # Rows that are right as a whole or not at all tell as much as so many single answers.
    rows = torch.arange(100) % 2
    single, many = accuracy_of(rows, one), accuracy_of(16 * rows, 16 * one)
    assert many.value == single.value == 0.5
    assert abs((many.high - many.low) - (single.high - single.low)) < 0.02


@pytest.mark.parametrize("slug", sorted(methods("mixers").keys() - LACKING))
def test_every_mixer_is_built_for_a_width_alone(slug):
    task = load_task("recall")
    model = Learner(task, layers_of([slug], 1, 32, {}, task), 32)
    if methods("mixers")[slug].causal:
        assert model(task.batch("train", 0, 0, 2)).shape == (2, 22, 10)


@pytest.mark.parametrize("slug", sorted(methods("mixers").keys() & LACKING))
def test_or_else_it_says_what_it_lacks(slug):
    with pytest.raises(ConfigError, match=f"which no default fits; give --set {slug}"):
        layers_of([slug], 1, 32, {}, load_task("recall"))


def test_layers_take_turns_and_options_are_their_own():
    layers = layers_of(["gla", "attention"], 3, 64, {"gla": {"key_dim": 8}}, load_task("recall"))
    assert [layer["mixer"] for layer in layers] == ["gla", "attention", "gla"]
    assert layers[0] == {"mixer": "gla", "n_heads": 2, "key_dim": 8, "value_dim": 32}
    assert layers[1]["rotary"] == {"theta": 10000.0, "dim": 32}


def test_a_mixer_that_looks_ahead_serves_classes_only(monkeypatch):
    import dataclasses

    from subquad.evals.learning import model

    cards = methods("mixers") | {"gla": dataclasses.replace(methods("mixers")["gla"], causal=False)}
    monkeypatch.setattr(model, "methods", lambda _: cards)
    assert checked(["gla", "gla"], load_task("listops")) == ["gla"]
    with pytest.raises(ConfigError, match="expected a causal mixer"):
        checked(["gla"], load_task("recall"))


def test_a_filter_is_as_long_as_a_row_and_no_option_looks_ahead(monkeypatch):
    from dataclasses import dataclass

    from subquad.evals.learning import model

    class Long:
        @dataclass(frozen=True)
        class Config:
            d_model: int
            max_len: int
            bidirectional: bool = False

    monkeypatch.setattr(model, "load", lambda *_: Long)
    ahead = {"long": {"bidirectional": True}}
    assert layers_of(["long"], 1, 8, {}, load_task("recall")) == ({"mixer": "long", "max_len": 22},)
    assert layers_of(["long"], 1, 8, ahead, load_task("pathfinder"))[0] == {
        "mixer": "long",
        "max_len": 1024,
        "bidirectional": True,
    }
    with pytest.raises(ConfigError, match="long.bidirectional=true: expected false"):
        layers_of(["long"], 1, 8, ahead, load_task("recall"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["recal"], "unknown task 'recal'; did you mean 'recall'?"),
        (["recall"], "expected --mixer and --out with a task"),
        (["recall", "--mixer", "gl"], "--mixer: unknown mixer 'gl'; did you mean 'gla'?"),
        (["recall", "--mixer", "gla", "--steps", "0"], "--steps: expected more than 0, got 0"),
        (["recall", "--mixer", "gla", "--minutes", "0"], "--minutes: expected more than 0, got 0"),
        (["recall", "--mixer", "gla", "--lr", "0"], "expected lr > 0"),
        (["recall", "--mixer", "gla", "--warmup", "2"], "expected lr > 0 and warmup in 0..1, got 0.001 and 2.0"),
        (["recall", "--mixer", "parallel"], "mixer parallel: expected parts, which no default fits"),
        (["recall", "--mixer", "gla,gla,attention"], "--layers: expected at least 3"),
        (["recall", "--mixer", "gla", "--mixer", "gla"], "--mixer: expected each one once"),
        (["recall", "--mixer", "gla", "--set", "key_dm=4"], "--set key_dm=4: unknown option 'key_dm'; did you mean"),
        (
            ["recall", "--mixer", "gla", "--start", "nowhere"],
            "--start: expected a run in nowhere/gla, got no checkpoint",
        ),
        (["recall", "--mixer", "gla", "--size", "h33"], "--size: unknown 'h33'; did you mean 'h3'?"),
        (["recall", "--mixer", "gla", "--size", "lenth=4"], "--size lenth=4: unknown option 'lenth'; did you mean"),
        (["recall", "--mixer", "gla", "--size", "length=5"], "recall: expected an even length from 2, got 5"),
        (["listops", "--mixer", "gla", "--size", "longer=9999999999"], "listops: expected depth and arguments"),
        (["pathfinder", "--mixer", "gla", "--size", "side=20"], "pathfinder: expected a side above 4 apart"),
        (["digits", "--mixer", "gla", "--size", "path=/nowhere"], "/nowhere/train-images-idx3-ubyte: expected this"),
        (["characters", "--mixer", "gla", "--size", "text=nowhere.txt"], "nowhere.txt: expected a file of text"),
        (["characters", "--mixer", "gla", "--size", "length=1000000"], "pydoc: expected a text whose tenth holds"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_done(args, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["tasks", *args, *(["--out", str(out)] if len(args) > 1 else [])]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not out.exists()


def test_the_list_needs_no_torch():
    import subprocess
    import sys

    code = "import sys\nfrom subquad.cli import main\nassert main(['tasks']) == 0\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pathfinder" in done.stdout and "2011.04006" in done.stdout


def test_the_command_leaves_a_table_and_a_chart(tmp_path, capsys, monkeypatch):
    small = ["--d-model", "16", "--batch", "8", "--steps", "3", "--held-out", "50", "--layers", "2"]
    size = ["--size", "length=8", "--size", "vocab=6"]
    mixers = ["--mixer", "gla", "--mixer", "gla,attention"]
    args = ["tasks", "recall", *mixers, *size, *small, "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["subquad", *args])
    assert cli.main([*args, "--json", str(tmp_path / "tasks.json")]) == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert json.loads((tmp_path / "tasks.json").read_text())["rows"] == result["rows"]
    rows = {row["id"]: row for row in result["rows"]}
    assert {"tasks.recall.gla", "tasks.recall.gla.step0", "tasks.recall.gla+attention"} <= set(rows)
    final = rows["tasks.recall.gla+attention"]
    assert final["interval"][0] <= final["value"] <= final["interval"][1]
    assert [layer["mixer"] for layer in final["shape"]["layers"]] == ["gla", "attention"]
    picture = (tmp_path / "out/result.accuracy.svg").read_text()
    assert "gla+attention" in picture and "commonest" in picture
    assert "minutes" in (tmp_path / "out/result.accuracy_over_minutes.svg").read_text()
    printed = capsys.readouterr().out
    assert "gla+attention" in printed and "step0" not in printed
    assert cli.main(args) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert cli.main([*args, "--resume"]) == 0
    assert json.loads((tmp_path / "out/result.json").read_text())["rows"] == result["rows"]
