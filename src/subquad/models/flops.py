"""Arithmetic of a model, counted from its own layers, and the arithmetic that a device can do at most.

A product of an ``[m, k]`` and a ``[k, n]`` matrix is ``2 m k n``. Counted is what the equations ask for, whatever
kernels do: no recomputation, no masked score, no padding; so that the share of a device's peak is that of
arXiv 2204.02311, appendix B.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator
from functools import cache

import torch
from torch import Tensor, nn

from subquad.core.mixer import Mixer
from subquad.core.state import State
from subquad.models.stack import Stack

# Dense bfloat16 products with float32 sums, in FLOP/s, by words that all stand in a device's name; the row with most of
# them counts. From the manufacturers' data sheets, which quote twice as much where they assume sparsity.
PEAKS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H200 NVL": 835.5e12,
    "H100": 989.4e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307.4e12,
    "MI325X": 1307.4e12,
    "MI250X": 191.5e12,
}

TOKENS = "nws"  # axes of a state that count tokens: of a cache, a window, the sinks
CHANNELS = "kvf"  # those that hold a token's key, value or features


def forward(model: Stack, seq: int, *, layers: int | None = None, head: bool = True) -> float:
    """FLOPs a token of a forward pass over sequences of `seq` tokens.

    Args:
        model: on any device.
        seq: tokens of a sequence.
        layers: only the first so many blocks.
        head: with the head's logits.
    """
    blocks = sum(_matrices(block) + mixing(block.mixer, seq) for block in model.blocks[:layers])
    return blocks + (2.0 * model.lm_head.weight.numel() if head else 0.0)


def training(model: Stack, seq: int, trained: Collection[nn.Parameter] | None = None) -> float:
    """FLOPs a token of forward and backward through the whole model to a loss on its logits.

    The gradient of a matrix costs what its product does, and so does that of its input. A frozen matrix has no gradient
    of its own, and nothing flows back below the first block that has something to train.

    Args:
        model: on any device.
        seq: tokens of a sequence.
        trained: its parameters that are; None is those that require gradients.
    """
    chosen = {id(p) for p in (trained if trained is not None else (p for p in model.parameters() if p.requires_grad))}
    head = model.lm_head.weight
    total = 2.0 * head.numel() * (2 + (id(head) in chosen))  # its input has a gradient whenever anything has
    flows = id(model.embed.weight) in chosen
    for block in model.blocks:
        flows = flows or any(id(p) in chosen for p in block.parameters())
        total += _matrices(block) * (2 if flows else 1) + _matrices(block, chosen)
        total += mixing(block.mixer, seq) * (3 if flows else 1)
    return total


def training_apart(mixer: Mixer, seq: int, trained: Collection[nn.Parameter] | None = None) -> float:
    """FLOPs a token of forward and backward through one mixer alone, whose input needs no gradient.

    The gradients of inputs are counted for all matrices, which is a little too much: those that read the mixer's input
    need none.
    """
    chosen = {id(p) for p in (trained if trained is not None else (p for p in mixer.parameters() if p.requires_grad))}
    return 2 * _matrices(mixer) + _matrices(mixer, chosen) + 3 * mixing(mixer, seq)


def mixing(mixer: Mixer, seq: int) -> float:
    """FLOPs a token of the mixing along time alone, on average over a sequence, read off the mixer's state.

    Keys and values of a token that is seen are multiplied by every query head of their group; an outer-product state is
    written and read once a token (what a delta rule reads of it before it writes is left out).

    Args:
        mixer: of any kind; one that holds others is their sum.
        seq: tokens of the sequence, from an empty state.
    """
    inner = [m for m in mixer.modules() if isinstance(m, Mixer) and m is not mixer]
    if inner:
        return sum(mixing(m, seq) for m in inner if not any(m in other.modules() for other in inner if other is not m))
    heads = getattr(mixer.config, "n_heads", None)  # pyright: ignore[reportAttributeAccessIssue]
    total = 0.0
    for x, axes in _tensors(mixer.init_state(1, seq, device="meta")):
        sizes = dict(zip(axes, x.shape, strict=True))
        channels = [a for a in axes if a in CHANNELS]
        tokens = [a for a in axes if a in TOKENS]
        repeated = heads / sizes["g"] if heads and "g" in sizes else 1
        if len(channels) == 2 and not tokens:
            total += 2 * x.numel() * (1 + repeated)
        elif tokens and channels and channels[0] != "f":
            size = sizes[tokens[0]]
            total += 2 * x.numel() / max(size, 1) * repeated * _mean_seen(size, seq)
    return total


def _mean_seen(size: int, seq: int) -> float:
    """Mean over a sequence of ``min(t, size)``, t from 1."""
    full = min(size, seq)
    return (full * (full + 1) / 2 + (seq - full) * full) / max(seq, 1)


def _matrices(module: nn.Module, chosen: Collection[int] | None = None) -> float:
    """FLOPs a token of the matrices of `module`: every parameter of two axes or more meets every token once."""
    return 2.0 * sum(p.numel() for p in module.parameters() if p.ndim >= 2 and (chosen is None or id(p) in chosen))


def _tensors(state: State) -> Iterator[tuple[Tensor, list[str]]]:
    """Every tensor of `state` with its axes."""
    found: list[tuple[Tensor, list[str]]] = []

    def note(x: Tensor, declared: dict[str, str]) -> Tensor:
        found.append((x, declared["axes"].split()))
        return x

    state.map(note)
    yield from found


def known_peak(name: str) -> float | None:
    """FLOP/s that a device of this name does at most in bfloat16; None where it is not in `PEAKS`."""
    words = set(re.split(r"[^0-9A-Za-z]+", name))
    rows = [row for row in PEAKS if set(row.split()) <= words]
    return PEAKS[max(rows, key=lambda row: len(row.split()))] if rows else None


@cache
def peak_flops(device: torch.device) -> float:
    """FLOP/s that `device` does at most: from its data sheet, or those of a large matrix product where it is not known.

    In bfloat16 on a GPU, in float32 on a CPU, as training has them.
    """
    if device.type == "cuda":
        known = known_peak(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = min(_seconds(lambda: a @ b, device) for _ in range(5))
    return 2.0 * size**3 / seconds


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began
