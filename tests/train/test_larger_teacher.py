"""A student that starts from a small model and learns the distribution of a larger one, of other width and depth."""

import pytest
import torch

from subquad.core.layout import Layout
from subquad.data import Batch
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack
from subquad.train.stages import Machine, Work
from subquad.train.stages.distill import Distill

SMALL = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}
LARGE = {"mixer": "attention", "n_heads": 3, "n_kv_heads": 3, "head_dim": 10, "rotary": {"theta": 5e5, "dim": 10}}
LAYERS = (0,)


class Same:
    """The same batch at every step."""

    batch, time = 3, 11

    def __init__(self):
        self.tokens_bt = torch.randint(1, 40, (self.batch, self.time), generator=torch.Generator().manual_seed(3))

    def __next__(self):
        return Batch(self.tokens_bt)


def work(dtype=torch.float64, **machine):
    torch.manual_seed(0)
    start = Stack(ModelConfig(40, 16, 24, (SMALL,) * 2, tied=True)).to(dtype)
    student = Stack(ModelConfig(40, 16, 24, (SMALL | {"window": 3}, SMALL), tied=True)).to(dtype)
    student.load_state_dict(start.state_dict())
    teacher = Stack(ModelConfig(40, 28, 36, (LARGE,) * 5, max_positions=64)).to(dtype)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(5)
    return Work(teacher, start, student, LAYERS, Same(), machine=Machine(**machine))


@pytest.mark.parametrize("machine", [{}, {"rows": 1}, {"recompute": True}])
def test_loss_and_gradients_are_those_of_the_definition(machine):
    given = work(**machine)
    given.teacher.requires_grad_(False)
    figures = Distill(given).step()
    tokens_bt = given.stream.tokens_bt
    layout = Layout.dense(*tokens_bt.shape)
    student = given.student
    p, q = (model(tokens_bt, layout)[:, :-1].log_softmax(-1) for model in (given.teacher, student))
    loss = (p.exp() * (p - q)).sum(-1).mean()
    assert float(figures["kl"]) == pytest.approx(loss.item(), rel=1e-9)
    expected = torch.autograd.grad(loss, list(student.parameters()))
    for parameter, gradient in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_the_student_comes_nearer_to_the_teacher_and_neither_model_beside_it_moves():
    given = work(torch.float32)
    before = [x.clone() for model in (given.teacher, given.source) for x in model.state_dict().values()]
    stage = Distill(given)
    optimiser = torch.optim.AdamW(given.student.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        losses.append(float(stage.step()["kl"]))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    assert losses[-1] < 0.2 * losses[0]
    after = [x for model in (given.teacher, given.source) for x in model.state_dict().values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
