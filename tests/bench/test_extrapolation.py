"""Models measured beyond their training's length: on the same bytes at every length, and resumed."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from subquad.bench import extrapolation
from subquad.bench.extrapolation import Plan, run, windows
from subquad.bench.results import load_result
from subquad.core.errors import ConfigError, DataError

CPU = torch.device("cpu")
# Fewer than are measured, which takes a fraction of the time.
TIMES = (0.5, 1, 2)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.setattr(extrapolation, "TIMES", TIMES)
    rng = torch.Generator().manual_seed(0)
    books = [bytes(torch.randint(97, 123, (8000,), generator=rng).tolist()).decode() for _ in range(2)]
    (tmp_path / "books.jsonl").write_text("".join(json.dumps({"text": book}) + "\n" for book in books))
    spec = str(tmp_path / "books.jsonl")
    return Plan(
        spec, spec, minutes=1e-5, passkey_minutes=1e-5, d_model=8, layers=1, length=448, rows=1, digits=1, windows=1,
        questions=1,
    )  # fmt: skip


def test_a_run_measures_every_length_and_is_taken_up_again(plan, tmp_path):
    path = run(plan, tmp_path / "runs", tmp_path / "out", CPU, "once")
    rows = {row.id: row for row in load_result(path).rows}
    for what in ("ppl", "ppl_mean", "passkey"):
        for times in TIMES:
            assert rows[f"memmamba.{what}.x{times:g}"].baseline == "mamba1"
        assert path.with_suffix(f".{what}.svg").exists()
    assert 0 <= rows["memmamba.taken.layer0"].value <= 1
    again = load_result(run(plan, tmp_path / "runs", tmp_path / "out", CPU, "twice"))
    assert again.command == "twice" and again.rows == list(rows.values())
    with pytest.raises(ConfigError, match="d_model"):
        run(dataclasses.replace(plan, d_model=16), tmp_path / "runs", tmp_path / "out", CPU, "other")


def test_the_last_bytes_are_the_same_at_every_length(plan, tmp_path):
    # Without a layer nothing is seen of what came before, so only other bytes could change the figure.
    blind = dataclasses.replace(plan, layers=0)
    rows = load_result(run(blind, tmp_path / "runs", tmp_path / "out", CPU, "blind")).rows
    values = {what: [row.value for row in rows if f".{what}.x" in row.id] for what in ("ppl", "ppl_mean")}
    assert values["ppl"] == pytest.approx([values["ppl"][0]] * len(TIMES), rel=1e-5)
    assert max(values["ppl_mean"]) > min(values["ppl_mean"]) * (1 + 1e-4)


def test_layers_read_those_below_as_far_as_there_are_any(plan):
    deep = dataclasses.replace(plan, layers=4, below=2)
    books = extrapolation.Characters(extrapolation.Characters.Config(plan.train, plan.length))
    ours, theirs = (deep.settings(name, books, "characters", 1.0).layers for name in ("memmamba", "mamba1"))
    assert [layer["below"] for layer in ours] == [0, 1, 2, 2] and all("below" not in layer for layer in theirs)
    plain = plan.settings("memmamba", books, "characters", 1.0).layers
    assert all("below" not in layer for layer in plain)  # so that trainings of before are taken up


def test_windows_stay_in_one_document():
    documents = [bytes([i]) * size for i, size in ((1, 100), (2, 30), (3, 90))]
    found = windows(documents, 50, 9, 10)
    assert found.shape == (9, 50) and bool((found == found[:, :1]).all())
    assert set(found[:, 0].tolist()) == {1, 3}
    with pytest.raises(DataError, match="fewer windows"):
        windows(documents, 50, 10, 10)
