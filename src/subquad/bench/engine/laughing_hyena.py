"""Long generation by LaughingHyena, by Hyena from its history and by attention: one size, each by its best batch.

Weights are random and the filters of Hyena as long as the generation, which no training here reaches: what a round
costs does not ask what the weights say. What distilling costs in quality is `subquad.bench.convert.laughing_hyena`'s.
"""

from __future__ import annotations

from typing import Any

import torch

from subquad.bench.generating import Generation, best, compare, forget, generation, prove
from subquad.bench.harness import Bench
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

BYTES, HEAD = 256, 64
# The shorter of two contexts whose states are compared.
SHORT = 1024
BASELINES = {"hyena": "hyena by its history", "attention": "attention"}


def run(bench: Bench) -> None:
    """At 105 M parameters and order 32, 16k tokens behind a prompt of 512; a tiny model on a CPU."""
    bench.name = "laughing_hyena.throughput"
    cuda = bench.device.type == "cuda"
    full = (1024, 10, 16, 512, 16384) if cuda else (64, 2, 16, 32, 2016)
    d, depth, modes, prompt, new = bench.size(full, smoke=(16, 1, 2, 32, 160))
    length, heads = prompt + new, max(1, d // HEAD)
    contexts = min(SHORT, length // 2), length
    layers: dict[str, dict[str, Any]] = {
        "laughing_hyena": {"mixer": "laughing_hyena", "modes": modes},
        "hyena": {"mixer": "hyena", "max_len": length},
        "attention": {
            "mixer": "attention", "n_heads": heads, "n_kv_heads": heads, "head_dim": d // heads,
            "rotary": {"theta": 1e4, "dim": d // heads},
        },
    }  # fmt: skip
    made: dict[str, Generation] = {}
    states: dict[str, list[int]] = {}
    parameters: dict[str, int] = {}
    for name, layer in layers.items():
        config = ModelConfig(BYTES, d, 2 * d, (layer,) * depth, max_positions=length)
        model = Stack(config).to(**bench.factory).requires_grad_(False)
        parameters[name] = sum(p.numel() for p in model.parameters())
        states[name] = [model.init_pool(1, t, 1, device="meta").nbytes for t in contexts]
        with torch.no_grad():
            prove(bench, name, model)
            rows = best(bench, name, model, prompt + new // 2, length).rows
            whole = generation(bench, model, rows, prompt, new)
        if whole is None:
            raise torch.OutOfMemoryError(f"{name}: expected room for {rows} rows of {length} tokens; use a larger card")
        made[name] = whole
        del model
        forget(bench)
    ours = made.pop("laughing_hyena")
    shape = {"d": d, "layers": depth, "modes": modes, "prompt": prompt, "new": new, "weights": "random"}
    shape |= {f"parameters_{name}": n for name, n in parameters.items()}
    for name, theirs in made.items():
        compare(bench, f"vs_{name}", ours, theirs, BASELINES[name], shape)
        for t, mine, other in zip(contexts, states["laughing_hyena"], states[name], strict=True):
            bench.value(
                f"state_bytes.vs_{name}.t{t}", mine, "bytes", "lower", baseline=BASELINES[name], baseline_value=other,
                shape={"rows": 1, "context": t},
            )  # fmt: skip
        if cuda:
            bench.value(
                f"peak_bytes.vs_{name}", ours.peak_bytes, "bytes", "lower", baseline=BASELINES[name],
                baseline_value=theirs.peak_bytes, shape={"rows": ours.rows, "baseline_rows": theirs.rows},
            )  # fmt: skip
