"""What is particular to mixers side by side: a teacher's heads divided among them add up to the teacher."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from subquad.core.attention import AttentionStats, AttentionWeights, RotarySpec
from subquad.core.errors import ConfigError
from subquad.core.registry import load
from subquad.mixers.parallel import Parallel
from subquad.models.checkpoint import from_pretrained, save_pretrained
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack, build_mixer

D, H, G, K = 24, 8, 4, 6


@pytest.fixture
def source() -> AttentionWeights:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64) / shape[-1] ** 0.5

    return AttentionWeights(
        q_weight=draw(H * K, D),
        k_weight=draw(G * K, D),
        v_weight=draw(G * K, D),
        o_weight=draw(D, H * K),
        n_heads=H,
        n_kv_heads=G,
        head_dim=K,
        scale=0.3,
        q_bias=draw(H * K),
        k_bias=draw(G * K),
        v_bias=draw(G * K),
        o_bias=draw(D),
        q_norm=1 + 0.1 * draw(K),
        k_norm=1 + 0.1 * draw(K),
        rotary=RotarySpec(1000.0, 4),
    )


def parts(*heads: list[int], **options: Any) -> list[dict[str, Any]]:
    return [{"mixer": "attention", "kv_heads": h} | options for h in heads]


@pytest.mark.parametrize("heads", [([0, 1, 2, 3],), ([0, 2], [1, 3]), ([3], [1], [2, 0])])
def test_attention_in_parts_is_the_attention(source: AttentionWeights, heads: tuple[list[int], ...]) -> None:
    x_btd = torch.randn(2, 19, D, dtype=torch.float64)
    whole = load("mixers", "attention").from_attention(source)
    divided = Parallel.from_attention(source, parts=parts(*heads))
    torch.testing.assert_close(divided(x_btd), whole(x_btd), rtol=1e-12, atol=1e-12)


def test_every_part_is_its_own_mapping_of_its_heads(source: AttentionWeights) -> None:
    stats = AttentionStats(torch.arange(1.0, H + 1), torch.linspace(0.5, 2, H), torch.randn(1, 30, D).double())
    options = {"window": 5, "sinks": 1, "features": 3}
    wanted = [
        ("attention", [1, 3], [2, 3, 6, 7], {}),
        ("windowed_linear", [2], [4, 5], options),
        ("mamba2", [0], [0, 1], {"conv_width": 0}),
    ]
    named = [{"mixer": slug, "kv_heads": kv} | own for slug, kv, _, own in wanted]
    mixer = Parallel.from_attention(source, stats, parts=named)
    x_btd, sum_btd = torch.randn(1, 25, D, dtype=torch.float64), 0
    for slug, kv, q, own in wanted:
        sliced = AttentionStats(stats.lookback_h[q], stats.output_rms_h[q], stats.inputs_btd)
        sum_btd = sum_btd + load("mixers", slug).from_attention(source.heads(kv), sliced, **own)(x_btd)
    torch.testing.assert_close(mixer(x_btd), sum_btd, rtol=1e-12, atol=1e-12)


def test_without_parts_the_later_half_of_the_heads_is_linear(source: AttentionWeights) -> None:
    mixer = Parallel.from_attention(source)
    assert [part["mixer"] for part in mixer.config.parts] == ["attention", "windowed_linear"]
    torch.testing.assert_close(mixer.mixers[0].weights().v_weight, source.v_weight[: 2 * K])  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match="got one"):
        Parallel.from_attention(source.heads([1]))


def test_statistics_are_sliced_by_the_axes_of_their_names() -> None:
    @dataclasses.dataclass(frozen=True)
    class More(AttentionStats):
        spread_kh: torch.Tensor | None = None

    stats = AttentionStats(torch.arange(4.0), torch.arange(4.0) + 10, torch.randn(1, 2, 3)).heads([3, 1])
    assert stats.lookback_h.tolist() == [3, 1]
    assert stats.output_rms_h.tolist() == [13, 11]
    assert stats.inputs_btd is not None and stats.inputs_btd.shape == (1, 2, 3)
    more = More(torch.arange(4.0), torch.arange(4.0), spread_kh=torch.arange(8.0).view(2, 4)).heads([2])
    assert more.spread_kh is not None and more.spread_kh.tolist() == [[2], [6]]


def test_the_config_rebuilds_it_and_a_checkpoint_keeps_it(source: AttentionWeights, tmp_path: Any) -> None:
    named = [{"mixer": "attention", "kv_heads": [2, 0]}, {"mixer": "mamba2", "kv_heads": [1, 3]}]
    mixer = Parallel.from_attention(source, parts=named)
    layer = {"mixer": "parallel", "parts": mixer.config.parts}
    assert not any("kv_heads" in part for part in mixer.config.parts)
    assert isinstance(build_mixer(layer, D), Parallel)
    model = Stack(ModelConfig(vocab_size=13, d_model=D, d_mlp=20, layers=(layer,))).double().eval()
    model.blocks[0].mixer.load_state_dict(mixer.state_dict())
    save_pretrained(model, tmp_path / "model")
    again = from_pretrained(tmp_path / "model")
    tokens_bt = torch.randint(13, (2, 17))
    torch.testing.assert_close(again(tokens_bt), model(tokens_bt), rtol=0, atol=0)
    y_btd = torch.randn(1, 9, D, dtype=torch.float64)
    torch.testing.assert_close(again.blocks[0].mixer(y_btd), mixer(y_btd), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("named", "says"),
    [
        (parts([0, 1], [1, 2, 3]), r"in one part each.*\[1\]"),
        (parts([0], [2]), r"all in some part.*\[1, 3\]"),
        (parts([0, 1, 2, 3, 4]), r"of the layer.*\[4\]"),
        (parts([0, 1, 2, 3], []), "different heads"),
        ([{"mixer": "attention"}], "'mixer' and 'kv_heads'"),
        (parts([0, 1, 2, 3], windw=3), "windw"),
        ([{"mixer": "attentin", "kv_heads": [0, 1, 2, 3]}], "attention"),
    ],
)
def test_heads_that_do_not_divide_are_refused(source: AttentionWeights, named: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Parallel.from_attention(source, parts=named)


def test_options_and_configs_that_mean_nothing_are_refused(source: AttentionWeights) -> None:
    with pytest.raises(ConfigError, match="in their part"):
        Parallel.from_attention(source, parts=parts([0, 1, 2, 3]), window=4)
    with pytest.raises(ConfigError, match="at least one"):
        Parallel.Config(8, ())
    with pytest.raises(ConfigError, match="key 'mixer'"):
        Parallel.Config(8, ({"window": 3},))
    with pytest.raises(ConfigError, match=r"parts\[0\], mixer attention"):
        Parallel(Parallel.Config(8, ({"mixer": "attention", "n_heads": 1},)))
