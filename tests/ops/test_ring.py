"""The ring that decodes: courses of blocks of which some tokens are kept, against the mixer's plain state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from subquad.core.layout import Layout
from subquad.core.mixer import Mixer
from subquad.core.registry import load
from subquad.ops import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not backends.triton_runs(), reason="needs Triton")

LAYERS: dict[str, dict[str, Any]] = {
    "window": {"mixer": "attention", "n_heads": 4, "n_kv_heads": 1, "head_dim": 8, "window": 7},
    "window and sinks": {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "window": 6, "sinks": 3},
    "linear": {"mixer": "windowed_linear", "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "window": 7, "sinks": 2},
    "window of one": {
        "mixer": "windowed_linear",
        "n_heads": 2,
        "n_kv_heads": 2,
        "head_dim": 8,
        "window": 1,
        "sinks": 0,
    },
    "wide": {"mixer": "windowed_linear", "n_heads": 3, "n_kv_heads": 1, "head_dim": 64, "window": 64, "sinks": 4},
}
BLOCK = 5


def build(name: str, dim: int | None) -> Mixer:
    values = dict(LAYERS[name])
    slug = values.pop("mixer")
    if slug == "windowed_linear":
        values["features"] = 20
    rotary = None if dim is None else {"theta": 100.0, "dim": dim}
    cls: type[Mixer] = load("mixers", slug)
    mixer = cls(cls.Config(d_model=32, rotary=rotary, **values)).to(DEVICE)
    with torch.no_grad():
        for x in mixer.parameters():
            x.normal_(std=0.3)
    return mixer


@pytest.mark.parametrize("dim", [None, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_a_course_of_blocks_is_what_the_plain_state_gives(name: str, dim: int | None) -> None:
    mixer, b = build(name, dim), 3
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, BLOCK + 1, (7,), generator=generator).tolist()
    if name == "wide":  # more queries than one program takes
        lengths = [16, 3]
    with torch.no_grad(), backends.use("triton"):
        plain, pool = mixer.init_state(b), mixer.init_pool(b, 0, max(lengths))
        seen_b = torch.zeros(b, dtype=torch.int64, device=DEVICE)
        if name == "wide":  # a prompt longer than the window comes in the plain form
            prompt = torch.randn(b, 90, 32, generator=generator).to(DEVICE)
            plain = mixer.read(prompt, plain, Layout.dense(b, 90, device=DEVICE))[1].commit()
            pool.write_(None, plain)
            seen_b += 90
        for t in lengths:
            x_btd = torch.randn(b, t, 32, generator=generator).to(DEVICE)
            n_b = torch.randint(0, t + 1, (b,), generator=generator).to(DEVICE)
            layout = Layout.dense(b, t, start_b=seen_b, device=DEVICE)
            with backends.use("torch"):
                want, update = mixer.read(x_btd, plain, layout)
                plain = update.commit(n_b)
            mixer.read(torch.randn_like(x_btd), pool, layout)  # forgotten: nothing of it may be seen
            got, update = mixer.read(x_btd, pool, layout)
            value = update.commit(n_b)
            update.commit_(pool, None, n_b)
            seen_b = seen_b + n_b
            # Float32 sums in another order, and features of keys that were turned there and back, a rounding each.
            torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)
        for settled in (pool.settled(), value):
            for (where, x), (_, y) in zip(settled.tensors(), plain.tensors(), strict=True):
                x, y = (part.clone() for part in (x, y))
                if "sink" in where:  # a slot of a token that has not come may hold anything
                    for row, seen in enumerate(seen_b.tolist()):
                        x[row, :, seen:], y[row, :, seen:] = 0, 0
                if "window_k" in where or "window_v" in where:
                    for row, seen in enumerate(seen_b.tolist()):
                        x[row, :, : max(x.shape[2] - seen, 0)], y[row, :, : max(x.shape[2] - seen, 0)] = 0, 0
                torch.testing.assert_close(x, y, rtol=2e-4, atol=2e-5, msg=lambda m, w=where: f"{w}: {m}")


def test_rows_that_come_from_the_plain_form_and_go_back_are_the_same() -> None:
    mixer = build("linear", 8)
    with torch.no_grad(), backends.use("triton"):
        x_btd = torch.randn(2, 11, 32, device=DEVICE)
        plain = mixer.read(x_btd, mixer.init_state(2), Layout.dense(2, 11, device=DEVICE))[1].commit()
        pool = mixer.init_pool(4, 0, BLOCK)
        rows = torch.tensor([3, 1], device=DEVICE)
        pool.write_(rows, plain)
        again = pool.select(rows).settled()
    for (name, x), (_, y) in zip(again.tensors(), plain.tensors(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
