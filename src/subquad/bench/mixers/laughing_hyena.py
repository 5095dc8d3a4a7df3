"""A step of LaughingHyena against one of Hyena by its history, at growing lengths, and what both remember."""

from __future__ import annotations

from functools import partial

import torch

from subquad.bench.harness import Bench
from subquad.mixers.hyena import Hyena
from subquad.mixers.laughing_hyena import LaughingHyena


def run(bench: Bench) -> None:
    """A layer of a published width and 16 modes; before that, what it does in steps is what it does at once."""
    bench.name = "laughing_hyena.layer"
    cuda = bench.device.type == "cuda"
    d, batch, modes = bench.size((768, 64, 16) if cuda else (256, 8, 16), smoke=(8, 2, 2))
    lengths = bench.size((1024, 4096, 16384) if cuda else (256, 1024, 4096), smoke=(20,))
    layer = LaughingHyena(LaughingHyena.Config(d, modes)).to(**bench.factory).requires_grad_(False)
    x_btd = torch.randn(2, 50, d, **bench.factory)
    state, steps = layer.init_state(2), []
    for t in range(50):
        y_btd, update = layer.read(x_btd[:, t : t + 1], state)
        state = update.commit()
        steps.append(y_btd)
    # Sums of fifty terms in another order.
    bench.gate("steps equal one shot", torch.cat(steps, 1), layer(x_btd), rtol=50 * torch.finfo(bench.dtype).eps)
    one = torch.randn(batch, 1, d, **bench.factory)
    for t in lengths:
        slow = Hyena(Hyena.Config(d, t)).to(**bench.factory).requires_grad_(False)
        history = slow.init_state(batch, t)
        history.seen_b.fill_(t - 1)
        shape = {"b": batch, "t": t, "d": d, "modes": modes}
        bench.compare(
            f"step.t{t}",
            partial(layer.read, state=layer.init_state(batch)),
            partial(slow.read, state=history),
            baseline_name="hyena by its history",
            inputs=(one,),
            tokens=batch,
            shape=shape,
        )
        ours, theirs = (mixer.init_state(1, t, device="meta").nbytes for mixer in (layer, slow))
        bench.value(
            f"state.t{t}", ours, "bytes", "lower", baseline="hyena's history", baseline_value=theirs, shape=shape
        )
