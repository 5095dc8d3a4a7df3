"""What a training step needs of a device's memory, and how a batch is cut so that it fits."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.mixer import Shared
from subquad.models.flops import forward, peak_flops, training
from subquad.models.stack import Block, Stack
from subquad.train.precision import autocast

GIB = 2**30
# Seconds that a host takes to hand a block's work to a GPU, forward and backward, teacher included (as seen beside an
# H200), and the share of its peak at which a GPU then does it: a part of a batch with less work leaves it waiting.
ISSUE_SECONDS, USUAL_SHARE = 4e-3, 0.4
# What recomputing the forward pass adds to a step.
RECOMPUTED = 4 / 3
# Share of the memory that is left to fragmentation, to workspaces of libraries and to errors of the estimate.
MARGIN = 0.1
# Bytes that the losses take for a chunk of logits at most.
LOGITS = 2**30


@dataclass(frozen=True)
class Plan:
    """How a batch is run.

    Attributes:
        rows: sequences at once, a divisor of the batch; gradients of the parts add up to the batch's.
        recompute: keep only the blocks' inputs for backward.
        needed: bytes that are expected on top of what is taken already.
        free: bytes that were free.
    """

    rows: int
    recompute: bool
    needed: int
    free: int

    def describe(self, batch: int) -> str:
        """The plan in words."""
        at_once = "a batch at once" if self.rows == batch else f"{self.rows} of {batch} sequences at once"
        how = ", activations recomputed" if self.recompute else ""
        return f"{at_once}{how}: about {self.needed / GIB:.1f} GiB of {self.free / GIB:.1f} GiB free"


@dataclass(frozen=True)
class Needs:
    """Bytes of a step on top of the models' weights.

    Attributes:
        fixed: whatever the batch: gradients, moments, copies of weights.
        row: for each sequence.
        row_recomputed: for each sequence where only the blocks' inputs are kept.
        logits: for each sequence, and for all of them never more than `LOGITS`.
    """

    fixed: int
    row: int
    row_recomputed: int
    logits: int = 0

    def of(self, rows: int, recompute: bool) -> int:
        """Bytes for `rows` sequences at once."""
        return self.fixed + rows * (self.row_recomputed if recompute else self.row) + min(rows * self.logits, LOGITS)


def plan_memory(
    teacher: Stack,
    student: Stack,
    trained: Collection[nn.Parameter],
    batch: int,
    seq: int,
    device: torch.device,
    *,
    shards: int = 1,
    layerwise: bool = False,
    free: int | None = None,
) -> Plan:
    """Choose how many sequences run at once, and whether activations are recomputed, from the memory that is free.

    The batch stays what the recipe says: its parts' gradients are added up. Of what fits, the fastest is taken: parts
    large enough to keep the device busy, and recomputed ones only where that makes up for the time it takes.

    Args:
        teacher, student: on `device`, with what a stage has copied of them, before anything was trained.
        trained: parameters of the student that will be.
        batch: sequences of a batch, of this process.
        seq: tokens of a sequence.
        device: where it will run; on a CPU, in the host's memory.
        shards: processes over which weights, gradients and moments are spread.
        layerwise: each layer is trained apart and its activations are gone before the next.
        free: bytes, instead of asking the device.

    Raises:
        ConfigError: not even one sequence fits; says what would.
    """
    free = free_bytes(device) if free is None else free
    needs = measure(student, trained, seq, device, batch=batch, shards=shards, layerwise=layerwise)
    usable = int((1 - MARGIN) * free)

    busy = busy_tokens(teacher, student, trained, seq, device)

    def slowness(choice: tuple[int, bool]) -> float:
        """Time of a step over that of the fastest there could be."""
        rows, recompute = choice
        return (RECOMPUTED if recompute else 1.0) * max(1.0, busy / (rows * seq))

    ways = [n for n in range(batch, 0, -1) if batch % n == 0]
    choices = [(n, how) for how in ((False,) if layerwise else (False, True)) for n in ways]
    fitting = [choice for choice in choices if needs.of(*choice) <= usable]
    if not fitting:
        raise ConfigError(_refusal(needs, seq, device, usable, layerwise))
    rows, recompute = min(fitting, key=slowness)
    return Plan(rows, recompute, needs.of(rows, recompute), free)


def busy_tokens(
    teacher: Stack, student: Stack, trained: Collection[nn.Parameter], seq: int, device: torch.device
) -> float:
    """Tokens at once that keep `device` busy; 1 where the host itself does the work. Arguments as of `plan_memory`."""
    if device.type != "cuda":
        return 1.0
    per_token = forward(teacher, seq) + training(student, seq, trained)
    return ISSUE_SECONDS * USUAL_SHARE * peak_flops(device) * len(student.blocks) / per_token


def _refusal(needs: Needs, seq: int, device: torch.device, usable: int, layerwise: bool) -> str:
    least = needs.of(1, recompute=True)
    how = "" if layerwise else ", activations recomputed"
    text = (
        f"memory of {device}: expected {least / GIB:.2f} GiB for one sequence of {seq} tokens{how}, got "
        f"{usable / GIB:.2f} GiB; it fits "
    )
    per_token = (needs.row_recomputed + needs.logits) / seq
    shorter = int((usable - needs.fixed) / per_token)
    if shorter >= 128:
        text += f"with --seq {shorter // 128 * 128}, or "
    more = math.ceil((least - usable) / (1 - MARGIN) / GIB)
    return text + f"on a device with {more} GiB more, or spread over several with torchrun; or train fewer parameters"


def measure(
    student: Stack,
    trained: Collection[nn.Parameter],
    seq: int,
    device: torch.device,
    *,
    batch: int = 1,
    shards: int = 1,
    layerwise: bool = False,
) -> Needs:
    """Bytes of a step, from what one block of each kind keeps for backward; arguments as of `plan_memory`."""
    kinds = {json.dumps(dict(layer), sort_keys=True): i for i, layer in enumerate(student.config.layers)}
    kept = {kind: kept_bytes(student.blocks[i], student, seq, device) for kind, i in kinds.items()}
    blocks = [kept[json.dumps(dict(layer), sort_keys=True)] for layer in student.config.layers]
    stream = seq * student.config.d_model * 4
    largest = max(row for _, row in blocks)
    parameters = sum(p.numel() * p.element_size() for p in trained)
    # The gradient, both moments, and, while a step clips and updates, at most one more copy of a gradient.
    fixed = 3 * parameters // shards + max((p.numel() * p.element_size() for p in trained), default=0)
    if layerwise:
        # One layer's graph at a time, and of it the largest; beside it the teacher at that layer, whose stream, input,
        # output and next stream are those of the whole batch.
        row = 2 * largest
        return Needs(fixed + 4 * batch * stream + max(once for once, _ in blocks), row, row)
    fixed += 2 * 4 * student.lm_head.weight.numel()  # the head's gradient, as it is summed and as it is handed on
    # Hidden states of both after the last norm, and the gradients of the student's on the way back.
    ends = 6 * stream
    # What a block keeps, its gradients need once more while the block is on its way back.
    plain = sum(row for _, row in blocks) + largest + ends
    recomputed = len(blocks) * stream + 2 * largest + ends
    # Of a chunk's logits, those of both models and copies in float32.
    logits = 24 * seq * student.config.vocab_size
    return Needs(fixed + sum(once for once, _ in blocks), plain, recomputed, logits)


def kept_bytes(block: Block, model: Stack, seq: int, device: torch.device) -> tuple[int, int]:
    """Bytes that `block` keeps for backward: once, as casts of its weights, and for each sequence of `seq` tokens.

    Asked of a forward pass over one sequence and one over two. In training a compiled block keeps less.
    """
    one, two = (_saved(block, rows, model, seq, device) for rows in (1, 2))
    return max(2 * one - two, 0), max(two - one, 0)


def _saved(block: Block, rows: int, model: Stack, seq: int, device: torch.device) -> int:
    sizes: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    held: list[Tensor] = []  # what is let go may lend its address to another

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(x)
        return x

    needed = [p for p in block.parameters() if not p.requires_grad]
    # Drawn apart, so that the training after it draws what it would have drawn.
    own_draws = torch.Generator(device).manual_seed(0)
    shape = (rows, seq, model.config.d_model)
    x_btd = torch.randn(shape, device=device, dtype=model.dtype, generator=own_draws, requires_grad=True)
    layout = Layout.dense(rows, seq, device=device)
    shared = _offered(block, model, x_btd, layout)
    for p in needed:
        p.requires_grad_(True)
    try:
        with torch.enable_grad(), autocast(device), saved_tensors_hooks(keep, lambda x: x):
            block(x_btd, layout, *shared)
    finally:
        for p in needed:
            p.requires_grad_(False)
    return sum(sizes.values())


@torch.no_grad()
def _offered(block: Block, model: Stack, x_btd: Tensor, layout: Layout) -> tuple[Shared, ...]:
    """What layers below `block` offer it, each made of the same stream; nothing where it is neither read nor reads."""
    offers = model.offers()
    for i, lower in enumerate(model.blocks):
        if offers.concern(i):
            if lower is block:
                return (offers.to(i),)
            with autocast(x_btd.device):
                offers.keep(i, lower(x_btd, layout, offers.to(i))[1])
    return ()


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had on `device`: on a GPU what nobody has taken and what PyTorch holds unused."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    try:
        lines: Any = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 2**62  # nobody says: nothing is cut
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
