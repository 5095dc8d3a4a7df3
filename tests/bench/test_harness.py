"""The harness: a red gate stops everything, and the figures are what was measured."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from subquad import cli
from subquad.bench import harness
from subquad.bench.harness import Bench, GateError
from subquad.bench.results import Result, environment, load_result, ratio
from subquad.bench.rooms import find_rooms, missing, rooms, run_room
from subquad.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def sleepy(seconds):
    return lambda *_: time.sleep(seconds)


def proved(**kwargs):
    bench = Bench("mixers.some", **kwargs)
    bench.gate("one is one", torch.ones(1), torch.ones(1), rtol=0.0)
    return bench


@pytest.mark.parametrize(
    "got", [torch.tensor([1.0, 2.1]), torch.tensor([1.0, float("nan")]), torch.tensor([[1.0, 2.0]])]
)
def test_red_gate_raises(got):
    # Of the gate under test, not of this test: 5 %, a NaN and another shape are no rounding of one in a thousand.
    with pytest.raises(GateError, match="red"):
        Bench("a.b").gate("equal", got, torch.tensor([1.0, 2.0]), rtol=1e-3)


def test_gate_allows_twice_the_naive_error_and_no_more():
    want = torch.tensor([1.0, 4.0], dtype=torch.float64)
    naive = torch.tensor([1.0, 4.1])
    bench = Bench("a.b")
    bench.gate("within", torch.tensor([1.0, 3.81]), want, naive=naive)
    assert bench.gates[0]["error"] == pytest.approx(0.19 / 4, rel=1e-5)
    with pytest.raises(GateError):
        bench.gate("beyond", torch.tensor([1.0, 3.79]), want, naive=naive)


def test_gate_needs_one_measure_of_tolerance():
    with pytest.raises(ConfigError, match="give one"):
        Bench("a.b").gate("equal", torch.ones(1), torch.ones(1))


def test_no_speed_without_a_gate():
    with pytest.raises(GateError, match="call bench.gate first"):
        Bench("a.b").compare("fwd", sleepy(0), sleepy(0), baseline_name="none")


def test_red_gate_leaves_no_result(tmp_path, monkeypatch):
    class Red:
        @staticmethod
        def run(bench):
            bench.value("size", 1, "bytes", "lower")
            # One for zero is red at any tolerance below one.
            bench.gate("equal", torch.ones(1), torch.zeros(1), rtol=1e-3)

    monkeypatch.setattr("subquad.bench.rooms.importlib.import_module", lambda name: Red)
    with pytest.raises(GateError):
        run_room("mixers/red", smoke=True)


def test_compare_finds_who_is_slower():
    bench = proved(reps=3)
    bench.compare("ms", sleepy(0.010), sleepy(0.030), baseline_name="slow")
    bench.compare("rate", sleepy(0.030), sleepy(0.010), baseline_name="fast", tokens=60)
    ms, rate = bench.rows
    assert ms.unit == "ms" and ms.better == "lower" and rate.unit == "tokens/s" and rate.better == "higher"
    # A sleep is never shorter than asked for; a loaded machine may make it longer.
    assert ms.value >= 10 and ms.baseline_value >= 30 and rate.value <= 2000 and rate.baseline_value <= 6000
    assert ms.ratio > 1 > rate.ratio
    assert len(ms.reps) == 3 and sorted(r[0] for r in ms.reps)[1] == ms.value


def test_compare_takes_turns():
    bench, calls = proved(reps=4), []
    bench._calibrate = lambda fn, copies: 1
    bench.compare("x", lambda: calls.append("o"), lambda: calls.append("b"), baseline_name="b")
    assert "".join(calls) == "obboobbo"


def test_inputs_rotate_beyond_the_cache(monkeypatch):
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 2**24)
    bench, seen = proved(reps=1), set()
    x = torch.ones(2**20)
    bench.compare("x", lambda t: seen.add(t.data_ptr()), lambda t: None, baseline_name="b", inputs=(x,))
    copies = bench.copies((x,))
    assert len(copies) * x.nbytes >= 4 * harness.cache_bytes(torch.device("cpu"))
    assert len(seen) == len(copies) and x.data_ptr() not in seen


def test_limit_share_is_the_slower_of_memory_and_arithmetic(monkeypatch):
    monkeypatch.setattr(harness, "bandwidth", lambda *_: 1e9)
    monkeypatch.setattr(harness, "peak", lambda *_: 1e12)
    bench = proved(reps=1)
    bench.compare("memory", sleepy(0.020), sleepy(0), baseline_name="b", moved=1e7, flops=1e9)
    bench.compare("arithmetic", sleepy(0.020), sleepy(0), baseline_name="b", moved=1e6, flops=5e9)
    bench.compare("unknown", sleepy(0.001), sleepy(0), baseline_name="b")
    memory, arithmetic, unknown = bench.rows
    assert memory.limit_share == pytest.approx(10 / memory.value)
    assert arithmetic.limit_share == pytest.approx(5 / arithmetic.value)
    assert unknown.limit_share is None


def test_limits_are_positive_and_finite():
    cpu = torch.device("cpu")
    assert 1e6 < harness.bandwidth(cpu, True) < 1e15
    assert 1e6 < harness.peak(cpu, torch.float32, True) < 1e16


def test_ratio_above_one_is_better():
    assert ratio(2.0, 4.0, "lower") == 2.0 and ratio(2.0, 4.0, "higher") == 0.5 and ratio(2.0, None, "lower") is None
    assert ratio(0.0, 4.0, "lower") is None


def test_a_room_is_told_what_to_measure_and_the_command_says_so(tmp_path, monkeypatch):
    class Told:
        @staticmethod
        def run(bench):
            bench.name = "spec.some"
            bench.value("speed", 3, "tokens/s", "higher", baseline="plain", baseline_value=2, reps=[[3, 2]])
            bench.say(f"{bench.hybrid} {bench.hybrid_rows} {bench.drafter} {bench.data} {bench.minutes} {bench.work}")

    said = []
    monkeypatch.setattr("subquad.bench.rooms.importlib.import_module", lambda name: Told)
    told = {"hybrid": "runs/small", "hybrid_rows": 8, "drafter": tmp_path / "head", "data": tmp_path / "texts"}
    told |= {"minutes": 2.5, "work": tmp_path / "run"}
    threads = torch.get_num_threads()
    made = run_room("decode/some", smoke=True, say=said.append, threads=threads, **told)
    made.check("some")
    assert said == [f"runs/small 8 {tmp_path / 'head'} {tmp_path / 'texts'} 2.5 {tmp_path / 'run'}"]
    # Folders of this machine are nobody else's business.
    settings = "--smoke --hybrid small --hybrid-rows 8 --drafter head --data texts --minutes 2.5"
    assert made.command.endswith(f"{settings} --threads {threads}")
    assert made.bench == "spec.some" and made.rows[0].id == "spec.some.speed" and made.rows[0].reps == [[3, 2]]


def test_a_room_that_is_broken_off_gives_the_figures_so_far(tmp_path, monkeypatch, capsys):
    class Ended:
        @staticmethod
        def run(bench):
            bench.name = "spec.some"
            bench.value("speed", 3, "tokens/s", "higher", baseline="plain", baseline_value=2, reps=[[3, 2]])
            os.kill(os.getpid(), signal.SIGTERM)
            bench.value("more", 3, "tokens/s", "higher")

        @staticmethod
        def red(bench):
            bench.value("speed", 3, "tokens/s", "higher")
            bench.gate("one is two", torch.ones(1), 2 * torch.ones(1), rtol=0.0)

    monkeypatch.setitem(sys.modules, "subquad.bench.decode.some", Ended)
    monkeypatch.setattr("subquad.bench.rooms.find_rooms", lambda names: ["decode/some"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert cli.main(["bench", "decode/some", "--device", "cpu", "--out", str(tmp_path)]) != 0
    finally:
        signal.signal(signal.SIGTERM, before)
    (kept,) = tmp_path.iterdir()
    assert kept.name.endswith(".json.unfinished") and str(kept) in capsys.readouterr().err
    assert [row.id for row in load_result(kept).rows] == ["spec.some.speed"]
    # What computes something else has no figures.
    monkeypatch.setattr(Ended, "run", Ended.red)
    kept.unlink()
    with pytest.raises(GateError):
        run_room("decode/some", unfinished=lambda result: result.save(kept))
    assert not kept.exists()


def result(**changes):
    bench = proved()
    bench.value("state", 10, "bytes", "lower", baseline="cache", baseline_value=40)
    made = Result(bench.name, "subquad bench x", environment(bench.device, bench.dtype), bench.rows, bench.gates)
    return Result(**{**made.__dict__, **changes})


def test_result_round_trip(tmp_path):
    made = result()
    made.save(tmp_path / "deep" / "a.json")
    assert load_result(tmp_path / "deep" / "a.json") == made
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["rows"][0].update(ratio=0.25), "ratio"),
        (lambda d: d["rows"][0].update(id="other.state"), "below mixers.some"),
        (lambda d: d["rows"][0].update(better="bigger"), "higher or lower"),
        (lambda d: d["rows"][0].update(speed=1), "unknown key 'speed'"),
        (lambda d: d["rows"].append(d["rows"][0]), "ids that differ"),
        (lambda d: d["env"].pop("commit"), "env.commit"),
        (lambda d: d.update(rows=[]), "at least one row"),
        (lambda d: d.pop("command"), "expected command"),
    ],
)
def test_a_result_that_cannot_be_believed_is_refused(tmp_path, edit, message):
    path = tmp_path / "a.json"
    result().save(path)
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=message):
        load_result(path)


def test_unknown_room_names_the_nearest():
    if not rooms():
        pytest.skip("no bench rooms yet")
    with pytest.raises(ConfigError, match=f"did you mean '{rooms()[0]}'"):
        find_rooms([rooms()[0] + "x"])


ROOMS = [(room, "cpu", torch.float32) for room in rooms()]
if torch.cuda.is_available():
    ROOMS += [(room, "cuda", torch.bfloat16) for room in find_rooms(["ops"])]


@pytest.mark.parametrize(("room", "device", "dtype"), ROOMS, ids=str)
def test_every_room_runs_at_its_small_sizes(room, device, dtype):
    if (needed := missing(room)) is not None:
        with pytest.raises(ConfigError, match="pip install"):
            run_room(room, device=device, dtype=dtype, smoke=True)
        pytest.skip(f"needs {needed[0]}: {needed[1]}")
    run_room(room, device=device, dtype=dtype, smoke=True).check(room)


@pytest.mark.parametrize("path", sorted((ROOT / "bench/results").glob("*.json")), ids=lambda p: p.name)
def test_committed_results_are_whole(path):
    made = load_result(path)
    assert path.name.startswith(f"{made.bench}.")
    assert "--smoke" not in made.command
