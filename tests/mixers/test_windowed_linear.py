"""What is particular to the windowed linear layer: its equation, its two limits, and its start from text."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from subquad.core.attention import AttentionStats
from subquad.core.errors import CheckpointError, ConfigError, UnsupportedError
from subquad.core.layout import Layout
from subquad.mixers.attention import Attention
from subquad.mixers.windowed_linear import WindowedLinear, WindowedLinearState, WindowedLinearUpdate, equal_window
from subquad.ops import backends

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def teacher(**options: object) -> Attention:
    torch.manual_seed(0)
    values = {"rotary": {"theta": 1000.0, "dim": 8}, "qkv_bias": True} | options
    config = Attention.Config(d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, **values)  # pyright: ignore[reportArgumentType]
    return Attention(config).double().requires_grad_(False)


def equation(mixer: WindowedLinear, x_btd: Tensor) -> Tensor:
    """The class's equation with a sum for every query, no chunk and no state."""
    config, (b, t) = mixer.config, x_btd.shape[:2]
    r = config.n_heads // config.n_kv_heads
    plain_q, plain_k, v = mixer.qkv.project(x_btd)
    q, k = mixer.qkv.rotate(plain_q, plain_k, Layout.dense(b, t))
    out = torch.zeros(b, t, config.n_heads, config.head_dim, dtype=x_btd.dtype)
    features = mixer.key_features(plain_k)
    behind = torch.tensor([max(0, i + 1 - config.window - config.sinks) for i in range(t)])
    logits = torch.einsum("bthk,hkf->bthf", plain_q, mixer.q_map_weight) / config.head_dim**0.5 + mixer.q_map_bias
    weights = logits.exp() * (1 + behind / config.window)[None, :, None, None] ** -mixer.q_map_fade[:, None]
    for i in range(t):
        for h in range(config.n_heads):
            numerator, denominator = (
                torch.zeros(b, config.head_dim, dtype=x_btd.dtype),
                torch.zeros(b, 1, dtype=x_btd.dtype),
            )
            for j in range(i + 1):
                if i - j < config.window or j < config.sinks:
                    a = (mixer.scale * (q[:, i, h] * k[:, j, h // r]).sum(-1)).exp()
                else:
                    a = (weights[:, i, h] * features[:, j, h // r]).sum(-1)
                numerator, denominator = numerator + a[:, None] * v[:, j, h // r], denominator + a[:, None]
            out[:, i, h] = numerator / denominator
    return mixer.o_proj(out.flatten(2))


def test_output_is_the_equation() -> None:
    source = teacher()
    mixer = WindowedLinear.from_attention(source.weights(), window=4, sinks=2, features=3)
    with torch.no_grad():
        for p in (mixer.q_map_weight, mixer.k_map_weight):
            p.copy_(torch.randn_like(p))
        mixer.q_map_bias.copy_(0.3 * torch.randn_like(mixer.q_map_bias))
        mixer.q_map_fade.copy_(torch.randn_like(mixer.q_map_fade))
    x = torch.randn(2, 19, 32, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), equation(mixer, x), **EXACT)


def test_inside_the_window_it_is_the_teacher() -> None:
    source = teacher()
    mixer = WindowedLinear.from_attention(source.weights(), window=16, sinks=2, features=3)
    x = torch.randn(2, 18, 32, dtype=torch.float64)  # 16 near and 2 sinks cover all
    torch.testing.assert_close(mixer(x), source(x), **EXACT)


def test_silent_state_is_a_window_with_sinks() -> None:
    source = teacher()
    mixer = WindowedLinear.from_attention(source.weights(), window=6, sinks=2)
    with torch.no_grad():
        mixer.q_map_bias.fill_(-100.0)
    cut = Attention.from_attention(source.weights(), window=6, sinks=2)
    x = torch.randn(1, 60, 32, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), cut(x), **EXACT)


def test_far_weights_and_window_scores_of_any_size_stay_finite() -> None:
    mixer = WindowedLinear.from_attention(teacher().weights(), window=6, sinks=0)
    with torch.no_grad():
        mixer.q_map_bias.copy_(torch.tensor([-800.0, 0.0, 300.0, 800.0])[:, None].expand_as(mixer.q_map_bias))
    x = (100 * torch.randn(1, 40, 32, dtype=torch.float64)).requires_grad_()
    y = mixer(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert grad.isfinite().all()


def test_text_brings_the_start_nearer_than_a_window_alone() -> None:
    source = teacher()
    torch.manual_seed(1)
    topics = torch.randn(5, 32, dtype=torch.float64)
    text = topics[torch.randint(5, (4, 150))] + 0.3 * torch.randn(4, 150, 32, dtype=torch.float64)
    held = topics[torch.randint(5, (2, 150))] + 0.3 * torch.randn(2, 150, 32, dtype=torch.float64)
    stats = AttentionStats(torch.ones(4), torch.ones(4), text)
    want = source(held)
    errors = [
        (m(held) - want).norm() / want.norm()
        for m in (
            WindowedLinear.from_attention(source.weights(), stats, window=8, sinks=2, features=16),
            Attention.from_attention(source.weights(), window=8, sinks=2),
        )
    ]
    assert errors[0] < 0.8 * errors[1]


def test_state_is_as_the_page_says() -> None:
    config = WindowedLinear.Config(576, 9, 3, 64, window=64, sinks=4, features=64)
    state = WindowedLinear(config).init_state(1, 8192, device="meta")
    floats = 2 * 3 * 64 * (64 + 4) + 3 * 64 * 65
    assert state.nbytes == 4 * floats + 8


@pytest.mark.parametrize(
    ("dtype", "window", "features", "same"),
    # A token is 2 * 64 numbers a key/value head. The linear state is 65 * features of at least float32: at 32 features
    # 2080 are 16.25 tokens' in float32 and twice that, 32.5, beside a window of bfloat16.
    [
        (torch.float32, 128, 32, 145),
        (torch.bfloat16, 128, 32, 161),
        (torch.bfloat16, 7, 64, 72),
        (torch.float64, 1, 64, 34),
    ],
)
def test_window_of_equal_bytes(dtype: torch.dtype, window: int, features: int, same: int) -> None:
    config = WindowedLinear.Config(576, 9, 3, 64, window=window, sinks=4, features=features)
    found = equal_window(config, dtype=dtype)
    assert found == same
    want = WindowedLinear(config).init_state(1, device="meta", dtype=dtype).nbytes

    def nbytes(size: int) -> int:
        cut = Attention.Config(576, 9, 3, 64, window=size, sinks=4)
        return Attention(cut).init_state(1, 8192, device="meta", dtype=dtype).nbytes

    assert nbytes(found - 1) < want <= nbytes(found)


ROTARY = {
    "plain": {"theta": 100.0, "dim": 8},
    "partial": {"theta": 100.0, "dim": 4},
    "linear": {"theta": 100.0, "dim": 8, "scaling": {"rope_type": "linear", "factor": 3.0}},
    "llama3": {
        "theta": 100.0,
        "dim": 8,
        "scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "yarn": {
        "theta": 100.0,
        "dim": 8,
        "scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
}


@pytest.mark.parametrize("rotary", ROTARY.values(), ids=ROTARY)
@pytest.mark.parametrize("first", [0, 1000])
def test_features_of_what_leaves_the_window_come_back_from_its_keys(rotary: dict[str, object], first: int) -> None:
    """Whatever turned the keys, wherever the text begins, in pieces shorter and longer than the window."""
    mixer = WindowedLinear.from_attention(teacher(rotary=rotary).weights(), window=5, sinks=2, features=4)
    with torch.no_grad():
        mixer.q_map_bias.zero_()
        mixer.k_map_weight.mul_(10)  # so that features tell keys apart
    x = torch.randn(1, 40, 32, dtype=torch.float64)
    _, keys, _ = mixer.qkv.project(x)
    state, at = mixer.init_state(1), 0
    for n in (3, 1, 1, 1, 6, 1, 20, 1, 5):
        y, update = mixer.read(x[:, at : at + n], state, Layout.dense(1, n, start_b=first + at))
        assert isinstance(update, WindowedLinearUpdate)
        assert update.window_f_bgnf.shape == (1, 2, min(n, 5), 4)
        for slot, token in enumerate(range(at - 5, at - 5 + min(n, 5))):
            if token >= 0:
                want = mixer.key_features(keys[:, token, None])[:, 0]
                torch.testing.assert_close(update.window_f_bgnf[:, :, slot], want, **EXACT)
        whole = mixer(x, Layout.dense(1, 40, start_b=first))
        torch.testing.assert_close(y, whole[:, at : at + n], **EXACT)
        state, at = update.commit(), at + n


def test_a_saved_state_of_schema_1_loses_the_features(tmp_path: Path) -> None:
    mixer = WindowedLinear.from_attention(teacher().weights(), window=5, sinks=2, features=4)
    state = mixer.read(torch.randn(2, 9, 32, dtype=torch.float64), mixer.init_state(2))[1].commit()
    fields = {"window": state.window, "window_f_bgwf": torch.randn(2, 2, 5, 4), "linear_bgfv": state.linear_bgfv}
    assert WindowedLinearState.schema == 2
    now = WindowedLinearState(**WindowedLinearState.migrate(fields, 1))
    for (name, a), (_, b) in zip(now.tensors(), state.tensors(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(CheckpointError, match="expected schema 2, got 3"):
        WindowedLinearState.migrate(fields, 3)


@pytest.mark.parametrize("options", [{"window": 0}, {"sinks": -1}, {"features": 0}])
def test_sizes_that_mean_nothing_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected window >= 1, sinks >= 0 and features >= 1"):
        WindowedLinear.from_attention(teacher().weights(), **options)


def test_a_windowed_teacher_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="looks back 9 tokens only"):
        WindowedLinear.from_attention(teacher(window=9).weights())


@pytest.mark.parametrize("time", [300, 5_000])
def test_the_start_scores_a_bounded_number_of_queries(time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key is seen by each of them, so their number must not grow with the text."""
    config = WindowedLinear.Config(d_model=8, n_heads=1, n_kv_heads=1, head_dim=4, window=8, sinks=1, features=4)
    mixer, seen, plain = WindowedLinear(config), list[int](), WindowedLinear.query_weights
    monkeypatch.setattr(
        WindowedLinear, "query_weights", lambda self, q, n: seen.append(q.shape[1]) or plain(self, q, n)
    )
    mixer.start_from_(torch.randn(1, time, 8))
    assert seen == [min(-(-(time - 9) // 37), 64)]


def test_text_too_short_to_have_anything_far_is_refused() -> None:
    stats = AttentionStats(torch.ones(4), torch.ones(4), torch.randn(2, 11, 32, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"more than window \+ sinks \+ 1 = 11 tokens, got 11"):
        WindowedLinear.from_attention(teacher().weights(), stats, window=8, sinks=2)


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (torch.cuda.is_available() or backends.interpreted()),
    reason="needs Triton, on a GPU or interpreted",
)
def test_kernels_read_in_pieces_what_pytorch_reads_whole() -> None:
    """Training form, prompt with padding, single steps and a block, one after the other."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mixer = WindowedLinear.from_attention(teacher().weights(), window=5, sinks=2, features=6).float().to(device)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, 30, 32, device=device)
    with backends.use("torch"):
        want = mixer(x)
    with backends.use("triton"):
        torch.testing.assert_close(mixer(x), want, rtol=1e-5, atol=1e-5)
        state, at_b = mixer.init_state(2), torch.zeros(2, dtype=torch.int64, device=device)
        for most in (14, 1, 1, 3, 9):
            n_b = torch.tensor([most, most - 1 if most > 3 else most], device=device)
            columns_bt = (at_b[:, None] + torch.arange(most, device=device)).clamp(max=29)
            block = x.gather(1, columns_bt[..., None].expand(-1, -1, 32))
            y, update = mixer.read(block, state, Layout.ragged(n_b, most, start_b=at_b))
            state = update.commit()
            for row, n in enumerate(n_b.tolist()):
                at = int(at_b[row])
                torch.testing.assert_close(y[row, :n], want[row, at : at + n], rtol=1e-5, atol=1e-5)
            at_b = at_b + n_b
