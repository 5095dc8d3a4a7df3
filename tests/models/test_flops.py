"""Counted arithmetic against arithmetic by hand and PyTorch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from subquad.models import flops
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

D, MLP, VOCAB, H, G, K = 32, 48, 50, 4, 2, 8
FULL = {"mixer": "attention", "n_heads": H, "n_kv_heads": G, "head_dim": K}
LINEAR = D * (H + 2 * G) * K + H * K * D + 3 * D * MLP  # weights of a block with attention


def model(*layers):
    return Stack(ModelConfig(VOCAB, D, MLP, layers))


def test_forward_by_hand():
    seq = 10
    seen = sum(range(1, seq + 1)) / seq
    want = 2 * (2 * LINEAR + 2 * seen * 2 * H * K) + 2 * VOCAB * D
    assert flops.forward(model(FULL, FULL), seq) == pytest.approx(want)
    one = 2 * LINEAR + 4 * seen * H * K
    assert flops.forward(model(FULL, FULL), seq, layers=1, head=False) == pytest.approx(one)


def test_matrices_are_what_pytorch_counts():
    student = model(FULL, FULL).requires_grad_(True)
    seq = 16
    tokens = torch.randint(VOCAB, (1, seq))
    with FlopCounterMode(display=False) as counter:
        student(tokens).sum().backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counts.items() if op in ("aten.mm", "aten.addmm"))
    mixing = sum(3 * flops.mixing(block.mixer, seq) for block in student.blocks)
    assert (flops.training(student, seq) - mixing) * seq == pytest.approx(products)


def test_mixing_of_each_kind():
    seq = 100
    window = model(FULL | {"window": 7, "sinks": 3}).blocks[0].mixer
    near = (7 * 8 / 2 + 93 * 7) / 100
    first = (3 * 4 / 2 + 97 * 3) / 100
    assert flops.mixing(window, seq) == pytest.approx(4 * H * K * (near + first))
    mamba = model({"mixer": "mamba2", "n_heads": 4, "key_dim": 6, "value_dim": 8}).blocks[0].mixer
    assert flops.mixing(mamba, seq) == pytest.approx(4 * 4 * 6 * 8)
    far = FULL | {"mixer": "windowed_linear", "window": 7, "sinks": 3, "features": 5}
    linear = 2 * G * 5 * (K + 1) + 2 * H * 5 * (K + 1)
    assert flops.mixing(model(far).blocks[0].mixer, seq) == pytest.approx(4 * H * K * (near + first) + linear)
    parts = [FULL | {"n_heads": 2, "n_kv_heads": 1}, FULL | {"n_heads": 2, "n_kv_heads": 1, "window": 7}]
    both = model({"mixer": "parallel", "parts": parts}).blocks[0].mixer
    assert flops.mixing(both, seq) == pytest.approx(4 * 2 * K * (50.5 + near))


def test_frozen_parameters_have_no_gradient_of_their_own():
    student, seq = model(FULL, FULL, FULL), 12
    mix = flops.mixing(student.blocks[0].mixer, seq)
    head = 2 * VOCAB * D
    forward = flops.forward(student, seq)
    assert flops.training(student, seq) == pytest.approx(3 * forward)
    # One matrix in the second block: nothing flows back below it.
    chosen = [student.blocks[1].mlp.up_proj.weight]
    want = forward + head + 2 * (2 * LINEAR + 2 * mix) + 2 * D * MLP
    assert flops.training(student, seq, chosen) == pytest.approx(want)
    student.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)
    assert flops.training(student, seq) == pytest.approx(want)
    mixer = student.blocks[0].mixer.requires_grad_(True)
    attention = D * (H + 2 * G) * K + H * K * D
    assert flops.training_apart(mixer, seq) == pytest.approx(3 * (2 * attention + mix))


def test_peaks_by_name():
    for name, peak in (
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("NVIDIA GeForce GTX 1080", None),
    ):
        assert flops.known_peak(name) == peak, name
    assert 1e8 < flops.peak_flops(torch.device("cpu")) < 1e15
