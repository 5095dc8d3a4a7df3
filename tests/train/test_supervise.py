"""Supervise: the loss of the wanted tokens alone, in any parts, through the weights or through adapters."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from subquad.core.errors import ConfigError
from subquad.data import Batch
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import Budget, Loop
from subquad.train.optimiser import Rate
from subquad.train.stages import Machine
from subquad.train.stages.supervise import Supervise


class Fixed:
    """A stream of one batch, over and over."""

    batch, time, seed = 4, 12, 0

    def __init__(self, wanted):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(64, (4, 12), generator=generator)
        self.one = Batch(tokens, (torch.rand(4, 12, generator=generator) < 0.4) if wanted else None)

    def __next__(self):
        return self.one

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_the_loss_is_that_of_the_wanted_tokens(make_work, wanted, rows):
    job, twin = (dataclasses.replace(make_work(), stream=Fixed(wanted)) for _ in range(2))
    figures = Supervise(dataclasses.replace(job, machine=Machine(rows=rows))).step()
    batch = twin.stream.one
    each = F.cross_entropy(twin.student(batch.tokens_bt)[:, :-1].mT, batch.tokens_bt[:, 1:], reduction="none")
    loss = each.mean() if not wanted else each[batch.wanted_bt[:, 1:]].mean()
    loss.backward()
    torch.testing.assert_close(figures["loss"], loss.detach(), rtol=1e-5, atol=0)
    for ours, theirs in zip(job.student.parameters(), twin.student.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


QV = ("*.mixer.*q_proj.weight", "*.mixer.*v_proj.weight")


def train(folder, job, steps, config, checkpoint=None):
    stage = Supervise(job, config)
    loop = Loop(stage, Budget(steps * 24), Rate(lr=1e-2, schedule="constant", warmup=0), RunFolder(folder))
    if checkpoint is not None:
        loop.resume(checkpoint)
    loop.run()
    return stage


def test_adapters_train_alone_and_are_merged(tmp_path, make_work):
    job = make_work(train=QV)
    before = {k: x.clone() for k, x in job.student.state_dict().items()}
    stage = train(tmp_path, job, 30, Supervise.Config(rank=2))
    assert all(p.shape[0] == 2 or p.shape[1] == 2 for p in stage.new) and not stage.old
    with torch.no_grad():
        adapted = job.student(torch.arange(12)[None])
    stage.finish()
    after = job.student.state_dict()
    assert list(after) == list(before)
    torch.testing.assert_close(job.student(torch.arange(12)[None]), adapted, rtol=1e-5, atol=1e-6)
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    assert changed == set(stage.names) == {k for k in before if k.endswith(("q_proj.weight", "v_proj.weight"))}
    for k in changed:
        assert torch.linalg.matrix_rank((after[k] - before[k]).double(), rtol=1e-5) == 2
    losses = [line["loss"] for line in RunFolder(tmp_path).lines()]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("config", [Supervise.Config(), Supervise.Config(rank=2)], ids=["weights", "adapters"])
def test_a_stopped_stage_goes_on_bit_for_bit(tmp_path, make_work, config):
    def run(name, steps, checkpoint=None):
        job = make_work(train=QV)
        torch.manual_seed(len(name))  # what was drawn before the stage is of no consequence
        stage = train(tmp_path / name, job, steps, config, checkpoint)
        stage.finish()
        return job.student.state_dict(), [line["loss"] for line in RunFolder(tmp_path / name).lines()]

    whole, losses = run("whole", 6)
    run("part", 3)
    again, rest = run("rest", 6, RunFolder(tmp_path / "part").load())
    assert rest == losses[3:]
    assert all(torch.equal(x, whole[k]) for k, x in again.items())


def test_refusals(make_work):
    with pytest.raises(ConfigError, match="supervise: expected rank >= 0 and alpha > 0"):
        Supervise.Config(rank=-1)
    with pytest.raises(ConfigError, match=r"supervise: expected linear layers for adapters, got none by \*norm\*"):
        Supervise(make_work(train=("*norm*",)), Supervise.Config(rank=2))
