"""The plan follows the memory that is free; what blocks keep is what autograd holds."""

import pytest
import torch

from subquad.core.errors import ConfigError
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack
from subquad.train import memory
from subquad.train.memory import GIB, MARGIN, Needs, kept_bytes, measure, plan_memory

FULL = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
CPU = torch.device("cpu")
D, SEQ, LAYERS = 16, 64, 4


def model(layers=LAYERS, vocab=40):
    return Stack(ModelConfig(vocab, D, 24, (FULL,) * layers))


def plan(monkeypatch, needs, free, batch=8, seq=1024, **options):
    monkeypatch.setattr(memory, "measure", lambda *_, **__: needs)
    monkeypatch.setattr(memory, "busy_tokens", lambda *_: 4096)
    one = model(1)
    return plan_memory(one, one, [], batch, seq, CPU, free=int(free / (1 - MARGIN)) + 1, **options)


def test_all_at_once_then_fewer_then_recomputed(monkeypatch):
    needs = Needs(fixed=100, row=50, row_recomputed=10)
    for free, rows, recompute in (
        (500, 8, False),
        (499, 4, False),
        (299, 8, True),  # two at a time would leave the device idle
        (140, 4, True),
        (110, 1, True),
    ):
        got = plan(monkeypatch, needs, free)
        assert (got.rows, got.recompute) == (rows, recompute), free
        assert got.needed == needs.of(rows, recompute) <= free


def test_small_parts_stay_plain_where_recomputing_costs_more(monkeypatch):
    # 3072 of 4096 tokens: a third more time either way, and the plain one comes first.
    got = plan(monkeypatch, Needs(100, 50, 10), 250, batch=12, seq=1024)
    assert (got.rows, got.recompute) == (3, False)


def test_a_host_is_always_busy_and_a_gpu_with_enough_work(monkeypatch):
    teacher, student = model(), model()
    trained = list(student.parameters())
    assert memory.busy_tokens(teacher, student, trained, SEQ, CPU) == 1
    monkeypatch.setattr(memory, "peak_flops", lambda device: 1e15)
    work = memory.forward(teacher, SEQ) + memory.training(student, SEQ, trained)
    busy = memory.busy_tokens(teacher, student, trained, SEQ, torch.device("cuda"))
    assert busy * work / LAYERS == pytest.approx(4e-3 * 0.4e15)


def test_long_sequences_run_one_at_a_time_before_they_are_recomputed(monkeypatch):
    got = plan(monkeypatch, Needs(100, 50, 10), 199, seq=8192)
    assert (got.rows, got.recompute) == (1, False)
    assert got.describe(8).startswith("1 of 8 sequences at once: about")


def test_rows_divide_the_batch(monkeypatch):
    assert plan(monkeypatch, Needs(0, 10, 10), 59, batch=9, seq=4096).rows == 3
    # Alone, a layer's activations can't be recomputed.
    assert plan(monkeypatch, Needs(0, 10, 1), 25, batch=8, layerwise=True) == memory.Plan(2, False, 20, 28)


def test_logits_take_no_more_than_a_chunk():
    needs = Needs(0, 1, 1, logits=memory.LOGITS // 4)
    assert needs.of(2, False) == 2 + memory.LOGITS // 2
    assert needs.of(8, True) == 8 + memory.LOGITS


def test_what_would_fit_is_said(monkeypatch):
    needs = Needs(1 * GIB, 8 * GIB, 4 * GIB)
    message = (
        r"expected 5.00 GiB for one sequence of 4096 tokens, activations recomputed, got 3.00 GiB; it fits "
        r"with --seq 2048, or on a device with 3 GiB more, or spread over several"
    )
    with pytest.raises(ConfigError, match=message):
        plan(monkeypatch, needs, 3 * GIB, seq=4096)
    with pytest.raises(ConfigError, match=r"got 0.40 GiB; it fits on a device with 6 GiB more"):
        plan(monkeypatch, needs, 0.4 * GIB, seq=4096)


def test_a_block_keeps_what_autograd_holds():
    """A block of two linear layers and a ReLU between them, by hand."""
    one = model(1)

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(D, 40), torch.nn.Linear(40, D)

        def forward(self, x, layout):
            return self.down(self.up(x).relu())

    block = Plain().requires_grad_(False)
    # Kept: the input, and the ReLU's output, which serves its own backward and the second layer's.
    assert kept_bytes(block, one, SEQ, CPU) == (0, SEQ * (D + 40) * 4)
    assert not any(p.requires_grad for p in block.parameters())


def test_needs_grow_with_what_is_trained_and_seen():
    student = model()
    all_of, some = list(student.parameters()), list(student.blocks[0].parameters())
    bytes_of = {id(s): sum(p.numel() * 4 for p in s) for s in (all_of, some)}
    whole, part = (measure(student, s, SEQ, CPU) for s in (all_of, some))
    largest = {id(s): max(p.numel() * 4 for p in s) for s in (all_of, some)}
    between = 3 * (bytes_of[id(all_of)] - bytes_of[id(some)]) + largest[id(all_of)] - largest[id(some)]
    assert whole.fixed - part.fixed == between
    assert whole.fixed - measure(student, all_of, SEQ, CPU, shards=2).fixed == pytest.approx(1.5 * bytes_of[id(all_of)])
    twice = measure(student, all_of, 2 * SEQ, CPU)
    assert 1.9 < twice.row / whole.row < 2.1
    assert whole.row_recomputed < whole.row
    deeper = measure(model(8), all_of, SEQ, CPU)
    block = kept_bytes(student.blocks[0], student, SEQ, CPU)[1]
    assert deeper.row - whole.row == 4 * block
    assert deeper.row_recomputed - whole.row_recomputed == 4 * SEQ * D * 4
    apart = measure(student, all_of, SEQ, CPU, layerwise=True)
    assert apart.row == measure(model(8), all_of, SEQ, CPU, layerwise=True).row


def test_a_real_plan_on_this_machine():
    teacher, student = model().requires_grad_(False), model()
    got = plan_memory(teacher, student, list(student.parameters()), 4, SEQ, CPU)
    assert (got.rows, got.recompute) == (4, False)
    assert got.needed < got.free < 2**62
