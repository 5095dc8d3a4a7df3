"""RoPE: its relative nature, and every supported scaling against transformers' own frequencies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from subquad.core.attention import RotarySpec
from subquad.core.errors import ConfigError, UnsupportedError
from subquad.ops import rope

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
    scores = [
        (
            rope.rotate(q, rope.tables(spec, torch.tensor([[at + 7]]), q.dtype))
            * rope.rotate(k, rope.tables(spec, torch.tensor([[at]]), q.dtype))
        ).sum()
        for at in (0, 5, 4000)
    ]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scores[2], scores[0], rtol=1e-9, atol=1e-9)


def test_first_pair_turns_by_one_radian_a_token_and_the_rest_passes_through() -> None:
    x = torch.zeros(1, 1, 1, 6, dtype=torch.float64)
    x[..., 0], x[..., 5] = 1.0, 3.0
    y = rope.rotate(x, rope.tables(RotarySpec(10000.0, 4), torch.tensor([[2]]), x.dtype))[0, 0, 0]
    want = torch.tensor([math.cos(2), 0, math.sin(2), 0, 0, 3], dtype=torch.float64)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)


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
