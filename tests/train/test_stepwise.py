"""Stepwise: which layers hold their new mixer, what the others do meanwhile, and that nothing else moves."""

import pytest
import torch

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import Budget, Loop
from subquad.train.losses import token_cross_entropy, token_kl
from subquad.train.optimiser import Rate
from subquad.train.stages.stepwise import Stepwise, first, halfway


def test_the_first_are_spread_evenly():
    # The published quarter (every fourth layer) of the published half (every second).
    assert first(range(0, 32, 2), 0.5) == list(range(0, 32, 4))
    assert first([1, 3, 5, 7], 1.0) == [1, 3, 5, 7]
    assert first([1, 3, 5, 7, 9], 0.4) == [1, 5]
    assert first([4], 0.1) == [4]


def test_halfway_is_the_student_here_and_the_teacher_there(make_work):
    job = make_work(layers=(0, 1, 2))
    model, x = halfway(job.student, job.source, [1]), torch.randint(64, (2, 9))
    hidden, layout = job.teacher.embed(x), Layout.dense(2, 9)
    for i, block in enumerate(job.student.blocks):
        mixer = (job.teacher if i == 1 else job.student).blocks[i].mixer
        hidden = block.feed(hidden, mixer(block.norm1(hidden), layout))
    torch.testing.assert_close(model.hidden(x), job.student.norm(hidden), rtol=1e-6, atol=1e-6)
    ours = {p.data_ptr() for p in job.student.parameters()}
    assert all(p.data_ptr() in ours for n, p in model.named_parameters() if not n.startswith("blocks.1.mixer."))
    assert type(job.student.blocks[1].mixer).__name__ == "Mamba2"


def test_a_step_has_the_gradients_of_the_half_converted_student(make_work):
    job, twin = make_work(layers=(0, 2)), make_work(layers=(0, 2))
    stage = Stepwise(job, Stepwise.Config(converted=0.5, labels=0.25))
    figures = stage.step()
    tokens = next(twin.stream).tokens_bt
    model, layout = halfway(twin.student, twin.source, [2]), Layout.dense(*tokens.shape)
    hidden = model.hidden(tokens)
    with torch.no_grad():
        target = twin.teacher.hidden(tokens)
    kl = token_kl(hidden, model.lm_head.weight, target, twin.teacher.lm_head.weight, layout)
    loss = kl + 0.25 * token_cross_entropy(hidden, model.lm_head.weight, tokens, layout)
    loss.backward()
    torch.testing.assert_close(figures["loss"], loss.detach(), rtol=1e-6, atol=0)
    got, want = dict(job.student.named_parameters()), dict(twin.student.named_parameters())
    for name in got:
        if name.startswith("blocks.0.mixer."):
            torch.testing.assert_close(got[name].grad, want[name].grad, rtol=1e-5, atol=1e-8)
        else:
            assert got[name].grad is None, name
    assert stage.names == [name for name in got if name.startswith("blocks.0.mixer.")]


def test_steps_follow_each_other_and_only_new_mixers_move(tmp_path, make_work):
    job = make_work(layers=(0, 2))
    before = {k: x.clone() for k, x in job.student.state_dict().items()}
    for step, share, layers in (("half", 0.5, (0,)), ("all", 1.0, (0, 2))):
        stage = Stepwise(job, Stepwise.Config(converted=share))
        Loop(stage, Budget(30 * 24), Rate(lr=1e-2), RunFolder(tmp_path / step)).run()
        stage.finish()
        losses = [line["loss"] for line in RunFolder(tmp_path / step).lines()]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
        changed = {k for k, x in job.student.state_dict().items() if not torch.equal(x, before[k])}
        assert {k.split(".mixer.")[0] for k in changed} == {f"blocks.{i}" for i in layers}
    assert all(".mixer." in k for k in changed)


def test_a_stopped_step_goes_on_bit_for_bit(tmp_path, make_work):
    def run(folder, steps, checkpoint=None):
        job = make_work()
        if checkpoint is not None:  # as after `rebuild`: the mapping is not run again
            with torch.no_grad():
                for i in job.layers:
                    for p in job.student.blocks[i].mixer.parameters():
                        p.zero_()
        rate = Rate(lr=1e-2, schedule="constant", warmup=0)
        loop = Loop(Stepwise(job, Stepwise.Config(converted=0.5)), Budget(steps * 24), rate, RunFolder(folder))
        if checkpoint is not None:
            loop.resume(checkpoint)
        loop.run()
        return job.student.state_dict(), [line["loss"] for line in RunFolder(folder).lines()]

    whole, losses = run(tmp_path / "whole", 6)
    run(tmp_path / "part", 3)
    again, rest = run(tmp_path / "rest", 6, RunFolder(tmp_path / "part").load())
    assert rest == losses[3:]
    assert all(torch.equal(x, whole[k]) for k, x in again.items())


def test_refusals(make_work):
    with pytest.raises(ConfigError, match="stepwise: expected converted above 0 and up to 1, got 0"):
        Stepwise.Config(converted=0)
    with pytest.raises(ConfigError, match=r"expected parameters to train in layers \[0\], got none by blocks.2.\*"):
        Stepwise(make_work(train=("blocks.2.*",)), Stepwise.Config(converted=0.5))
    with pytest.raises(ConfigError, match=r"train \*.mlp.\*: no such parameter"):
        Stepwise(make_work(train=("*.mlp.*",)))
