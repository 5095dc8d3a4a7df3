"""Ranking every layer with shared streams against a full forward pass for each cut."""

from __future__ import annotations

from dataclasses import replace

import torch

from subquad.bench.harness import Bench
from subquad.evals.perplexity import perplexity
from subquad.evals.text import TextTokens
from subquad.inspect.window_cut import WindowCut
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack


def run(bench: Bench) -> None:
    """A SmolLM2-135M-shaped model: all one-at-a-time cuts of one window of text."""
    layers, context, d_model, n_heads, n_kv_heads, head_dim, vocab = bench.size(
        (30, 1024, 576, 9, 3, 64, 49152), smoke=(3, 64, 32, 4, 2, 8, 97)
    )
    window, sinks = bench.size((64, 4), smoke=(8, 2))
    layer = {"mixer": "attention", "n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
    config = ModelConfig(vocab, d_model, d_model * 8 // 3, (layer,) * layers, tied=True)
    model = Stack(config).to(**bench.factory).eval()
    ids = torch.randint(vocab, (context,))
    text = TextTokens(ids, torch.ones_like(ids))
    cut = WindowCut(model, text, window=window, sinks=sinks, context=context)

    def one_by_one() -> torch.Tensor:
        losses: list[torch.Tensor] = []
        for i in range(layers):
            changed = (*config.layers[:i], layer | {"window": window, "sinks": sinks}, *config.layers[i + 1 :])
            with torch.device("meta"):
                student = Stack(replace(config, layers=changed))
            student.load_state_dict(model.state_dict(), assign=True)
            losses.append(perplexity(student, text, context).nll_wt.mean(1))
        return torch.cat(losses)

    def shared() -> torch.Tensor:
        return torch.cat([m.loss_w for key, m in cut.toggle((), cut.units).items() if key is not None])

    want = one_by_one()
    rtol = 1e3 * torch.finfo(bench.dtype).eps
    bench.gate("every cut equals the model rebuilt with it", shared(), want, rtol=rtol)
    shape = {"layers": layers, "t": context, "d": d_model, "w": window, "s": sinks}
    bench.compare(
        "rank", shared, one_by_one, baseline_name="a forward pass a cut", tokens=context * layers, shape=shape
    )
