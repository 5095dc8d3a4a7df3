"""Tokens a second of a conversion's main stage, and where a step's time goes.

Named after the machine, ``convert.h200`` for example, so that runs of several machines stand side by side.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from subquad.bench.harness import Bench
from subquad.bench.results import device_kind
from subquad.convert.transplant import transplant
from subquad.core.layout import Layout
from subquad.data import Batch, TokenStream
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack
from subquad.ops import backends
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import Budget, Loop
from subquad.train.losses import token_kl
from subquad.train.optimiser import Rate
from subquad.train.stages import Machine, Work
from subquad.train.stages.distill import Distill

# The first gives the headline.
STUDENTS = ("windowed_linear", "mamba2", "gated_deltanet")

# What a kernel's name tells, the first match counts; our own kernels are known by their files.
KINDS = {
    "elementwise and norms, compiled": r"^triton_",
    "softmax attention": r"sdpa|flash|fmha",
    "matrix products": r"nvjet|gemm|cutlass|cublas|splitK",
    "optimiser": r"adam|multi_tensor|foreach|lpnorm",
    "copies": r"copy|memcpy|memset|fill",
    "other": r"",
}
OURS = {"linear_loss": "loss of the head", "short_conv": "short convolution"}
RECURRENCE = "recurrence and window"


class Tokens:
    """Random batches, always the same kind of work."""

    def __init__(self, batch: int, time: int, vocab_size: int) -> None:
        self.batch, self.time = batch, time
        self.rows_bt = torch.randint(vocab_size, (batch, time))

    def __next__(self) -> Batch:
        """The next batch."""
        return Batch(self.rows_bt.roll(1, 0))


def run(bench: Bench) -> None:
    """SmolLM2-135M's shape, half its layers converted, every weight trained, against the plain form of the same."""
    gpu = bench.device.type == "cuda"
    bench.name = f"convert.{device_kind(bench.device)}"
    n, d, mlp, vocab = bench.size((30, 576, 1536, 49_152), smoke=(2, 32, 64, 128))
    h, g, k = bench.size((9, 3, 64), smoke=(4, 2, 8))
    b, t = bench.size((32 if gpu else 1, 1024), smoke=(2, 80))
    shape = {"b": b, "t": t, "layers": n, "d": d, "h": h, "g": g, "k": k, "vocab": vocab}
    layer = {"mixer": "attention", "n_heads": h, "n_kv_heads": g, "head_dim": k, "rotary": {"theta": 1e5, "dim": k}}
    teacher = Stack(ModelConfig(vocab, d, mlp, (layer,) * n, tied=True)).to(bench.device)
    stream = cast("TokenStream", Tokens(b, t, vocab))

    for slug in STUDENTS if gpu or bench.smoke else STUDENTS[:1]:
        _compare(bench, slug, teacher, stream, shape | {"student": slug})


def _compare(bench: Bench, slug: str, teacher: Stack, stream: TokenStream, shape: dict[str, Any]) -> None:
    gpu, converted = bench.device.type == "cuda", range(1, len(teacher.blocks), 2)

    def stage(compiled: bool) -> Distill:
        student = transplant(teacher, dict.fromkeys(converted, slug))
        return Distill(Work(teacher, teacher, student, tuple(converted), stream, machine=Machine(compiled=compiled)))

    _gate(bench, slug, stage(False))
    with tempfile.TemporaryDirectory() as folder:
        rate = Rate(1e-4)
        fast = Loop(stage(gpu), Budget(tokens=10**12), rate, RunFolder(Path(folder) / "fast"))
        plain = Loop(stage(False), Budget(tokens=10**12), rate, RunFolder(Path(folder) / "plain"))

        def prototype() -> None:
            with backends.use("torch"):
                plain.step()

        bench.compare(
            "tokens_per_s" if slug == STUDENTS[0] else f"{slug}.tokens_per_s",
            fast.step,
            prototype,
            baseline_name="the same step, PyTorch's forms, not compiled",
            tokens=fast.stage.tokens_per_step,
            shape=shape,
        )
        if gpu:
            _where_time_goes(bench, slug, fast)


def _gate(bench: Bench, slug: str, stage: Distill) -> None:
    """The loss as it is trained on, against float32 and PyTorch's forms throughout."""
    tokens_bt = next(stage.stream).tokens_bt[:2].to(bench.device)
    layout = Layout.dense(*tokens_bt.shape, device=bench.device)
    heads = stage.student.lm_head.weight, stage.teacher.lm_head.weight

    def loss(exact: bool) -> Tensor:
        autocast: Any = nullcontext()
        if bench.device.type == "cuda" and not exact:
            autocast = torch.autocast("cuda", dtype=torch.bfloat16)
        with torch.no_grad(), autocast, backends.use("torch") if exact else nullcontext():
            student_btd, teacher_btd = (m.hidden(tokens_bt, layout) for m in (stage.student, stage.teacher))
            return token_kl(student_btd, heads[0], teacher_btd, heads[1], layout)

    # bfloat16 keeps eight bits, and a KL is a difference of logarithms near each other.
    bench.gate(f"{slug}: the loss", loss(exact=False), loss(exact=True), rtol=0.03)


def _where_time_goes(bench: Bench, slug: str, loop: Loop) -> None:
    """Milliseconds of one step by kind of kernel, and those in which the device waited."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loop.step()
        end.record()
        torch.cuda.synchronize()
    spent: dict[str, float] = defaultdict(float)
    ours = _our_kernels()
    for event in trace.key_averages():
        kind = ours.get(event.key)
        kind = kind or next(kind for kind, names in KINDS.items() if re.search(names, event.key, re.IGNORECASE))
        spent[kind] += float(event.self_device_time_total) / 1e3
    spent["waiting"] = max(start.elapsed_time(end) - sum(spent.values()), 0.0)
    for kind in (*KINDS, *OURS.values(), RECURRENCE, "waiting"):
        bench.value(f"{slug}.time.{re.sub('[^a-z]+', '_', kind)}", spent[kind], "ms", "lower")


def _our_kernels() -> dict[str, str]:
    """Name to kind of every Triton kernel that an operation brings."""
    found: dict[str, str] = {}
    for path in sorted(backends.HERE.glob("*/kernels*.py")):
        names = re.findall(r"^@triton\.jit.*\ndef ([a-z]\w*)", path.read_text(encoding="utf-8"), re.MULTILINE)
        found |= dict.fromkeys(names, OURS.get(path.parent.name, RECURRENCE))
    return found
