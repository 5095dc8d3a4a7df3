"""The selective scan and Mamba's mixer against those of transformers, a loop over tokens where mamba-ssm is missing."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.bench.harness import Bench
from subquad.core.layout import Layout
from subquad.mixers.attention import Attention
from subquad.mixers.mamba1 import Mamba1
from subquad.ops import selective_scan

THEIRS = "transformers' MambaMixer, PyTorch path"


def run(bench: Bench) -> None:
    """A layer of Mamba-130M's shape: the scan alone, the mixer forward and in training, a decode step, the state."""
    b, t, d_model, n = bench.size((1, 2048, 768, 16), smoke=(1, 70, 16, 4))
    mixer = Mamba1(Mamba1.Config(d_model, state_dim=n)).to(**bench.factory)
    theirs = _theirs(mixer).to(bench.device)
    shape = {"b": b, "t": t, "d": d_model, "d_inner": 2 * d_model, "n": n}
    x_btd = torch.randn(b, t, d_model, **bench.factory)
    _prove(bench, mixer, theirs, x_btd)

    scan = _arguments(bench, b, t, 2 * d_model, n)
    bench.compare(
        f"scan.t{t}",
        lambda *given: selective_scan.scan(*given)[0],
        _their_scan,
        baseline_name="transformers' mamba_selective_scan, a loop over tokens",
        inputs=scan,
        tokens=b * t,
        shape=shape,
    )
    with torch.no_grad():
        bench.compare(f"fwd.t{t}", mixer, theirs, baseline_name=THEIRS, inputs=(x_btd,), tokens=b * t, shape=shape)

    def training(layer: nn.Module, x_btd: Tensor) -> None:
        layer(x_btd).sum().backward()

    # A token of theirs costs a gradient as large as the whole sequence, so that theirs is quadratic in its length.
    few = bench.size(128, smoke=t)
    steps, some = (partial(training, mixer), partial(training, theirs)), (x_btd[:, :few].contiguous(),)
    sizes = shape | {"t": few}
    bench.compare(f"train.t{few}", *steps, baseline_name=THEIRS, inputs=some, tokens=b * few, shape=sizes)
    _steps(bench, mixer.requires_grad_(False), theirs.requires_grad_(False), t, shape)


def _steps(bench: Bench, mixer: Mamba1, theirs: Any, t: int, shape: dict[str, Any]) -> None:
    """A decode step behind t tokens, and the state against a key/value cache of as many."""
    from transformers import DynamicCache

    batch, d_model = 8, mixer.config.d_model
    prompt, one = (torch.randn(batch, k, d_model, **bench.factory) for k in (4, 1))
    cache: Any = DynamicCache(config=theirs.config)
    theirs(prompt, cache=cache)
    state = mixer.read(prompt, mixer.init_state(batch))[1].commit()
    at = Layout.dense(batch, 1, start_b=t, device=bench.device)

    def ours(x_btd: Tensor) -> None:
        mixer.read(x_btd, state, at)[1].commit_(state)

    bench.compare(
        f"step.t{t}",
        ours,
        partial(theirs, cache=cache),
        baseline_name=THEIRS,
        inputs=(one,),
        tokens=batch,
        shape=shape | {"b": batch},
    )
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


def _prove(bench: Bench, mixer: Mamba1, theirs: nn.Module, x_btd: Tensor) -> None:
    """The scan is the equation, and both mixers are the same."""
    b, t, d_inner, n = 1, min(300, x_btd.shape[1]), 2 * mixer.config.d_model, mixer.config.state_dim
    short = _arguments(bench, b, t, d_inner, n)
    exact, naive = selective_scan.equation(*(x.double() for x in short)), selective_scan.equation(*short)
    for what, got, want, rough in zip(("y", "final state"), selective_scan.scan(*short), exact, naive, strict=True):
        bench.gate(f"chunked {what} equals the loop", got, want, naive=rough)
    with torch.no_grad():
        want = theirs.double()(x_btd[:, :t].double())
        naive = theirs.to(bench.dtype)(x_btd[:, :t])
        bench.gate("the mixer equals transformers'", mixer(x_btd[:, :t]), want, naive=naive)


def _arguments(bench: Bench, b: int, t: int, d: int, n: int) -> tuple[Tensor, ...]:
    """At Mamba's start: rates from 1 to n, steps from a thousandth to a tenth."""
    u = torch.randn(b, t, d, **bench.factory)
    dt = F.softplus(torch.randn(b, t, d, device=bench.device) - 4)
    A = -torch.arange(1.0, n + 1, device=bench.device).expand(d, n)
    B, C = (torch.randn(b, t, 1, n, **bench.factory) for _ in range(2))
    return u, dt, A, B, C, torch.ones(d, device=bench.device), torch.zeros(b, d, n, device=bench.device)


def _their_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, _: Tensor) -> Tensor:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    return mamba_selective_scan(u.mT, dt.mT, A, B[:, :, 0].mT, C[:, :, 0].mT, D).mT


def _theirs(mixer: Mamba1) -> Any:
    """The mixer of transformers with the same weights."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config, ssm = mixer.config, mixer.ssm
    theirs = MambaMixer(MambaConfig(hidden_size=config.d_model, state_size=config.state_dim, num_hidden_layers=1), 0)
    named = {
        "conv1d.weight": ssm.conv_weight[:, None],
        "conv1d.bias": ssm.conv_bias,
        "x_proj.weight": ssm.x_proj.weight,
        "dt_proj.weight": ssm.dt_proj.weight,
        "dt_proj.bias": ssm.rates.dt_bias,
        "A_log": ssm.rates.A_log,
        "D": ssm.rates.D,
        "in_proj.weight": mixer.in_proj.weight,
        "out_proj.weight": mixer.out_proj.weight,
    }
    theirs.load_state_dict({name: x.detach() for name, x in named.items() if x is not None})
    return theirs.to(mixer.out_proj.weight.dtype).eval()
