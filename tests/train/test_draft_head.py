"""One command trains a head that guesses better, on texts or on answers, and goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from subquad import cli
from subquad.data import Batch
from subquad.engine.draft import parse_drafter
from subquad.engine.generate import Limits, generate
from subquad.models.config import ModelConfig
from subquad.models.draft_head import load_head, untrained
from subquad.models.load import load_model
from subquad.models.stack import Stack
from subquad.train.draft_head import measure


def taught(tmp_path: Path, byte_model: Callable[[Stack], str]) -> list[str]:
    """A model, a text, and the arguments that train a head on them."""
    layer = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "rotary": {"theta": 1e4, "dim": 16}}
    torch.manual_seed(0)
    model = Stack(ModelConfig(258, 32, 64, (layer,) * 3, max_positions=256))
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    folder, text = byte_model(model), tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"{i} bottles of water on the wall, {i} bottles of water. " * 8}) for i in range(60)]
    text.write_text("\n".join(lines))
    arguments = ["draft", folder, "--head", "--data", str(text), "--tokens", "30k", "--seq", "64", "--batch", "8"]
    return [*arguments, "--lr", "0.01", "--window", "32", "--eval-tokens", "600", "--device", "cpu"]


def test_one_command_trains_a_head_that_guesses_better(
    tmp_path: Path, byte_model: Callable[[Stack], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """From text to a folder that --draft takes: the tokens stay, and the guesses get better."""
    arguments, out = taught(tmp_path, byte_model), tmp_path / "head"
    assert cli.main([*arguments, "--out", str(out)]) == 0, capsys.readouterr().err
    assert "tokens a round of 3" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} >= {"results.md", "loss.svg", "guesses.svg", "log.jsonl"}
    assert not (out / "checkpoint.pt").exists()
    head, loaded = load_head(out), load_model(arguments[1])
    assert (head.config.target, head.config.aux_layers) == (loaded.name, (0, 1))
    ids_n = torch.tensor(loaded.tokenizer.encode("97 bottles of water on the wall, 97 bottles of water. " * 3))
    before, after = (
        measure(loaded.model, one, Batch(ids_n[None]), 3) for one in (untrained(head.config).begin_(loaded.model), head)
    )
    assert all(new > old + 0.02 for old, new in zip(before.acceptance, after.acceptance, strict=True))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    prompt, limits = [ids_n[:9].tolist()], Limits(20)
    drafter = parse_drafter([f"draft_head,path={out}"], lambda name: loaded.model)
    expected = generate(loaded.model, prompt, limits=limits)
    assert generate(loaded.model, prompt, limits=limits, drafter=drafter, draft_tokens=3) == expected
    assert cli.main([*arguments, "--out", str(out)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert cli.main([*arguments, "--out", str(out), "--resume"]) == 2
    assert "is finished" in capsys.readouterr().err


def test_a_run_that_was_stopped_goes_on_to_the_same_head(
    tmp_path: Path,
    byte_model: Callable[[Stack], str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from subquad.train.draft_head import HeadStage

    arguments = [*taught(tmp_path, byte_model), "--tokens", "8k", "--vocab", "20"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert cli.main([*arguments, "--out", str(whole)]) == 0
    step, steps = HeadStage.step, 0

    def interrupted(self: HeadStage) -> dict[str, torch.Tensor]:
        nonlocal steps
        steps += 1
        if steps == 7:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(HeadStage, "step", interrupted)
    assert cli.main([*arguments, "--out", str(halves)]) == 75
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*arguments, "--out", str(halves), "--resume", "--lr", "0.5"]) == 2
    assert "lr 0.01 (now 0.5)" in capsys.readouterr().err
    assert cli.main([*arguments, "--out", str(halves), "--resume"]) == 0
    pairs = zip(load_head(whole).state_dict().values(), load_head(halves).state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (whole, halves)]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]


@pytest.mark.parametrize(("way", "got"), [([], "neither"), (["--head", "--layers", "1"], "both")])
def test_exactly_one_way_to_draft_must_be_given(way: list[str], got: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["draft", "x", "--out", "y", "--data", "pydoc", *way]) == 2
    assert f"expected --head or --layers N, got {got}" in capsys.readouterr().err


def test_a_head_that_sees_other_layers_is_trained_on_answers(
    tmp_path: Path, byte_model: Callable[[Stack], str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, out = taught(tmp_path, byte_model), tmp_path / "head"
    lines = [json.dumps({"prompt": f"{i} more?", "response": f"{i} bottles of water. " * 6}) for i in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    arguments[arguments.index("--data") + 1] += ",completions"
    assert cli.main([*arguments, "--out", str(out), "--aux-layers", "1"]) == 0, capsys.readouterr().err
    head, loaded = load_head(out), load_model(arguments[1])
    assert head.config.aux_layers == (1,)
    assert json.loads((out / "results.json").read_text())["tokens"] < 600
    prompt, limits = [loaded.tokenizer.encode("7 more?")], Limits(20)
    drafter = parse_drafter([f"draft_head,path={out}"], lambda name: loaded.model)
    expected = generate(loaded.model, prompt, limits=limits)
    assert generate(loaded.model, prompt, limits=limits, drafter=drafter, draft_tokens=3) == expected
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [("0+x", "expected numbers such as 9"), ("1+0", "aux_layers that ascend"), ("0+3", "from 0 to 2, got 3")],
)
def test_layers_that_can_not_be_seen_are_refused_before_any_work(
    layers: str, message: str, tmp_path: Path, byte_model: Callable[[Stack], str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, out = taught(tmp_path, byte_model), tmp_path / "head"
    assert cli.main([*arguments, "--out", str(out), "--aux-layers", layers]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists() or not any(out.glob("*.jsonl"))


def test_a_head_may_see_the_last_layer_alone(tmp_path: Path, byte_model: Callable[[Stack], str]) -> None:
    arguments, out = taught(tmp_path, byte_model), tmp_path / "head"
    arguments[arguments.index("30k")] = "2k"
    assert cli.main([*arguments, "--out", str(out), "--aux-layers", "none"]) == 0
    assert load_head(out).config.aux_layers == ()
