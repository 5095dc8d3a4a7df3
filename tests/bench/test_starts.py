"""The comparison of starts: every statistic has its row, and on a tiny teacher calibration is the best of them."""

from __future__ import annotations

import torch

from subquad.bench.results import Result, environment
from subquad.bench.starts import MIXERS, STARTS, compare
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

LAYER = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}


def test_every_start_of_every_mixer_has_its_figures() -> None:
    torch.manual_seed(0)
    teacher = Stack(ModelConfig(50, 32, 48, (LAYER,) * 3, max_positions=256)).requires_grad_(False)
    train, held = [torch.randint(50, (4, 100))], [torch.randint(50, (2, 100)), torch.randint(50, (1, 100))]
    said: list[str] = []
    rows = compare(teacher, [0, 2], train, held, say=said.append)
    value = {row.id.removeprefix("starts."): row.value for row in rows}
    Result("starts", "test", environment(torch.device("cpu"), torch.float32), rows).check("test")
    assert len(said) == len(MIXERS) * len(STARTS) - 2  # a write strength is Gated DeltaNet's alone
    for slug in MIXERS:
        errors = {start: value[f"{slug}.{start}.error"] for start in STARTS if f"{slug}.{start}.error" in value}
        assert min(errors, key=lambda s: errors[s]) == "calibrated"
        assert errors["scale"] < errors["decay"]  # a norm's weight of 1 is far too loud
        assert value[f"{slug}.calibrated.kl"] < value[f"{slug}.scale.kl"]
    assert value["gated_deltanet.write.error"] != value["gated_deltanet.decay.error"]
