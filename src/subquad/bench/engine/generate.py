"""Plain decoding beside transformers at its best: static cache, the whole forward pass compiled into one CUDA graph."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from subquad.bench.drafting import TEACHER
from subquad.bench.harness import Bench
from subquad.engine.engine import Engine
from subquad.engine.request import Limits, Request
from subquad.models.config import ModelConfig
from subquad.models.load import load_model
from subquad.models.stack import Stack

# Llama-3-8B; arXiv 2407.21783, table 3.
VOCAB_SIZE, D_MODEL, D_MLP = 128256, 4096, 14336
LAYER = {"mixer": "attention", "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "rotary": {"theta": 5e5, "dim": 128}}
LLAMA_LAYERS = 32


def run(bench: Bench) -> None:
    """SmolLM2-135M at batch 1 and 64, and Llama-3-8B's shape with random weights at batch 1."""
    prompt, new = bench.size((64, 256), smoke=(5, 8))
    small = _tiny(bench) if bench.smoke else load_model(TEACHER, dtype=bench.dtype, device=bench.device).model
    with torch.no_grad():
        for b in bench.size((1, 64), smoke=(1, 2)):
            _beside(bench, f"smollm2.b{b}", small, b, prompt, new)
        del small
        if not bench.smoke:
            torch.cuda.empty_cache()
            layers = (LAYER,) * LLAMA_LAYERS
            with torch.device("meta"):
                large = Stack(ModelConfig(VOCAB_SIZE, D_MODEL, D_MLP, layers, max_positions=8192))
            large = large.to(bench.dtype).to_empty(device=bench.device)
            for x in large.parameters():
                x.normal_(std=0.02) if x.dim() > 1 else x.fill_(1.0)
            _beside(bench, "8b.b1", large, 1, prompt, new)


def _tiny(bench: Bench) -> Stack:
    layer = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}
    return Stack(ModelConfig(vocab_size=50, d_model=32, d_mlp=64, layers=(layer, layer))).to(**bench.factory)


