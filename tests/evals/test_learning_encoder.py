"""Batch norms over the tokens of a batch, and the encoder that has them."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from subquad.core.errors import ConfigError
from subquad.evals.learning import load_task
from subquad.evals.learning import model as learning_model
from subquad.evals.learning.batches import Batches
from subquad.evals.learning.encoder import BatchNorm
from subquad.evals.learning.model import Learner, layers_of
from subquad.evals.learning.stage import TaskStage
from subquad.evals.learning.stage import tested as looked_at
from subquad.evals.learning.task import Batch
from subquad.ops import state_space

OPTIONS = {"s4": {"bidirectional": True, "d_state": 4}}


def learner(task, mixers=("s4",), d_mlp=0):
    torch.manual_seed(0)
    return Learner(task, layers_of(mixers, 2, 8, OPTIONS, task), 8, d_mlp, "batch").double()


def test_padding_is_no_part_of_the_statistics():
    """As PyTorch's batch norm over the tokens alone: outputs, gradients, and what tests use later."""
    torch.manual_seed(0)
    x_btd = (3 * torch.randn(3, 5, 4, dtype=torch.float64) + 2).requires_grad_()
    valid_bt = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    ours, theirs = BatchNorm(4, 1e-5).double(), nn.BatchNorm1d(4).double()
    weight = torch.randn(4, dtype=torch.float64)
    for norm in (ours, theirs):
        nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(1))
        norm.weight.data.copy_(weight)
    toward = torch.randn(10, 4, dtype=torch.float64)
    found = []
    for y_nd, norm in ((ours(x_btd, valid_bt)[valid_bt], ours), (theirs(x_btd[valid_bt]), theirs)):
        gradients = torch.autograd.grad((y_nd * toward).sum(), [x_btd, norm.weight, norm.bias])
        found.append([y_nd, *gradients])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close([ours.mean, ours.var], [theirs.running_mean, theirs.running_var], rtol=1e-9, atol=0)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x_btd, valid_bt)[valid_bt], theirs(x_btd[valid_bt]), rtol=1e-9, atol=1e-12)


def test_whole_rows_are_normed_as_rows_with_padding_are():
    torch.manual_seed(0)
    x_btd = torch.randn(2, 6, 4, dtype=torch.float64) + 5
    whole, masked = BatchNorm(4, 1e-5).double(), BatchNorm(4, 1e-5).double()
    every_bt = torch.ones(2, 6, dtype=torch.bool)
    torch.testing.assert_close(whole(x_btd, None), masked(x_btd, every_bt), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(whole.state_dict(), masked.state_dict(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("d_mlp", [0, 16])
def test_padding_does_not_reach_an_encoder_s_row(d_mlp):
    """In training neither what stands behind a row's end nor how much of it; in tests no other row either."""
    task = load_task("listops", ["short"])
    model, batch = learner(task, d_mlp=d_mlp), task.batch("train", 0, 0, 4)
    other = batch.widened(batch.inputs.shape[1] + 9)
    for row, n in zip(other.inputs, batch.lengths_b.tolist(), strict=True):
        row[n:] = 7
    torch.testing.assert_close(model(batch), model(other))
    model.eval()
    alone = torch.cat([model(batch.rows(i, i + 1)) for i in range(4)])
    torch.testing.assert_close(model(batch), alone)


def test_what_most_images_share_does_not_drown_what_tells_them_apart():
    """Pooled over its pixels, an image differs from others by as much as it is like them; with RMS norms by 1 %."""
    task = load_task("pathfinder", ["32"])
    batch = task.batch("train", 0, 0, 8)
    apart = {}
    for norm in ("rms", "batch"):
        torch.manual_seed(0)
        model = Learner(task, layers_of(["s4"], 2, 16, OPTIONS, task), 16, 0, norm)
        pooled_bd = []
        model.stack.norm.register_forward_hook(lambda _, __, x, to=pooled_bd: to.append(x.detach().mean(1)))
        model(batch)
        apart[norm] = float((pooled_bd[0] - pooled_bd[0].mean(0)).norm() / pooled_bd[0].norm())
    assert apart["rms"] < 0.1 and apart["batch"] > 0.5


def test_a_look_at_held_out_rows_teaches_nothing():
    task = load_task("listops", ["short"])
    model = learner(task)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    first = looked_at(model, task.batch("test", 0, 0, 6), 4)
    assert model.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    # Rows are tested alone: how many at once changes nothing.
    torch.testing.assert_close(first[2], looked_at(model, task.batch("test", 0, 0, 6), 2)[2])


def test_an_encoder_learns():
    """A row's class is whether its values are above 0 in the mean: 40 steps are enough for a layer."""
    task = load_task("pathfinder", ["32"])
    torch.manual_seed(0)
    model = Learner(task, layers_of(["s4"], 1, 8, OPTIONS, task), 8, 0, "batch")
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        targets = torch.randint(0, 2, (16,))
        values = torch.randn(16, 32, 1) + (targets[:, None, None] - 0.5)
        loss = nn.functional.cross_entropy(model(Batch(values, targets, torch.full((16,), 32))), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) / 5 < 0.2 < losses[0]


def test_one_pass_has_all_layers_responses_at_once(monkeypatch):
    """Layers of two kinds: the same outputs and gradients as layer by layer, and nothing is kept behind."""
    task = load_task("listops", ["short"])
    model, batch = learner(task, ("s4", "s4d")), task.batch("train", 0, 0, 3)
    found = []
    for apart in (False, True):
        if apart:
            monkeypatch.setattr(learning_model, "together", lambda *_: contextlib.nullcontext())
        logits = model(batch)
        found.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    layers = [x for x in model.modules() if isinstance(x, state_space.StateSpaceLayer)]
    assert len(layers) == 2 and all(x.responses is None for x in layers)


def test_steps_of_an_encoder_train_it():
    task = load_task("listops", ["short"])
    stage = TaskStage(task, learner(task).float(), Batches(task, 0, 8))
    stage.step()
    assert all(p.grad is not None for p in stage.model.parameters())


def test_an_encoder_hands_nothing_from_layer_to_layer():
    task = load_task("listops", ["short"])
    first, second = layers_of(["memmamba"], 2, 32, {}, task)
    layers = (first, second | {"below": 1})
    with pytest.raises(ConfigError, match="expected a mixer that reads its own input alone, got memmamba"):
        Learner(task, layers, 32, 0, "batch")


@pytest.mark.parametrize(
    ("norm", "task", "message"),
    [
        ("batch", "recall", "--norm batch: expected rms, for the task asks what comes next"),
        ("bach", "listops", "--norm: unknown 'bach'; did you mean 'batch'?"),
    ],
)
def test_a_norm_that_is_none_or_looks_ahead_is_refused(norm, task, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        Learner(load_task(task), (), 8, 0, norm)
