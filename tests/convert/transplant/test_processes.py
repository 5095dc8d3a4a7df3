"""A conversion by two processes is that of one; what is stopped before its first checkpoint starts anew."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from subquad.cli import main
from subquad.convert.transplant import conversion, samples
from subquad.convert.transplant.conversion import convert
from subquad.convert.transplant.settings import Settings, Surroundings
from subquad.core.errors import ConfigError
from subquad.models.load import load_model
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import StoppedError
from subquad.train.optimiser import Rate
from subquad.train.parallel import Processes
from subquad.train.recipe import Phase, Recipe

SIZES = ["--batch", "4", "--seq", "32", "--measure-tokens", "64", "--eval-tokens", "256", "--held-out", "0.2"]
STAGES = ["--stage", "align.tokens=640", "--stage", "distill.tokens=1280", "--device", "cpu", "--price-per-hour", "3"]
# Both learn little in so few steps, but as much as each other.
PLACES = ["--mixer", "windowed_linear", "--keep", "0.5", "--set", "window=8"]


def command(teacher, out, *data):
    return ["convert", teacher, "--out", str(out), *PLACES, *SIZES, *STAGES, *data]


def torchrun(arguments, **options):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    launch += ["--local-addr", "127.0.0.1", "-m", "subquad.cli"]
    return subprocess.Popen([*launch, *arguments], env=env, stderr=subprocess.PIPE, text=True, **options)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def same_run(got, want):
    """Losses, weights and totals, to the rounding of float32 sums in another order."""
    a, b = (RunFolder(folder).lines() for folder in (got, want))
    assert [(x["stage"], x["step"], x["tokens"]) for x in a] == [(x["stage"], x["step"], x["tokens"]) for x in b]
    assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], rel=1e-4)
    a, b = (load_model(folder).model.state_dict() for folder in (got, want))
    for name, x in b.items():
        torch.testing.assert_close(a[name], x, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_torchrun_converts_as_one_process_does(tmp_path, tiny_teacher, tiny_text, capfd):
    one, two = tmp_path / "one", tmp_path / "two"
    data = ["--data", str(tiny_text), "--data", "self", "--samples", "40"]
    assert main(command(tiny_teacher, one, *data)) == 0
    shown = capfd.readouterr()
    running = torchrun(command(tiny_teacher, two, *data), stdout=subprocess.PIPE)
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    same_run(two, one)
    # The first one alone tells: each line stands there once.
    for line in ("self: up to 40 documents", "measuring the attention", "align: a batch at once", "evaluating on"):
        assert err.count(line) == shown.err.count(line) == 1, (line, err)
    assert out.count("saved in") == 1
    assert out.splitlines()[:-1] == pytest.approx(shown.out.splitlines()[:-1])
    assert (two / "samples.jsonl").read_text() == (one / "samples.jsonl").read_text()
    facts = RunFolder(two).facts()
    assert facts["finished"] and not (two / "checkpoint.pt").exists()
    spent = facts["training"]
    assert spent["tokens"] == 640 + 1280
    assert spent["cost"] == pytest.approx(3 * spent["minutes"] / 60)
    assert "1,920 tokens" in (two / "report.html").read_text()
    assert RunFolder(two).lines()[-1]["cost"] == pytest.approx(spent["cost"], abs=1e-4)


def test_a_signal_to_one_of_two_processes_stops_both_and_one_goes_on_alone(tmp_path, tiny_teacher, tiny_text):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    data = ["--data", str(tiny_text), "--stage", "distill.tokens=12800"]
    assert main(command(tiny_teacher, whole, *data)) == 0
    running = torchrun(command(tiny_teacher, broken, *data))
    log, began = broken / "log.jsonl", time.monotonic()
    while not (log.exists() and log.read_text().count("\n") >= 8):
        assert running.poll() is None and time.monotonic() - began < 120
        time.sleep(0.02)
    children = subprocess.run(["ps", "--ppid", str(running.pid), "-o", "pid="], capture_output=True, text=True).stdout
    ranks = {rank_of(int(pid)): int(pid) for pid in children.split()}
    os.kill(ranks["1"], signal.SIGTERM)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 1 and "exitcode  : 75" in err  # torchrun's own, and the process's
    step = RunFolder(broken).load()["step"]
    assert err.count(f"stopped after step {step} of stage distill") == 2, err
    assert main([*command(tiny_teacher, broken, *data), "--resume"]) == 0
    same_run(broken, whole)


def rank_of(pid):
    with open(f"/proc/{pid}/environ", encoding="utf-8") as file:
        return dict(entry.split("=", 1) for entry in file.read().split("\0") if "=" in entry).get("RANK")


def test_a_batch_that_processes_can_not_share_is_refused_before_anything_is_loaded(tmp_path):
    three = Surroundings(processes=Alone(torch.device("cpu"), 0, 3))
    recipe = Recipe((Phase("align", Rate(1e-3), tokens=96), Phase("distill", Rate(1e-3), tokens=96, seq=8)))
    for batch, message in ((4, "--batch 4: expected a multiple of the 3"), (3, None)):
        settings = Settings("nowhere", ("pydoc",), recipe, mixers=("mamba2",), keep=0.5, batch=batch, seq=32)
        with pytest.raises(Exception, match=message) as error:
            convert(settings, tmp_path, surroundings=three)
        assert isinstance(error.value, ConfigError) == (message is not None)


class Alone(Processes):
    """One of several that never speaks to the others."""

    def first(self, make):
        return make()


# -- before the first checkpoint ----------------------------------------------------------------------------------


def settings(teacher, **changes):
    recipe = Recipe((Phase("align", Rate(1e-3), tokens=128),))
    small = {"batch": 2, "seq": 32, "measure_tokens": 64, "eval_tokens": 128, "held_out": 0.2, "keep": 0.5}
    return Settings(teacher, **({"data": ("pydoc",), "recipe": recipe, "mixers": ("mamba2",)} | small | changes))


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("sampling", signal.SIGTERM),
        ("measuring", signal.SIGINT),
        ("writing", signal.SIGTERM),
        ("writing", signal.SIGINT),
    ],
)
def test_a_signal_before_the_training_is_told_by_its_exit_code_and_resumed(
    tmp_path, tiny_teacher, monkeypatch, capfd, where, number
):
    arguments = ["convert", tiny_teacher, "--out", str(tmp_path / "out"), "--mixer", "mamba2", "--keep", "0.5", *SIZES]
    arguments += ["--data", "self", "--samples", "40", "--stage", "align.tokens=256", "--resume"]
    place, name = {
        "sampling": (samples._Part, "add"),
        "measuring": (conversion, "measure"),
        "writing": (conversion, "fit"),  # run.json is there, a checkpoint is not
    }[where]
    plain, calls = getattr(place, name), []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == (5 if where == "sampling" else 1):
            signal.raise_signal(number)
        return plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupted)
        before = signal.getsignal(number)
        assert main(arguments) == 75
        assert signal.getsignal(number) is before
    shown = capfd.readouterr().err
    assert "starting at the beginning" in shown
    assert "error: stopped, with what is done in" in shown and "--resume to go on" in shown
    assert not (tmp_path / "out" / "checkpoint.pt").exists()
    assert main(arguments) == 0
    assert "starting at the beginning" in capfd.readouterr().err
    assert RunFolder(tmp_path / "out").facts()["finished"]


def test_what_a_stopped_run_has_settled_is_checked_before_it_starts_anew(tmp_path, tiny_teacher, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "fit", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(StoppedError):
            convert(settings(tiny_teacher), tmp_path)
    with pytest.raises(ConfigError, match=r"seed 0 \(now 1\); give the same"):
        convert(settings(tiny_teacher, seed=1), tmp_path, resume=True)
    assert convert(settings(tiny_teacher), tmp_path, resume=True).student_perplexity.tokens > 0


# -- measuring ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "rows"), [(1, 1), (64, 2), (65, 3), (33 * 32, 33)])
def test_as_much_is_measured_as_was_asked_for_a_few_rows_at_a_time(tmp_path, tiny_teacher, monkeypatch, asked, rows):
    heard, measured = [], []
    measure = conversion.measure

    def told(source, batches, layers):
        measured.extend(len(batch) for batch in batches)
        block = source.blocks[0].mixer
        hook = block.register_forward_pre_hook(lambda _, inputs: heard.append(len(inputs[0])))
        try:
            return measure(source, batches, layers)
        finally:
            hook.remove()

    monkeypatch.setattr("subquad.convert.transplant.measure.TOKENS_AT_ONCE", 2 * 32)
    monkeypatch.setattr(conversion, "measure", told)
    convert(settings(tiny_teacher, batch=16, measure_tokens=asked), tmp_path)
    assert measured == [rows]
    assert sum(heard) == rows and max(heard) <= 2


def test_the_totals_are_those_of_all_stages(tmp_path, tiny_teacher):
    recipe = Recipe((Phase("align", Rate(1e-3), tokens=128), Phase("distill", Rate(1e-3), tokens=64)))
    convert(settings(tiny_teacher, recipe=recipe), tmp_path)
    lines = RunFolder(tmp_path).lines()
    ends = [
        line for line, after in zip(lines, [*lines[1:], {"stage": ""}], strict=True) if line["stage"] != after["stage"]
    ]
    spent = json.loads((tmp_path / "run.json").read_text())["training"]
    assert spent == {"tokens": 192, "minutes": pytest.approx(sum(line["seconds"] for line in ends) / 60)}