def _beside(bench: Bench, id: str, model: Stack, b: int, prompt: int, new: int) -> None:
    """Tokens a second behind the prompt, each contender's best of three in turns, and the bytes a step must read."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (b, prompt), generator=generator)
    theirs = Reference(model, b, prompt + new, compiled=bench.device.type == "cuda")
    more = torch.randint(model.config.vocab_size, (b, 3), generator=generator).to(bench.device)
    want = model(torch.cat((prompts.to(bench.device), more), dim=1)[:1])[0, -1]
    rtol = 1e-3 if bench.dtype == torch.float32 else 3e-2
    got = theirs.follow(prompts.to(bench.device), more)[0]
    bench.gate(f"{id}: transformers has the same logits three steps behind the prompt", got, want, rtol=rtol)
    engine = Engine(
        model, rows=b, capacity=prompt + new, rounds=bench.size(32, smoke=4), compile=bench.device.type == "cuda"
    )
    rates: dict[str, list[float]] = {"ours": [], "transformers": []}
    for attempt in range(4):
        ours, others = _ours(engine, prompts, new), theirs.decode(prompts.to(bench.device), new)
        if attempt:  # the first compiles and captures
            rates["ours"].append(ours)
            rates["transformers"].append(others)
    best = {name: max(found) for name, found in rates.items()}
    weights = sum(x.numel() * x.element_size() for name, x in model.named_parameters() if name != "embed.weight")
    if model.config.tied:
        weights += model.embed.weight.numel() * model.embed.weight.element_size()
    cache = model.init_state(b, prompt + new // 2, device="meta").nbytes
    least = bench.least(float(weights + cache), 0.0)
    shape: dict[str, Any] = {"b": b, "prompt": prompt, "new": new, "moved": weights + cache}
    name = "transformers, static cache, compiled" if bench.device.type == "cuda" else "transformers, static cache"
    bench.value(
        f"{id}.vs_hf",
        best["ours"],
        "tokens/s",
        "higher",
        baseline=name,
        baseline_value=best["transformers"],
        shape=shape,
    )
    bench.value(f"{id}.limit_share", best["ours"] / b * least, "1", "higher", shape=shape)


def _ours(engine: Engine, prompts: Tensor, new: int) -> float:
    """Tokens a second of all rows together, from the first look to the last."""
    b = len(prompts)
    for prompt in prompts.tolist():
        engine.submit(Request(prompt, Limits(max_new_tokens=new, end_tokens=[])))
    given, began = 0, 0.0
    while engine.busy:
        pieces = engine.step()
        if not began and pieces:
            began, given = time.perf_counter(), -len(pieces)
        given += len(pieces)
    assert given <= b * new
    return given / (time.perf_counter() - began)


class Reference:
    """The same weights in transformers' Llama, decoding greedily in a loop that never waits for the device."""

    def __init__(self, model: Stack, rows: int, capacity: int, *, compiled: bool) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

        config, layer = model.config, model.config.layers[0]
        own = LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_mlp,
            num_hidden_layers=len(config.layers),
            num_attention_heads=layer["n_heads"],
            num_key_value_heads=layer["n_kv_heads"],
            head_dim=layer["head_dim"],
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": layer["rotary"]["theta"]},
            max_position_embeddings=max(capacity, 2048),
            tie_word_embeddings=config.tied,
        )
        with torch.device("meta"):
            self.llama = LlamaForCausalLM(own)
        names = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
        weights: dict[str, Tensor] = {}
        for name, x in model.state_dict().items():
            parts = name.replace("blocks.", "model.layers.").replace("mixer.qkv.", "self_attn.")
            parts = parts.replace("mixer.o_proj", "self_attn.o_proj").replace("norm1", "input_layernorm")
            weights[names.get(name, parts.replace("norm2", "post_attention_layernorm"))] = x
        self.llama.load_state_dict(weights, assign=True, strict=False)
        self.llama.tie_weights()
        # Tables that are no weights were made without memory.
        self.llama.model.rotary_emb = type(self.llama.model.rotary_emb)(own).to(model.device)
        self.cache = StaticCache(config=own, max_cache_len=capacity)
        # Renamed in transformers 5.24.
        parameters = inspect.signature(self.llama.model.forward).parameters
        self.named = "cache" if "cache" in parameters else "past_key_values"
        self.rows, self.device = rows, model.device
        forward: Callable[..., Any] = self.llama.forward
        self.step = torch.compile(forward, mode="reduce-overhead", fullgraph=True) if compiled else forward

    def read(self, tokens_bt: Tensor) -> Tensor:
        """Logits ``[b, v]`` behind the last token, the cache filled anew."""
        self.cache.reset()
        positions_t = torch.arange(tokens_bt.shape[1], device=self.device)
        return self.llama(tokens_bt, **self._where(positions_t)).logits[:, -1]

    def follow(self, tokens_bt: Tensor, next_bt: Tensor) -> Tensor:
        """Logits ``[b, v]`` behind `tokens_bt` and, one step after the other, `next_bt`."""
        logits_bv = self.read(tokens_bt)
        for i in range(next_bt.shape[1]):
            at = torch.tensor([tokens_bt.shape[1] + i], device=self.device)
            logits_bv = self.step(next_bt[:, i : i + 1].clone(), **self._where(at)).logits[:, -1].clone()
        return logits_bv

    def _where(self, positions_t: Tensor) -> dict[str, Any]:
        return {self.named: self.cache, "cache_position": positions_t, "position_ids": positions_t[None]}

    def decode(self, prompts_bt: Tensor, new: int) -> float:
        """Tokens a second of all rows together, behind the first."""
        token_b1 = self.read(prompts_bt).argmax(-1, keepdim=True)
        at = torch.tensor([prompts_bt.shape[1]], device=self.device)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(new - 1):
            logits_b1v = self.step(token_b1.clone(), **self._where(at)).logits
            token_b1 = logits_b1v[:, -1].argmax(-1, keepdim=True)
            at = at + 1
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.rows * (new - 1) / (time.perf_counter() - began)
