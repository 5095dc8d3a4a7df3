"""Rooms that decode many rows: the best number of them, a whole generation, shapes of one size; and one that trains."""

from __future__ import annotations

import json
import lzma
from typing import Any

import pytest
import torch

from subquad.bench import generating, shapes
from subquad.bench.convert import laughing_hyena
from subquad.bench.engine import s4
from subquad.bench.harness import Bench
from subquad.train.loop import Loop, StoppedError


def measured(rows: int, seconds: float) -> generating.Measured:
    return generating.Measured(rows, [seconds], 0, 0)


@pytest.mark.parametrize(("most", "fits", "want"), [(40, 40, 40), (300, 300, 256), (300, 250, 224), (4000, 4000, 256)])
def test_rows_are_doubled_while_that_gains_and_fits(
    monkeypatch: pytest.MonkeyPatch, most: int, fits: int, want: int
) -> None:
    # The device is full at 256 rows.
    def measure(bench: Any, model: Any, rows: int, context: int, parts: Any) -> Any:
        return None if rows > fits else {"": measured(rows, max(1.0, rows / 256))}

    monkeypatch.setattr(generating, "fitting", lambda bench, model, room: most)
    monkeypatch.setattr(generating, "measure", measure)
    model: Any = None
    assert generating.best(Bench("some"), "it", model, 100, 200).rows == want


def test_a_generation_takes_the_mean_of_its_looks() -> None:
    looks = tuple(measured(8, seconds) for seconds in (1.0, 2.0, 3.0, 2.0))
    assert generating.Generation(8, looks).rate == 4.0


@torch.no_grad()
def test_a_generation_is_looked_at_on_its_way() -> None:
    bench = Bench("some", smoke=True)
    whole = generating.generation(bench, shapes.shape_8b(bench, 1), 2, 16, 64)
    assert whole is not None and len(whole.looks) == 4
    bytes_of = [look.state_bytes for look in whole.looks]
    assert bytes_of == sorted(set(bytes_of))


def test_both_models_are_of_one_size() -> None:
    configs = s4.models(768, 12, 64, 50304, 4096)
    ours, theirs = (s4.parameters(configs[name]) for name in ("s4", "transformer"))
    assert theirs == 123_587_328 and abs(ours / theirs - 1) < 1e-3


def test_training_goes_on_where_it_was_cut(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, n in (("train", 60), ("valid", 40)):
        with lzma.open(tmp_path / f"{name}.jsonl.xz", "wt") as file:
            file.write(json.dumps({"text": "to be or not to be " * n}))
    made = Loop.step

    def stopped(loop: Loop) -> None:
        made(loop)
        if loop.steps == 2 and not cut:
            cut.append(loop.steps)
            loop.save()
            raise StoppedError("cut")

    cut: list[int] = []
    monkeypatch.setattr(Loop, "step", stopped)
    said: list[str] = []
    for _ in range(2):
        bench = Bench("some", smoke=True, data=tmp_path, work=tmp_path / "run", say=said.append)
        if not cut:
            with pytest.raises(StoppedError, match="same command again"):
                laughing_hyena.run(bench)
            continue
        laughing_hyena.run(bench)
        assert [row.id for row in bench.rows] == ["laughing_hyena.ppl_ratio.order8"]
        assert bench.rows[0].shape["text"] == tmp_path.name
    assert [line["step"] for line in map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines())] == [
        1,
        2,
        3,
    ]
