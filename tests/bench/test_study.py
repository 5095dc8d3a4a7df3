"""A study: its commands, the order of its runs, and what becomes of their figures."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from subquad.bench import study as module
from subquad.bench.plots import plots
from subquad.bench.results import Result, environment, make_row
from subquad.bench.study import Study, collect, read_study, run_study, verdicts, write_page
from subquad.core.errors import ConfigError

FILE = """
name = "convert.some"
teacher = "org/teacher"
[convert]
data = ["{data}/a.jsonl,weight=2", "{data}/b.txt"]
tokens = "1M"
[eval]
text = ["{data}/c.txt"]
needle = true
agreement = 0
passkey = false
[runs.keep50]
heads = "{study}/heads.json"
against = "windows50"
[runs.keep50.eval]
passkey = true
[runs.keep25]
against = "keep50"
[runs.windows50]
stage = ["distill.new="]
[runs.plain]
eval = false
[ratios]
kl = ["keep50.kl", "windows50.kl"]
"""
ENV = environment(torch.device("cpu"), torch.float32)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "some.toml").write_text(FILE)
    return read_study(tmp_path / "some.toml", tmp_path / "runs", Path("texts"))


def test_runs_become_command_lines(study: Study, tmp_path: Path) -> None:
    run = study.runs["keep50"]
    assert run.convert[:4] == ("convert", "org/teacher", "--out", str(tmp_path / "runs/keep50"))
    given = " ".join(run.convert)
    assert "--data texts/a.jsonl,weight=2 --data texts/b.txt --tokens 1M" in given
    assert f"--heads {tmp_path}/heads.json" in given and "against" not in given
    asked = " ".join(run.evaluate)
    assert f"--against {tmp_path}/runs/windows50 --text texts/c.txt --needle --agreement 0 --passkey --json" in asked
    assert "--passkey" in asked and "--passkey" not in study.runs["keep25"].evaluate
    assert run.difference == (
        "diff",
        run.convert[3],
        "org/teacher",
        "--out",
        f"{run.convert[3]}/difference.safetensors",
    )
    assert study.runs["windows50"].convert[-2:] == ("--stage", "distill.new=")
    assert study.runs["plain"].evaluate == ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (('against = "keep50"', "against = 'windows5'"), "did you mean 'windows50'"),
        (('against = "windows50"', "against = 'keep25'"), "a circle in keep50, keep25"),
        (("[eval]", "[evals]"), "did you mean 'eval'"),
        (('"windows50.kl"', '"windows.kl"'), "ratio kl: expected two of RUN.ID"),
        (('["keep50.kl", "windows50.kl"]', '"keep50.kl"'), "ratio kl: expected two of RUN.ID"),
        (("[eval]", "[eval"), "expected a study in TOML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    (tmp_path / "some.toml").write_text(FILE.replace(*change))
    with pytest.raises(ConfigError, match=says):
        read_study(tmp_path / "some.toml", tmp_path, tmp_path)


@pytest.mark.parametrize("jobs", [1, 2])
def test_rivals_end_first_failures_are_named_and_gpus_taken_in_turns(
    study: Study, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    calls, lock = list[tuple[str, str, str]](), threading.Lock()

    def call(_: Study, name: str, command: Sequence[str], gpu: str, say: Any) -> bool:
        with lock:
            calls.append((name, command[0], gpu))
        return name != "plain"

    monkeypatch.setattr(module, "_call", call)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert run_study(study, (), jobs=jobs, say=lambda line: None) == ["plain"]
    order = [(name, what) for name, what, _ in calls]
    every = [(name, what) for name in ("keep50", "keep25", "windows50") for what in ("convert", "diff", "eval")]
    assert sorted(order) == sorted([*every, ("plain", "convert")])
    for rival, name in (("windows50", "keep50"), ("keep50", "keep25")):
        assert order.index((rival, "convert")) < order.index((name, "eval"))
    assert {gpu for _, _, gpu in calls} == {"3", "5"} if jobs == 2 else {"3"}


def test_wrong_names_and_changed_settings_are_refused(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'keep50'"):
        run_study(study, ["keep5"], jobs=1, say=lambda line: None)
    monkeypatch.setattr(module, "_call", lambda *_: True)
    assert run_study(study, ["plain"], jobs=1, say=lambda line: None) == []
    changed = replace(study.runs["plain"], convert=(*study.runs["plain"].convert, "--seq", "99"))
    with pytest.raises(ConfigError, match="plain: expected a run of these settings, got one with others for convert"):
        run_study(replace(study, runs={"plain": changed}), (), jobs=1, say=lambda line: None)


def finish(study: Study, name: str, kls: Sequence[float], state: int, ppl: float | None) -> None:
    folder = study.out / name
    folder.mkdir(parents=True)
    facts = {"finished": True, "state": {"context": 8192, "kept": 0.5, "bytes": {"student": state, "teacher": 400}}}
    (folder / "run.json").write_text(json.dumps(facts))
    lines = [{"stage": "align", "tokens": 10 * (i + 1), "loss": 1.0} for i in range(3)]
    lines += [{"stage": "distill", "tokens": 10 * (i + 1), "kl": kl} for i, kl in enumerate(kls)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if ppl is not None:
        rows = [make_row("eval.ppl.c.ratio", ppl, "1", "lower", interval=(ppl - 0.1, ppl + 0.1))]
        for id, how, p in (("ppl.c.against.ratio", "ratio", 0.01), ("loss.b.against.difference", "difference", 0.2)):
            rows.append(make_row(f"eval.{id}", ppl, "1", "lower", shape={"how": how, "p": p}))
        Result("eval", "subquad eval", ENV, rows).save(folder / "eval.json")


def test_figures_curves_ratios_and_pictures(study: Study) -> None:
    with pytest.raises(ConfigError, match="expected at least one run that has ended"):
        collect(study, "subquad study", ENV)
    kls = [2.0 - i / 24 for i in range(24)]
    finish(study, "keep50", kls, 200, 1.1)
    finish(study, "keep25", kls, 100, 1.3)
    finish(study, "windows50", [2 * kl for kl in kls], 200, 1.2)
    finish(study, "plain", kls, 50, None)
    result = collect(study, "subquad study", ENV)
    result.check("here")
    rows = {row.id.removeprefix("convert.some."): row for row in result.rows}
    assert rows["keep50.ppl_ratio"].value == rows["keep50.ppl.c.ratio"].value == 1.1
    assert rows["keep50.kl"].value == pytest.approx(sum(kls[-2:]) / 2)
    # A point is the mean of its part, at its end, the tokens of align before it.
    assert rows["keep50.kl.t50"].value == pytest.approx(sum(kls[:2]) / 2)
    assert [id for id in rows if id.startswith("plain.kl.t")] == [f"plain.kl.t{30 + 20 * i}" for i in range(1, 13)]
    assert rows["keep25.state_bytes"].ratio == 4.0 and "plain.ppl_ratio" not in rows
    assert rows["kl"].ratio == pytest.approx(2.0) and rows["kl"].baseline == "windows50.kl"
    (first, second, *_) = (table.rows for table in verdicts(study, result))
    assert [row[-1] for row in first] == ["windows50", "even"]
    assert [row[-1] for row in second] == ["keep50", "even"]
    charts = plots(result)
    assert set(charts) == {"kl"} and set(charts["kl"].series) == {"keep50", "keep25", "windows50", "plain"}
    page = write_page(study, result, "subquad study").read_text()
    assert "windows50.kl: " in page and "[1, 1.2]" in page and page.count("<svg") == 2
