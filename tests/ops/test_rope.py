"""RoPE: its relative nature, and every supported scaling against transformers' own frequencies."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from subquad.core import constants
from subquad.core.attention import RotarySpec
from subquad.core.errors import ConfigError, UnsupportedError
from subquad.core.layout import Layout
from subquad.ops import backends, rope

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "beta_fast": 16.0,
        "truncate": False,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_equal_those_of_transformers(name: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500000.0, **scaling},
    )
    want, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    got, got_factor = rope.frequencies(RotarySpec(500000.0, 64, scaling))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert got_factor == pytest.approx(factor, rel=1e-9)


def test_scores_depend_on_distance_only() -> None:
    spec = RotarySpec(10000.0, 16)
    q, k = torch.randn(2, 1, 1, 1, 20, dtype=torch.float64)

    def turned(x: torch.Tensor, at: int) -> torch.Tensor:
        return rope.rotate(x, rope.tables(spec, Layout.dense(1, 1, start_b=at), x.dtype))

    scores = [(turned(q, at + 7) * turned(k, at)).sum() for at in (0, 5, 4000)]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scores[2], scores[0], rtol=1e-9, atol=1e-9)


def test_first_pair_turns_by_one_radian_a_token_and_the_rest_passes_through() -> None:
    x = torch.zeros(1, 1, 1, 6, dtype=torch.float64)
    x[..., 0], x[..., 5] = 1.0, 3.0
    y = rope.rotate(x, rope.tables(RotarySpec(10000.0, 4), Layout.dense(1, 1, start_b=2), x.dtype))[0, 0, 0]
    want = torch.tensor([math.cos(2), 0, math.sin(2), 0, 0, 3], dtype=torch.float64)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)


def test_rows_alike_share_one_row_and_packed_documents_have_their_own() -> None:
    spec, x = RotarySpec(10000.0, 4), torch.randn(2, 5, 3, 6, dtype=torch.float64)
    dense = rope.rotate(x, rope.tables(spec, Layout.dense(2, 5, start_b=3), x.dtype))
    starts = Layout.dense(2, 5, start_b=torch.tensor([3, 7]))
    assert rope.tables(spec, Layout.dense(2, 5, start_b=3), x.dtype)[0].shape == (1, 5, 1, 2)
    assert rope.tables(spec, starts, x.dtype)[0].shape == (2, 5, 1, 2)
    torch.testing.assert_close(rope.rotate(x, rope.tables(spec, starts, x.dtype))[0], dense[0], rtol=0, atol=0)
    packed = rope.rotate(x, rope.tables(spec, Layout.packed([[2, 3], [5]]), x.dtype))
    alone = rope.rotate(x[:1, 2:], rope.tables(spec, Layout.dense(1, 3), x.dtype))
    torch.testing.assert_close(packed[:1, 2:], alone, rtol=0, atol=0)


def test_tables_are_made_once_a_layout_and_frequencies_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, list[float]] = {"_turns": [], "frequencies": []}
    monkeypatch.setattr(constants, "_made", {})
    for name, thetas in made.items():
        real = getattr(rope, name)
        monkeypatch.setattr(
            rope, name, lambda spec, *a, real=real, thetas=thetas, **k: thetas.append(spec.theta) or real(spec, *a, **k)
        )
    for layout in (Layout.dense(1, 5), Layout.dense(1, 3)):
        for spec in (RotarySpec(10000.0, 4), RotarySpec(10000.0, 4), RotarySpec(500.0, 4), RotarySpec(10000.0, 4)):
            rope.tables(spec, layout, torch.bfloat16)
        rope.tables(RotarySpec(10000.0, 4, SCALINGS["linear"]), layout, torch.float32)
    assert made["_turns"] == [10000.0, 500.0, 10000.0] * 2
    assert made["frequencies"] == [10000.0, 500.0, 10000.0]


def test_bfloat16_is_rounded_once() -> None:
    x, spec = torch.randn(1, 400, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16(), RotarySpec(10000.0, 8)
    layout = Layout.dense(1, 400)
    got = rope.rotate(x, rope.tables(spec, layout, x.dtype))
    exact = rope.rotate(x.double(), rope.tables(spec, layout, torch.float64))
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).norm() <= 1.01 * (exact.bfloat16().double() - exact).norm()


@pytest.mark.parametrize(
    ("scaling", "error", "says"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, UnsupportedError, "changes its frequencies"),
        ({"rope_type": "yarnn"}, ConfigError, "did you mean 'yarn'"),
        ({"rope_type": "llama3", "factor": 8.0}, ConfigError, "original_max_position_embeddings"),
    ],
)
def test_what_is_not_supported_is_refused(scaling: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        rope.frequencies(RotarySpec(10000.0, 64, scaling))


def test_odd_dim_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be even"):
        rope.frequencies(RotarySpec(10000.0, 5))


@pytest.mark.parametrize("name", ["plain", *SCALINGS])
def test_tables_back_undo_the_turn_of_the_tokens_before_a_layout(name: str) -> None:
    spec = RotarySpec(1e4, 6, SCALINGS.get(name, {}))
    starts_b, window = torch.tensor([3, 5000]), 7
    x_bthk = torch.randn(2, window, 2, 8, dtype=torch.float64)
    turned = rope.rotate(x_bthk, rope.tables(spec, Layout.dense(2, window, start_b=starts_b), torch.float64))
    layout = Layout.dense(2, 4, start_b=starts_b + window)
    back = rope.rotate(turned[:, :4], rope.tables_back(spec, layout, window, 4, torch.float64))
    torch.testing.assert_close(back, x_bthk[:, :4], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "k"), [(16, 16), (6, 20), (64, 64)])
def test_queries_and_keys_in_one_launch_are_each_turned(dim: int, k: int, dtype: torch.dtype) -> None:
    if not (torch.cuda.is_available() or backends.interpreted()):
        pytest.skip("needs Triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q_bthk, k_btgk = (torch.randn(2, 3, h, k, dtype=dtype, device=device) for h in (5, 2))
    for layout in (
        Layout.ragged(torch.tensor([3, 2], device=device), 3, start_b=torch.tensor([5, 100], device=device)),
        Layout.dense(2, 3, device=device),
    ):
        tables = rope.tables(RotarySpec(theta=1e4, dim=dim), layout, dtype)
        with torch.no_grad(), backends.use("triton"):
            got = rope.rotate_both(q_bthk, k_btgk, tables)
        # The kernel may fuse a product and a sum, so that the last bit can differ.
        bound = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
        for y, x in zip(got, (q_bthk, k_btgk), strict=True):
            torch.testing.assert_close(y, rope.rotate(x, tables), rtol=bound, atol=bound)


@pytest.mark.skipif(not (torch.cuda.is_available() or backends.interpreted()), reason="needs Triton")
def test_the_kernels_tables_are_pytorchs() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start_b = torch.tensor([7, 30_000], device=device)
    for layout in (
        Layout.ragged(torch.tensor([3, 1], device=device), 3, start_b=start_b),
        Layout(start_b.clamp(max=3), start_b[:, None] + torch.tensor([0, 5, 2], device=device)),
    ):
        with torch.no_grad():
            made: list[tuple[torch.Tensor, ...]] = []
            for backend in ("torch", "triton"):
                with backends.use(backend):
                    made.append(rope.tables(RotarySpec(500000.0, 24), dataclasses.replace(layout), torch.bfloat16))
        assert made[0][0].shape == made[1][0].shape == (2, 3, 1, 12)
        # The last bits of an angle of 30,000 radians are worth 2e-3.
        torch.testing.assert_close(made[1], made[0], rtol=0, atol=1e-5)
