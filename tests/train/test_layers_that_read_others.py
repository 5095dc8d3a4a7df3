"""Layers that read what others offer are trained, heard past and measured like all others."""

import copy

import pytest
import torch

from subquad.models.config import ModelConfig
from subquad.models.stack import Stack
from subquad.train.memory import kept_bytes, measure
from subquad.train.stages import Machine, Work
from subquad.train.stages.align import listen
from subquad.train.stages.distill import Distill
from subquad.train.stages.supervise import Supervise

CPU = torch.device("cpu")
FULL = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
MEMORY = {"mixer": "memmamba", "state_dim": 2, "summary_dim": 4, "pool": 3, "take_above": 0.4, "recall_above": 0.2}
LAYERS = (MEMORY, FULL, MEMORY | {"below": 1}, FULL)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Stack(ModelConfig(64, 16, 32, LAYERS))
    for p in model.requires_grad_(False).parameters():
        p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("kind", [Supervise, Distill])
def test_what_is_recomputed_has_the_same_gradients(kind, model, make_stream):
    found = []
    for machine in (Machine(), Machine(recompute=True, rows=1)):
        student = copy.deepcopy(model)
        student.lm_head.weight.mul_(1.5)  # or there would be nothing to distil
        kind(Work(model, model, student, (2,), make_stream(), machine=machine)).step()
        found.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]["blocks.0.mixer.note.weight"].norm() > 0
    # Float32 forward and backward twice over the same numbers, in another order: hundreds of sums of 2^-24 each way.
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, rtol=1e-4, atol=1e-6, msg=name)


def test_layers_between_are_heard_as_in_the_whole_model(model):
    tokens_bt, heard, norms = torch.randint(64, (3, 9)), {}, {}
    for i in (1, 3):
        hook = lambda _, __, x, i=i: norms.update({i: x})  # noqa: E731
        model.blocks[i].norm1.register_forward_hook(hook)
    model.hidden(tokens_bt)
    want = dict(norms)
    listen(model, tokens_bt, [1], lambda i, x, y, _: heard.update({i: x}))  # what lies above is not run
    assert set(heard) == {1}
    listen(model, tokens_bt, [1, 3], lambda i, x, y, _: heard.update({i: x}), rows=2)
    for i in (1, 3):
        torch.testing.assert_close(heard[i], want[i])


def test_what_a_block_keeps_is_measured_with_what_it_reads(model):
    alone = Stack(ModelConfig(64, 16, 32, (MEMORY,) * 4))
    kept, kept_alone = (kept_bytes(m.blocks[2], m, 12, CPU)[1] for m in (model, alone))
    assert kept > kept_alone > 0  # the pool below, and what is looked at there
    assert measure(model, list(model.parameters()), 12, CPU).row > 0
    assert not any(p.requires_grad for p in model.parameters())
