"""Recorded steps, on a GPU: what is replayed does what a plain step does, and what can't be recorded is refused."""

from __future__ import annotations

import math

import pytest
import torch

from subquad.core.errors import UnsupportedError
from subquad.evals.learning import load_task
from subquad.evals.learning.batches import Batches
from subquad.evals.learning.model import Learner, layers_of
from subquad.evals.learning.stage import TaskStage
from subquad.train.precision import autocast
from subquad.train.recorded import Recorded

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

OPTIONS = {"s4": {"bidirectional": True, "d_state": 8}}


@pytest.mark.parametrize(
    ("name", "mixers", "norm"),
    [
        ("listops", ["s4"], "rms"),
        ("listops", ["s4"], "batch"),
        ("pathfinder", ["s4"], "batch"),
        ("recall", ["h3", "attention"], "rms"),
    ],
)
def test_a_replayed_step_equals_a_plain_one(name: str, mixers: list[str], norm: str) -> None:
    task, device = load_task(name, ["short"] if name == "listops" else []), torch.device("cuda")
    torch.manual_seed(0)
    model = Learner(task, layers_of(mixers, 2, 32, OPTIONS, task), 32, norm=norm).to(device)
    said: list[str] = []
    plain, replayed = (TaskStage(task, model, Batches(task, 0, 8), said.append) for _ in range(2))
    plain._plain = math.inf
    for _ in range(6):
        found = []
        for stage in (plain, replayed):
            with autocast(device):
                loss = stage.step()["loss"].double()
            gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
            found.append((loss, torch.cat(gradients)))
            model.zero_grad(set_to_none=True)
        (loss, want), (again, got) = found
        assert abs(loss - again) < 0.01 * loss
        assert (got - want).norm() < 0.02 * want.norm()
    assert said == [] and replayed._recorded is not None


def test_a_step_that_asks_the_device_is_refused_and_runs_on() -> None:
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))

    def run(x: torch.Tensor) -> tuple[torch.Tensor]:
        loss = (weight * x).sum()
        loss.backward()
        return (loss.detach() * float(x.sum()),)

    x = torch.ones(3, device="cuda")
    with pytest.raises(UnsupportedError, match="expected a step that can be recorded"):
        Recorded(run, [x], [weight])
    assert float(run(x)[0]) == 9
