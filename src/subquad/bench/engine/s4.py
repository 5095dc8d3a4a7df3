"""Generation by a whole stack of S4 blocks beside a Transformer of as many parameters, with random weights.

Ids are ``s4.generate.vs_transformer.<rows>``, rows being ``b64`` and ``largest``, each one's own best batch: tokens a
second of all rows together behind a context of 4k, and under ``whole`` over all of the generation up to it.
"""

from __future__ import annotations

from typing import Any

import torch

from subquad.bench.generating import Generation, Measured, best, compare, forget, generation, measure, prove
from subquad.bench.harness import Bench
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

Layer = dict[str, Any]
HEAD = 64


def models(d: int, depth: int, d_state: int, vocab_size: int, length: int) -> dict[str, ModelConfig]:
    """A Transformer whose SwiGLU is 8/3 as wide, and S4 blocks with one so wide that there are as many parameters."""
    heads = max(1, d // HEAD)
    attention: Layer = {
        "mixer": "attention", "n_heads": heads, "n_kv_heads": heads, "head_dim": d // heads,
        "rotary": {"theta": 1e4, "dim": d // heads},
    }  # fmt: skip

    def config(layer: Layer, d_mlp: int) -> ModelConfig:
        return ModelConfig(vocab_size, d, d_mlp, (layer,) * depth, tied=True, max_positions=length)

    s4: Layer = {"mixer": "s4", "d_state": d_state}
    made = {"transformer": config(attention, 8 * d // 3), "s4": config(s4, 8 * d // 3)}
    more = parameters(made["transformer"]) - parameters(made["s4"])
    # In eights, as matrix products like it.
    return made | {"s4": config(s4, made["s4"].d_mlp + round(more / (3 * d * depth * 8)) * 8)}


def parameters(config: ModelConfig) -> int:
    """How many there are."""
    with torch.device("meta"):
        return sum(p.numel() for p in Stack(config).parameters())


def run(bench: Bench) -> None:
    """12 layers, 768 wide, 124 M parameters, up to 4k tokens; a tiny model on a CPU."""
    bench.name = "s4.generate.vs_transformer"
    cuda = bench.device.type == "cuda"
    full = (768, 12, 64, 50304, 64, 64, 4096) if cuda else (64, 2, 64, 256, 8, 32, 1024)
    d, depth, d_state, vocab_size, few, prompt, context = bench.size(full, smoke=(24, 1, 4, 50, 2, 16, 192))
    found: dict[str, dict[str, Measured | Generation]] = {}
    configs = models(d, depth, d_state, vocab_size, context)
    states: dict[str, int] = {}
    for name, config in configs.items():
        model = Stack(config).to(**bench.factory).requires_grad_(False)
        states[name] = model.init_pool(1, context, 1, device="meta").nbytes
        with torch.no_grad():
            prove(bench, name, model)
            found[name] = {}
            for part, rows in (("b" + str(few), few), ("largest", best(bench, name, model, context, context).rows)):
                here = measure(bench, model, rows, context, {"": rows})
                whole = generation(bench, model, rows, prompt, context - prompt)
                if here is None or whole is None:
                    raise torch.OutOfMemoryError(f"{name}: expected room for {rows} rows; use a larger card")
                found[name] |= {part: here[""], f"whole.{part}": whole}
        del model
        forget(bench)
    shape = {
        "d": d,
        "layers": depth,
        "d_state": d_state,
        "context": context,
        "prompt": prompt,
        "vocab_size": vocab_size,
    }
    shape |= {"parameters": parameters(configs["s4"]), "baseline_parameters": parameters(configs["transformer"])}
    for part, ours in found["s4"].items():
        compare(bench, part, ours, found["transformer"][part], "transformer", {**shape, "weights": "random"})
    bench.value(
        "state_bytes", states["s4"], "bytes", "lower", baseline="transformer", baseline_value=states["transformer"],
        shape={"rows": 1, "context": context},
    )  # fmt: skip
