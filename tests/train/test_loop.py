"""The loop: killed runs, saves in the background, steps that don't fit into memory, rates and cost."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from subquad.core.errors import CheckpointError, ConfigError
from subquad.train import checkpoint as checkpoints
from subquad.train import loop as loops
from subquad.train.checkpoint import RunFolder
from subquad.train.display import describe
from subquad.train.loop import Budget, Habits, Loop, Progress, Stage, StoppedError
from subquad.train.optimiser import Rate, adamw, slow

STEPS, BATCH = 40, 8


class Line(Stage):
    """Fits a line to numbers that depend on the step alone; more rows at once than `fits` are too many."""

    name = "line"

    def __init__(self, fits=BATCH, pause=0.0):
        self.weight = torch.nn.Parameter(torch.zeros(3, 1, dtype=torch.float64))
        self.device, self.tokens_per_step = torch.device("cpu"), BATCH
        self.new, self.old, self.clipped = [self.weight], [], [[self.weight]]
        self.at, self.rows, self.fits, self.pause = 0, BATCH, fits, pause

    def step(self):
        self.at += 1
        x = torch.randn(BATCH, 4, generator=torch.Generator().manual_seed(self.at), dtype=torch.float64)
        total = 0
        for part in x.split(self.rows):
            loss = (part[:, :3] @ self.weight - part[:, 3:]).square().sum() / BATCH
            loss.backward()
            total = total + loss.detach()
            if len(part) > self.fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore words")
        time.sleep(self.pause)
        return {"loss": total}

    def fewer_rows(self):
        if self.rows == 1:
            return None
        self.rows //= 2
        return self.rows

    def weights(self):
        return {"weight": self.weight.data}

    def load_weights(self, weights):
        self.weight.data.copy_(weights["weight"])

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def loop(folder, stage=None, steps=STEPS, **options):
    return Loop(stage or Line(), Budget(steps * BATCH), Rate(lr=0.1), RunFolder(folder), **options)


def figures(folder):
    return [(line["step"], line["lr"], line["loss"], line["gradient"]) for line in RunFolder(folder).lines()]


def whole(tmp_path):
    run = loop(tmp_path / "whole")
    run.run()
    return run.stage.weight.data, figures(tmp_path / "whole")


def go_on(folder):
    again = loop(folder)
    saved = again.folder.load()
    again.folder.rewind(["line"], "line", saved["step"])
    again.resume(saved)
    again.run()
    return saved["step"], again.stage.weight.data


@pytest.mark.parametrize("long_save", ["inf", "-1"])
def test_a_killed_process_goes_on_bit_for_bit(tmp_path, long_save):
    weight, lines = whole(tmp_path)
    folder = tmp_path / "killed"
    running = subprocess.Popen([sys.executable, __file__, str(folder), long_save])
    log = folder / "log.jsonl"
    began = time.monotonic()
    while not (log.exists() and len(log.read_text().splitlines()) >= 8):
        assert running.poll() is None and time.monotonic() - began < 60
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert figures(folder) == lines[: len(figures(folder))]
    step, resumed = go_on(folder)
    assert 3 <= step < STEPS
    assert figures(folder) == lines
    assert torch.equal(resumed, weight)


def test_a_terminated_process_saves_and_says_so_by_its_exit_code(tmp_path):
    stage = Line()
    step = Line.step

    class Stopped(Line):
        def step(self):
            if self.at == 4:
                signal.raise_signal(signal.SIGTERM)
            return step(self)

    stage = Stopped()
    with pytest.raises(StoppedError) as stopped:
        loop(tmp_path, stage).run()
    assert stopped.value.exit_code == 75
    assert RunFolder(tmp_path).load()["step"] == 5


def test_a_save_in_the_background_holds_the_step_it_was_made_at(tmp_path, monkeypatch):
    folder, weight = RunFolder(tmp_path), torch.zeros(2)
    save = torch.save

    def slow(*args):
        time.sleep(0.3)
        save(*args)

    monkeypatch.setattr(torch, "save", slow)
    began = time.monotonic()
    folder.save({"weights": {"a": weight}, "list": [weight, 3]}, later=True)
    assert time.monotonic() - began < 0.2
    weight += 1
    assert not folder.checkpoint.exists()
    folder.settle()
    content = folder.load()
    assert torch.equal(content["weights"]["a"], torch.zeros(2)) and torch.equal(content["list"][0], torch.zeros(2))
    folder.save({"step": 1}, later=True)
    folder.save({"step": 2})  # waits for the one before
    assert folder.load()["step"] == 2


def test_a_failed_save_in_the_background_is_told(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.save({"step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    folder.save({"step": 2}, later=True)
    with pytest.raises(CheckpointError, match="No space left on device.*the old one is intact"):
        folder.settle()
    assert folder.load()["step"] == 1


def test_long_saves_are_rarer_than_asked_for(tmp_path, monkeypatch):
    saves, clock, plain = [], iter(range(10_000)), Loop.save

    def save(self, **options):
        plain(self, **options)
        saves.append(self.steps)

    monkeypatch.setattr(Loop, "save", save)
    monkeypatch.setattr(loops.time, "monotonic", lambda: next(clock))
    loop(tmp_path, habits=Habits(save_minutes=0)).run()
    # A save takes one reading of the clock and a step two: more than twenty readings lie between two saves.
    assert saves == [0, 11, 22, 33, STEPS]


def test_out_of_memory_halves_the_rows_and_changes_nothing_else(tmp_path):
    weight, lines = whole(tmp_path)
    said = []
    run = loop(tmp_path / "small", Line(fits=2), say=said.append)
    run.run()
    assert said == [f"out of memory: stage line goes on with {n} rows of a batch at a time" for n in (4, 2)]
    torch.testing.assert_close(run.stage.weight.data, weight, rtol=1e-12, atol=0)
    for a, b in zip(figures(tmp_path / "small"), lines, strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def test_out_of_memory_with_one_row_or_later_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="stage line: expected a step to fit.*Tried to allocate 2 GiB; give fewer"):
        loop(tmp_path / "none", Line(fits=0)).run()
    late = Line()

    class Late(Line):
        def step(self):
            self.fits = 0 if self.at == loops.FIRST_STEPS else BATCH
            return super().step()

    late = Late()
    with pytest.raises(torch.OutOfMemoryError):
        loop(tmp_path / "late", late).run()
    assert late.rows == BATCH


def test_pace_share_of_the_peak_and_cost(tmp_path, monkeypatch):
    monkeypatch.setattr(loops, "peak_flops", lambda device: 1000.0)
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr(loops.time, "monotonic", lambda: next(clock))
    folder = RunFolder(tmp_path)
    folder.append({"stage": "before", "step": i, "tokens": 8 * i, "seconds": 50.0 * i} for i in (1, 2))
    assert folder.spent() == {"before": (16, 100.0)}
    shown = []
    habits = Habits(price_per_hour=36.0, log_steps=4)
    loop(tmp_path, steps=12, display=shown.append, flops_per_token=30.0, habits=habits).run()
    # The clock is read twice a step, so that a step of 8 tokens takes 4 s.
    assert [s.step for s in shown] == [4, 8, 12]
    assert shown[1].tokens_per_second == pytest.approx(2.0)
    assert shown[1].mfu == pytest.approx(2.0 * 30 / 1000)
    assert shown[2].cost == pytest.approx(0.01 * (100 + shown[2].seconds))
    line = folder.lines()[-1]
    assert line["mfu"] == pytest.approx(0.06) and line["tokens_per_second"] == pytest.approx(2.0)
    assert line["cost"] == pytest.approx(shown[2].cost, abs=1e-4)
    assert "mfu" not in folder.lines()[-2]


def test_what_is_not_known_is_not_shown(tmp_path):
    shown = []
    loop(tmp_path, steps=2, display=shown.append).run()
    assert shown[-1].mfu is None and shown[-1].cost is None
    assert not {"mfu", "cost"} & set(RunFolder(tmp_path).lines()[-1])
    plain = Progress("distill", 1200, 10**6, 60.0, 0.5, 0.1234, 5000.0)
    assert describe(plain) == "step 1,200  loss 0.1234  5,000 tokens/s  1:00 left"
    full = Progress("distill", 1200, 10**6, 60.0, 0.5, 0.1234, 5000.0, 0.412, 3.456)
    assert describe(full) == "step 1,200  loss 0.1234  5,000 tokens/s  41% MFU  cost 3.46  1:00 left"


if __name__ == "__main__":
    loops.LONG_SAVE = float(sys.argv[2])
    loop(Path(sys.argv[1]), Line(pause=0.02), habits=Habits(save_steps=3)).run()


def test_what_asks_for_a_low_rate_gets_it_and_is_not_decayed():
    from subquad.mixers.s4 import S4

    mixer = S4(S4.Config(d_model=4, d_state=4))
    names = {p: name for name, p in mixer.named_parameters()}
    rate = Rate(1e-2, old=0.05, weight_decay=0.1)
    high, low = (list(mixer.parameters()), []), ([], list(mixer.parameters()))
    for new, old, peak, slowly in ((*high, 1e-2, 1e-3), (*low, 5e-4, 5e-4)):
        optimiser = adamw(new, old, rate, device=torch.device("cpu"), most=slow(mixer))
        found = {names[p]: (g["peak"], g["weight_decay"]) for g in optimiser.param_groups for p in g["params"]}
        assert len(found) == len(names)
        assert found["layer.systems.0.low"] == found["layer.systems.0.log_dt"] == (slowly, 0.0)
        assert found["layer.systems.0.output"] == found["layer.out_proj.weight"] == (peak, 0.1)
        assert found["layer.skip"] == (peak, 0.0)
