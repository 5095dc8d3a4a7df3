"""MemMamba against Mamba of the same shape: what its pool costs, forward and in a decode step, and what it holds."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from subquad.bench.harness import Bench
from subquad.core.layout import Layout
from subquad.mixers.attention import Attention
from subquad.mixers.mamba1 import Mamba1
from subquad.mixers.memmamba import MemMamba

MAMBA = "mamba1 of the same shape"


def run(bench: Bench) -> None:
    """A layer of Mamba-130M's shape with the paper's pool: forward, decode step, state."""
    b, t, d_model, n, pool = bench.size((1, 2048, 768, 16, 50), smoke=(1, 70, 16, 4, 5))
    mixer = MemMamba(MemMamba.Config(d_model, state_dim=n, pool=pool)).to(**bench.factory).requires_grad_(False)
    torch.nn.init.normal_(mixer.fuse.weight, std=mixer.fuse.in_features**-0.5)
    plain = Mamba1(Mamba1.Config(d_model, state_dim=n)).to(**bench.factory).requires_grad_(False)
    shape = {"b": b, "t": t, "d": d_model, "n": n, "pool": pool}
    x_btd = torch.randn(b, t, d_model, **bench.factory)
    _prove(bench, mixer, x_btd[:, : bench.size(300, smoke=70)])
    bench.compare(f"fwd.t{t}", mixer, plain, baseline_name=MAMBA, inputs=(x_btd,), tokens=b * t, shape=shape)

    batch = 8
    prompt, one = (torch.randn(batch, k, d_model, **bench.factory) for k in (2 * pool, 1))
    layers = {layer: layer.read(prompt, layer.init_state(batch))[1].commit() for layer in (mixer, plain)}
    at = Layout.dense(batch, 1, start_b=2 * pool, device=bench.device)

    def step(layer: Mamba1 | MemMamba, x_btd: Tensor) -> None:
        layer.read(x_btd, layers[layer], at)[1].commit_(layers[layer])

    steps, sizes = (partial(step, mixer), partial(step, plain)), shape | {"b": batch, "t": 2 * pool}
    bench.compare("step", *steps, baseline_name=MAMBA, inputs=(one,), tokens=batch, shape=sizes)
    heads = max(d_model // 64, 1)
    full = Attention(Attention.Config(d_model, heads, heads, d_model // heads)).to(**bench.factory)
    bench.value(
        f"state.t{t}",
        mixer.init_state(1, t, device="meta").nbytes,
        "bytes",
        "lower",
        baseline="full key/value cache",
        baseline_value=full.init_state(1, t, device="meta").nbytes,
        shape=shape,
    )


def _prove(bench: Bench, mixer: MemMamba, x_btd: Tensor) -> None:
    """Read at once is read token by token: of the parallel form only float32's rounding may be different."""
    config = mixer.config
    exact = MemMamba(config).to(bench.device, torch.float64).requires_grad_(False)
    exact.load_state_dict(mixer.state_dict())
    # Next to a threshold rounding would decide, so from here on every token leaves a note and every token recalls.
    for layer in (exact, mixer):
        layer.importance.bias.fill_(8.0)
        layer.forgotten.bias.fill_(8.0)
    state, outputs, naive = exact.init_state(len(x_btd)), [], []
    single = mixer.init_state(len(x_btd))
    for t in range(x_btd.shape[1]):
        at = Layout.dense(len(x_btd), 1, start_b=t, device=bench.device)
        y_btd, update = exact.read(x_btd[:, t : t + 1].double(), state, at)
        state = update.commit()
        outputs.append(y_btd)
        y_btd, update = mixer.read(x_btd[:, t : t + 1], single, at)
        single = update.commit()
        naive.append(y_btd)
    want, rough = torch.cat(outputs, dim=1), torch.cat(naive, dim=1)
    bench.gate("read at once equals single steps", mixer(x_btd), want, naive=rough)
