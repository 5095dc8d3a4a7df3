"""The export: stock transformers computes from the exported folder what our stack computes."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from subquad.core.errors import CheckpointError, UnsupportedError
from subquad.hf.export import TRANSFORMERS, export
from subquad.mixers.mamba2 import EXPORTABLE
from subquad.models.card import ModelCard
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

ROTARY = {"theta": 1e4, "dim": 16}
ATTENTION = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "rotary": ROTARY}
MAMBA2 = {"mixer": "mamba2", "n_heads": 4, "key_dim": 16, "value_dim": 16, **EXPORTABLE}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def config_of(*layers, **options):
    return ModelConfig(
        **{"vocab_size": 60, "d_model": 64, "d_mlp": 96, "eos_tokens": (59,), "layers": layers} | options
    )


CASES = {
    "hybrid": config_of(ATTENTION, MAMBA2, MAMBA2, ATTENTION, tied=True),
    "head-dim-and-scaling": config_of(
        MAMBA2, ATTENTION | {"head_dim": 32, "scale": 0.3, "rotary": {"theta": 5e5, "dim": 32, "scaling": LLAMA3}}
    ),
    "biases-in-attention": config_of(ATTENTION | {"qkv_bias": True}, MAMBA2, ATTENTION),
    "groups-and-expansion": config_of(MAMBA2 | {"n_heads": 8, "n_groups": 2, "key_dim": 12}, ATTENTION, norm_eps=1e-5),
    "one-group": config_of(MAMBA2 | {"n_groups": 1}, ATTENTION),
    "no-rope": config_of(ATTENTION | {"rotary": None}, MAMBA2),
    "attention-only": config_of(ATTENTION, ATTENTION),
    "mamba-only": config_of(MAMBA2, MAMBA2),
}


def random_stack(config):
    torch.manual_seed(0)
    stack = Stack(config).eval()
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            if "A_log" in name or "dt_bias" in name:
                continue
            if parameter.ndim > 1:
                parameter.mul_(1.5)
            else:  # norms, biases, D: nothing stays at zero or one
                parameter.add_(torch.randn_like(parameter) * 0.3)
        stack.embed.weight.normal_(std=0.5)
    return stack


def need_grouped_norm(config):
    grouped = any(layer["mixer"] == "mamba2" and layer.get("n_groups") != 1 for layer in config.layers)
    if grouped and Version(transformers.__version__) < Version(TRANSFORMERS):
        pytest.skip(f"transformers {transformers.__version__} norms the heads of Mamba-2 together")


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    need_grouped_norm(CASES[request.param])
    stack = random_stack(CASES[request.param])
    folder = tmp_path_factory.mktemp("export") / "model"
    export(stack, folder)
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert type(theirs).__module__.startswith("transformers.models.granitemoehybrid")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return stack, theirs.eval()


def tokens_of(batch, time):
    return torch.randint(0, 58, (batch, time), generator=torch.Generator().manual_seed(1))


def assert_same_logits(got, expected):
    """Equal within 2e-5 of the largest logit: float32 through two different orders of a scan over the time."""
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@torch.no_grad()
def test_logits_equal(pair):
    stack, theirs = pair
    tokens_bt = tokens_of(2, 300)  # more than one chunk of the stock scan, and no multiple of it
    expected = stack(tokens_bt)
    assert expected.std() > 0.3
    assert_same_logits(theirs(tokens_bt, use_cache=False).logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batch_equals_each_row_alone(pair, side):
    stack, theirs = pair
    tokens_bt, lengths = tokens_of(3, 40), (40, 23, 2)
    mask_bt = torch.zeros(3, 40, dtype=torch.long)
    for i, n in enumerate(lengths):
        mask_bt[i, slice(40 - n, None) if side == "left" else slice(n)] = 1
    positions_bt = (mask_bt.cumsum(1) - 1).clamp(min=0)
    logits = theirs(tokens_bt, attention_mask=mask_bt, position_ids=positions_bt, use_cache=False).logits
    for i in range(3):
        row = tokens_bt[i][mask_bt[i] == 1]
        assert_same_logits(logits[i][mask_bt[i] == 1], stack(row[None])[0])


def test_generation_is_greedy_in_ours(pair):
    stack, theirs = pair
    tokens_bt = tokens_of(2, 12)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    # The stock class asks an attention layer for the length of its cache.
    options["use_cache"] = any(layer["mixer"] == "attention" for layer in stack.config.layers)
    new = theirs.generate(tokens_bt, max_new_tokens=20, **options)
    with torch.no_grad():
        best = stack(new[:, :-1])[:, 11:].topk(2, dim=-1)
    gap = (best.values[..., 0] - best.values[..., 1]).min()
    assert gap > 1e-4, "a near-tie: choose another seed"
    assert torch.equal(best.indices[..., 0], new[:, 12:])


@torch.no_grad()
def test_bias_of_mamba_without_padding(tmp_path):
    config = config_of(MAMBA2 | {"bias": True}, ATTENTION)
    need_grouped_norm(config)
    stack = random_stack(config)
    export(stack, tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    tokens_bt = tokens_of(2, 30)
    assert_same_logits(theirs(tokens_bt).logits, stack(tokens_bt))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            config_of(ATTENTION, {"mixer": "gated_deltanet", "n_heads": 4, "key_dim": 8, "value_dim": 8}),
            r"layers\[1\]: mixer 'gated_deltanet'",
        ),
        (config_of(ATTENTION, MAMBA2 | {"write": "unit"}), r"layers\[1\]: mamba2 write='unit', .* only 'dt'"),
        (config_of(MAMBA2 | {"rotary": {"theta": 1e4, "dim": 16}}), r"layers\[0\]: mamba2 rotary"),
        (config_of(ATTENTION | {"window": 8}), r"layers\[0\]: attention window=8"),
        (config_of(ATTENTION | {"qk_norm": True}), "attention qk_norm=True"),
        (config_of(ATTENTION | {"rotary": {"theta": 1e4, "dim": 8}}), "attention rotary dim=8"),
        (
            config_of(ATTENTION, ATTENTION | {"head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}),
            r"layers\[1\]: attention head_dim=8 differs",
        ),
        (config_of(MAMBA2, MAMBA2 | {"key_dim": 8}), r"layers\[1\]: mamba2 mamba_d_state=8 differs from 16"),
        (config_of(MAMBA2 | {"norm_eps": 1e-3}), "mamba2 norm_eps=0.001"),
        (config_of(MAMBA2 | {"value_dim": 20}), "n_heads x value_dim=80, where .* only 64"),
        (config_of(ATTENTION, mlp_bias=True), "mlp_bias=True"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_the_architecture_lacks_is_named(tmp_path, config, words):
    with pytest.raises(UnsupportedError, match=words):
        export(Stack(config), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_card_says_what_loads_it(tmp_path):
    export(Stack(config_of(MAMBA2, ATTENTION)), tmp_path / "m", card=ModelCard(name="Half", notes="Mine."))
    text = (tmp_path / "m" / "README.md").read_text()
    assert "subquad.hf" not in text
    assert f"use {TRANSFORMERS} or newer" in text
    assert "Mine." in text
    export(Stack(config_of(MAMBA2 | {"n_groups": 1})), tmp_path / "m")
    assert TRANSFORMERS not in (tmp_path / "m" / "README.md").read_text()


def test_another_models_folder_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "subquad"}))
    with pytest.raises(CheckpointError, match="'subquad', which saving would destroy"):
        export(Stack(config_of(ATTENTION)), tmp_path)
