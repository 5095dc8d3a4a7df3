"""A Hyena language model trained here and distilled at several orders: its perplexity, and how fast both generate."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.bench.harness import Bench
from subquad.convert.laughing_hyena import distil
from subquad.engine.generate import Limits, generate
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

BYTES = 256
ORDERS = (4, 8, 16, 32)


def run(bench: Bench) -> None:
    """Byte by byte on the manual that Python brings along; then greedy generation at growing lengths."""
    bench.name = "laughing_hyena"
    d, depth, length, rows, steps = bench.size((64, 2, 512, 4, 200), smoke=(16, 1, 32, 2, 3))
    text_n = manual()
    held_n, text_n = text_n[: 32 * length], text_n[32 * length :]
    layer = {"mixer": "hyena", "max_len": length}
    torch.manual_seed(0)
    teacher = Stack(ModelConfig(BYTES, d, 2 * d, (layer,) * depth, max_positions=length)).to(bench.device)
    seconds = train(teacher, text_n, length, rows, steps)
    teacher = teacher.requires_grad_(False).eval()
    held_bt = held_n[: len(held_n) // length * length].view(-1, length).to(bench.device)
    start = perplexity(teacher, held_bt)
    bench.say(f"trained for {seconds:.0f} s to a perplexity of {start:.2f} a byte")
    shape = {"parameters": sum(p.numel() for p in teacher.parameters()), "t": length, "train_seconds": seconds}
    students: dict[int, Stack] = {}
    for order in bench.size(ORDERS, smoke=(8,)):
        made = distil(teacher, modes=order // 2, bound=None)
        students[order], errors = made.student, sorted(one.l2 for one in made.fits)
        bench.value(
            f"ppl_ratio.order{order}", perplexity(made.student, held_bt) / start, "1", "lower",
            shape=shape | {"ppl": start, "l2_median": errors[len(errors) // 2], "l2_largest": errors[-1]},
        )  # fmt: skip
    student = students[max(students)]
    whole = student(held_bt[:1])
    bench.gate("steps equal one shot", stepped(student, held_bt[:1]), whole, rtol=1e-3)
    heads = {"mixer": "attention", "n_heads": d // 16, "n_kv_heads": d // 16, "head_dim": 16}
    full = Stack(ModelConfig(BYTES, d, 2 * d, (heads,) * depth, max_positions=length)).to(bench.device)
    full.requires_grad_(False)
    batch = bench.size(8, smoke=2)
    prompts = held_bt[:batch, : length // 32].tolist()
    for new in bench.size((length // 8, length // 2, length - length // 32), smoke=(length // 2,)):
        speeds = [speed(model, prompts, new) for model in (student, teacher, full)]
        for name, baseline, value in (
            ("vs_hyena", "hyena by its history", speeds[1]),
            ("vs_attention", "attention", speeds[2]),
        ):
            bench.value(
                f"throughput.{name}.new{new}", speeds[0], "tokens/s", "higher", baseline=baseline, baseline_value=value,
                shape={"b": batch, "prompt": len(prompts[0]), "new": new, "d": d, "layers": depth},
            )  # fmt: skip


def manual() -> Tensor:
    """The reference manual's topics as bytes, int64."""
    from pydoc_data.topics import topics

    return torch.tensor(list("\n\n".join(topics[key] for key in sorted(topics)).encode()), dtype=torch.int64)


def train(model: Stack, text_n: Tensor, length: int, rows: int, steps: int) -> float:
    """Adam with a rate that rises and falls; seconds taken."""
    rng, began = torch.Generator().manual_seed(0), time.perf_counter()
    adam = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, 3e-3, total_steps=steps)
    for _ in range(steps):
        at_b1 = torch.randint(len(text_n) - length, (rows, 1), generator=rng)
        tokens_bt = text_n[at_b1 + torch.arange(length)].to(model.device)
        adam.zero_grad()
        loss(model, tokens_bt).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        rate.step()
    return time.perf_counter() - began


def loss(model: Stack, tokens_bt: Tensor) -> Tensor:
    """Cross-entropy of each next byte."""
    return F.cross_entropy(model(tokens_bt[:, :-1]).flatten(0, 1), tokens_bt[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: Stack, tokens_bt: Tensor) -> float:
    """Of a byte, over rows from their beginning."""
    return float(torch.stack([loss(model, row[None]) for row in tokens_bt]).mean().exp())


@torch.no_grad()
def stepped(model: Stack, tokens_bt: Tensor) -> Tensor:
    """Logits token by token."""
    state, out = model.init_state(len(tokens_bt)), list[Tensor]()
    for t in range(tokens_bt.shape[1]):
        hidden_btd, update = model.read(tokens_bt[:, t : t + 1], state)
        state = update.commit()
        out.append(model.head(hidden_btd))
    return torch.cat(out, dim=1)


def speed(model: Stack, prompts: Sequence[Sequence[int]], new: int) -> float:
    """New tokens a second, all rows together, once."""
    began = time.perf_counter()
    made = generate(model, prompts, limits=Limits(max_new_tokens=new))
    return sum(len(one.tokens) for one in made) / (time.perf_counter() - began)
