"""Adapters: nothing at first, trained alone, the same merged, compiled, resumed and through peft's files."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from subquad.core.errors import CheckpointError, ConfigError, UnsupportedError
from subquad.core.layout import Layout
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack
from subquad.train import lora

FULL = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}
PATTERNS = ("blocks.*.mixer.*_proj", "blocks.1.mlp.up_proj")
NAMES = [f"blocks.{i}.mixer.{n}" for i in (0, 1) for n in ("qkv.q_proj", "qkv.k_proj", "qkv.v_proj", "o_proj")]
NAMES += ["blocks.1.mlp.up_proj"]
TOKENS = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))


def model(dtype=torch.float64, **config):
    torch.manual_seed(0)
    made = Stack(ModelConfig(vocab_size=31, d_model=16, d_mlp=32, layers=(FULL, FULL), **config))
    return made.to(dtype)


def scrambled(module):
    """As if trained: adapters that change something."""
    with torch.no_grad():
        for p in [p for a in lora.adapters(module).values() for p in (a.up, a.down)]:
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return module


def attached(dtype=torch.float64, rank=3, alpha=6.0):
    made = model(dtype)
    new = lora.attach(made, PATTERNS, rank, alpha)
    return made, new


def test_attached_is_as_before_and_only_adapters_learn():
    before, (after, new) = model(), attached()
    torch.testing.assert_close(after(TOKENS), before(TOKENS), rtol=0, atol=0)
    assert sorted(lora.adapters(after)) == sorted(NAMES)
    assert len(new) == 2 * len(NAMES)
    frozen = {name for name, p in after.named_parameters() if not p.requires_grad}
    assert frozen == {f"{name}.parametrizations.weight.original" for name in NAMES}
    # The gradient of a sum is that of its parts: dup = scale dW down^T, and ddown = scale up^T dW.
    after(TOKENS).square().sum().backward()
    before(TOKENS).square().sum().backward()
    for name, adapter in lora.adapters(after).items():
        of_weight = before.get_submodule(name).weight.grad
        torch.testing.assert_close(adapter.up.grad, 2.0 * of_weight @ adapter.down.mT, rtol=1e-9, atol=1e-12)
        assert adapter.down.grad.abs().max() == 0


def test_what_is_added():
    made = scrambled(attached()[0])
    plain = model()
    for name, adapter in lora.adapters(made).items():
        want = plain.get_submodule(name).weight + 6.0 / 3 * adapter.up @ adapter.down
        torch.testing.assert_close(made.get_submodule(name).weight, want, rtol=1e-12, atol=1e-12)


def test_merged_is_the_same_and_plain():
    made = scrambled(attached()[0])
    want = made(TOKENS)
    lora.merge(made)
    torch.testing.assert_close(made(TOKENS), want, rtol=1e-12, atol=1e-12)
    assert list(made.state_dict()) == list(model().state_dict())
    assert not lora.adapters(made)
    assert (want - model()(TOKENS)).abs().max() > 0.1
    lora.attach(made, PATTERNS, 2, 1.0)


def test_merged_bfloat16_is_rounded_once():
    made = scrambled(attached(torch.bfloat16)[0])
    exact = {
        name: a.up.double() @ a.down.double() * 2 + model(torch.bfloat16).get_submodule(name).weight.double()
        for name, a in lora.adapters(made).items()
    }
    assert all(a.up.dtype == torch.float32 for a in lora.adapters(made).values())
    lora.merge(made)
    for name, want in exact.items():
        got = made.get_submodule(name).weight
        assert got.dtype == torch.bfloat16
        # Half a spacing, and float32's error in the sum.
        assert ((got.double() - want).abs() <= 2**-8 * want.abs() + 1e-6).all()


def test_state_dicts_resume_bit_for_bit():
    a, new = attached(torch.float32)
    optimiser = torch.optim.AdamW(new, lr=1e-2)

    def step(module, optimiser):
        loss = module(TOKENS).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    for _ in range(3):
        step(a, optimiser)
    saved = copy.deepcopy((a.state_dict(), optimiser.state_dict()))
    want = [step(a, optimiser) for _ in range(3)]
    assert want[2] < want[0]
    b, new = attached(torch.float32)
    other = torch.optim.AdamW(new, lr=1e-2)
    b.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert [step(b, other) for _ in range(3)] == want
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
def test_compiled_in_one_graph(cast):
    block = scrambled(attached(torch.float32)[0]).blocks[1]
    adapter = lora.adapters(block)["mixer.qkv.q_proj"]
    x, layout = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1)), Layout.dense(2, 9)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = []
    block(x, layout)  # makes the rotary tables, which a compiled block finds and never keeps
    for run in (block, compiled):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            y = run(x, layout)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), (adapter.up, adapter.down))))
    for eager, made in zip(*found, strict=True):
        torch.testing.assert_close(made, eager, rtol=1e-5, atol=1e-5)
    if cast:
        assert found[1][1].dtype == torch.float32


def test_refusals():
    made = model()
    with pytest.raises(ConfigError, match=r"lora blocks.*.q_prj: no such linear layer"):
        lora.attach(made, ["blocks.*.q_prj"], 2, 1.0)
    for rank, alpha in ((0, 1.0), (9, 1.0), (2, 0.0), (2, math.inf)):
        with pytest.raises(ConfigError, match="expected rank 1 to 8 for blocks.0.mixer.qkv.k_proj and alpha > 0"):
            lora.attach(made, ["blocks.0.mixer.qkv.k_proj"], rank, alpha)
    lora.attach(made, ["*q_proj"], 2, 1.0)
    with pytest.raises(ConfigError, match=r"adapted in blocks.0.mixer.qkv.q_proj; merge it first"):
        lora.attach(made, ["*_proj"], 2, 1.0)
    assert sorted(lora.adapters(made)) == [f"blocks.{i}.mixer.qkv.q_proj" for i in (0, 1)]
    with pytest.raises(UnsupportedError, match="lm_head shares its weight"):
        lora.attach(model(tied=True), ["lm_head"], 2, 1.0)


def test_peft_files(tmp_path):
    made = scrambled(attached(torch.float32)[0])
    lora.save_peft(made, tmp_path, base="a-hybrid")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(tensors) == sorted(
        f"base_model.model.model.{name}.lora_{half}.weight" for name in NAMES for half in "AB"
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6.0, "a-hybrid")
    # Its definition, from the files alone: W + alpha / r B A.
    plain = model(torch.float32)
    for name in NAMES:
        a, b = (tensors[f"base_model.model.model.{name}.lora_{half}.weight"] for half in "AB")
        plain.get_submodule(name).weight.data += config["lora_alpha"] / config["r"] * b @ a
    torch.testing.assert_close(plain(TOKENS), made(TOKENS), rtol=1e-5, atol=1e-5)
    again = model(torch.float32)
    new = lora.load_peft(again, tmp_path)
    assert len(new) == len(tensors)
    assert torch.equal(again(TOKENS), made(TOKENS))


def test_peft_files_that_do_not_fit(tmp_path):
    lora.save_peft(attached(torch.float32)[0], tmp_path)
    path = tmp_path / "adapter_config.json"
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | {"use_dora": True}))
    with pytest.raises(UnsupportedError, match="expected use_dora False, got True"):
        lora.load_peft(model(), tmp_path)
    # A root of the rank instead of the rank.
    path.write_text(json.dumps(json.loads(text) | {"use_rslora": True}))
    made = model()
    lora.load_peft(made, tmp_path)
    assert [a.alpha / a.rank for a in lora.adapters(made).values()] == [pytest.approx(6 / 3**0.5)] * len(NAMES)
    path.write_text(text)
    with pytest.raises(CheckpointError, match="check model and prefix 'other.'"):
        lora.load_peft(model(), tmp_path, prefix="other.")
    path.write_text(json.dumps(json.loads(text) | {"r": 4}))
    with pytest.raises(CheckpointError, match=r"expected shape \(4, 16\), got \(3, 16\)"):
        lora.load_peft(model(), tmp_path)
    path.write_text(text)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="expected both halves"):
        lora.load_peft(model(), tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="save them again"):
        lora.load_peft(model(), tmp_path)
    with pytest.raises(ConfigError, match="expected adapters of one rank"):
        lora.save_peft(nn.Linear(3, 3), tmp_path)
