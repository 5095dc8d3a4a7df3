import pytest
import torch

from subquad.core.errors import ConfigError
from subquad.evals import speed
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack


def test_state_bytes_grow_only_where_the_model_does(make_model):
    full, cut = make_model(50, {}), make_model(50, {"window": 8, "sinks": 2})
    a, b = speed.state_bytes(full, [100, 200])
    # Keys and values of 2 heads of 8 channels in float64, 100 tokens.
    assert b - a == 100 * 2 * 2 * 8 * 8
    assert a == full.init_state(1, 100).nbytes
    assert len(set(speed.state_bytes(cut, [100, 200]))) == 1
    assert speed.state_bytes(cut, [100], batch=3)[0] == 3 * speed.state_bytes(cut, [100])[0]


def test_attention_kept_counts_heads_and_neither_windows_nor_states():
    layer = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
    one = layer | {"n_heads": 2, "n_kv_heads": 1}
    linear = {"mixer": "windowed_linear", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
    parts = {"mixer": "parallel", "parts": (one, linear)}

    def build(*layers):
        return Stack(ModelConfig(vocab_size=11, d_model=16, d_mlp=16, layers=layers))

    teacher = build(*[layer] * 4)
    student = build(layer, parts, layer | {"window": 9}, linear).double()
    assert speed.attention_kept(student, teacher) == (2 + 1) / (4 * 2)
    assert speed.attention_kept(teacher.double(), teacher, context=10) == 1
    assert speed.attention_kept(build(linear), teacher) == 0
    with pytest.raises(ConfigError, match="full attention"):
        speed.attention_kept(teacher, build(linear))


def test_decodes_what_plain_greedy_would_with_the_clock_between(make_model, monkeypatch):
    models = {"full": make_model(50, {}), "cut": make_model(50, {"window": 8}, seed=1)}
    clock = {"now": 0.0}
    seen = {name: [] for name in models}

    def tick(model):
        clock["now"] += 1.0 if model is models["full"] else 0.5
        return clock["now"]

    for name, model in models.items():
        read = model.read
        monkeypatch.setattr(
            model, "read", lambda tokens, *rest, name=name, read=read: seen[name].append(tokens) or read(tokens, *rest)
        )
    monkeypatch.setattr(speed, "_now", tick)
    torch.manual_seed(0)
    result = speed.measure_speed(models, 20, batch=3, steps=4, chunk=8)
    assert result["full"].decode_tokens_per_s == pytest.approx(3 / 1.0)
    assert result["cut"].decode_tokens_per_s == pytest.approx(3 / 0.5)
    assert result["full"].prefill_tokens_per_s == pytest.approx(20)
    for name, model in models.items():
        prompt = torch.cat([t for t in seen[name] if t.shape[0] == 1], 1)
        steps = torch.cat([t for t in seen[name] if t.shape[0] == 3], 1)
        assert steps.shape == (3, 6)
        tokens = prompt[0].tolist()
        for step in range(6):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
            assert steps[:, step].tolist() == [tokens[-1]] * 3


def test_refuses_nothing_to_time(make_model):
    with pytest.raises(ConfigError, match="at least 1"):
        speed.measure_speed({"m": make_model(50, {})}, 0)
