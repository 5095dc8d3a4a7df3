"""Plain decoding beside transformers at its best: its own generate(), and a loop by hand, each one CUDA graph a step.

Ids are ``decode.<model>.b<rows>``: ``.vs_hf`` beside generate(), ``.vs_hf_graph`` beside the loop, both in tokens a
second of all rows behind the first look; ``.limit_share`` is the share of the speed at which a copy moves the bytes
that a step must read; ``.first_answer`` and ``.first_answer_graph`` are the seconds from having the weights to a whole
answer; and ``.host_share`` is the share of decoding in which the device waits.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from subquad.bench import shapes
from subquad.bench.drafting import TEACHER, same
from subquad.bench.harness import Bench
from subquad.engine.engine import Engine
from subquad.engine.request import Limits, Request
from subquad.models.load import load_model
from subquad.models.stack import Stack

PASSES = 3
# Steps that compile and record, and are not timed.
FAR_WARM = 4
# The engine captures its rounds as they are; set this to fuse them with torch.compile, at a minute a model.
COMPILE = False


def run(bench: Bench) -> None:
    """SmolLM2-135M at batch 1 and 64, and Llama-3-8B's shape with random weights at batch 1."""
    bench.name = "decode"
    prompt, new = bench.size((64, 256), smoke=(5, 8))
    with torch.no_grad():
        if bench.smoke:
            small = shapes.tiny(bench, shapes.TINY_ATTENTION, shapes.TINY_ATTENTION)
        else:
            small = load_model(TEACHER, dtype=bench.dtype, device=bench.device).model.requires_grad_(False)
        for b in bench.size((1, 64), smoke=(1, 2)):
            _beside(bench, f"smollm2.b{b}", small, b, prompt, new)
        del small
        _alone(bench, "8b.b1", shapes.shape_8b(bench, 1), 1, prompt, new)


def _beside(bench: Bench, id: str, model: Stack, b: int, prompt: int, new: int) -> None:
    """Tokens a second behind the prompt, medians of passes in turns, and the bytes that a step must read."""
    compiled = bench.device.type == "cuda"
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (b, prompt), generator=generator)
    on_device = prompts.to(bench.device)
    # What was compiled for another batch would make this one's sizes dynamic, and slower.
    torch.compiler.reset()
    theirs = Reference(model, b, prompt + new, compiled=compiled)
    setup: dict[str, float] = {}
    began = time.perf_counter()
    engine = _Clocked(model, rows=b, capacity=prompt + new, rounds=bench.size(32, smoke=4), compile=COMPILE)
    _, ours = engine.answer(prompts, new)
    setup["ours"] = time.perf_counter() - began
    began = time.perf_counter()
    _, generated_bt = theirs.call(on_device, new)
    setup["generate"] = time.perf_counter() - began
    began = time.perf_counter()
    theirs.loop(on_device, new)
    setup["loop"] = time.perf_counter() - began

    more = torch.randint(model.config.vocab_size, (b, 3), generator=generator).to(bench.device)
    want = model(torch.cat((on_device, more), dim=1)[:1])[0, -1]
    rtol = 1e-3 if bench.dtype == torch.float32 else shapes.ROUNDING
    got = theirs.follow(on_device, more)[0]
    bench.gate(f"{id}: transformers has the same logits three steps behind the prompt", got, want, rtol=rtol)
    differs = not same(model, prompts[0].tolist(), ours[0], generated_bt[0].tolist())
    wrong = torch.tensor(float(differs))
    bench.gate(f"{id}: generate() gives other tokens without a near-tie", wrong, torch.zeros_like(wrong), rtol=0.0)

    contenders: dict[str, Callable[[], float]] = {
        "ours": lambda: engine.answer(prompts, new)[0],
        "generate": lambda: theirs.generate(on_device, new)[0],
        "loop": lambda: theirs.loop(on_device, new),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-1, bench.size(PASSES, smoke=1)):
        # Alternating who goes first keeps a drifting clock from favouring one.
        for name in contenders if turn % 2 == 0 else reversed(contenders):
            rate = contenders[name]()
            if turn >= 0:  # graphs may still be recorded at a second answer
                rates[name].append(rate)

    how = {"generate": theirs.compiles, "loop": compiled}
    names = {"generate": "transformers generate(), static cache", "loop": "transformers in a bare loop, static cache"}
    names = {name: f"{text}, {'compiled' if how[name] else 'not compiled'}" for name, text in names.items()}
    moved = _moved(model, b, prompt + new // 2)
    shape: dict[str, Any] = {"b": b, "prompt": prompt, "new": new, "moved": moved}
    rate = statistics.median(rates["ours"])
    for theirs_name, suffix in (("generate", ""), ("loop", "_graph")):
        bench.value(
            f"{id}.vs_hf{suffix}",
            rate,
            "tokens/s",
            "higher",
            baseline=names[theirs_name],
            baseline_value=statistics.median(rates[theirs_name]),
            shape=shape,
            reps=[list(pair) for pair in zip(rates["ours"], rates[theirs_name], strict=True)],
        )
        bench.value(
            f"{id}.first_answer{suffix}",
            setup["ours"],
            "s",
            "lower",
            baseline=names[theirs_name],
            baseline_value=setup[theirs_name],
            shape=shape,
        )
    _shares(bench, id, engine, prompts, new, rate, shape)
    bench.say(
        f"{bench.name}.{id}: {rate:.4g} tokens/s, generate() {statistics.median(rates['generate']):.4g}, "
        f"loop {statistics.median(rates['loop']):.4g}"
    )


def _alone(bench: Bench, id: str, model: Stack, b: int, prompt: int, new: int) -> None:
    """What is measured against the device alone: how near to a copy's speed, and how long the device waits."""
    prompts = torch.randint(model.config.vocab_size, (b, prompt), generator=torch.Generator().manual_seed(0))
    engine = _Clocked(model, rows=b, capacity=prompt + new, rounds=bench.size(32, smoke=4), compile=COMPILE)
    rates = [engine.answer(prompts, new)[0] for _ in range(bench.size(PASSES + 1, smoke=1))]
    rate = statistics.median(rates[-PASSES:])
    shape: dict[str, Any] = {"b": b, "prompt": prompt, "new": new, "moved": _moved(model, b, prompt + new // 2)}
    bench.value(f"{id}.rate", rate, "tokens/s", "higher", shape=shape)
    _shares(bench, id, engine, prompts, new, rate, shape)
    bench.say(f"{bench.name}.{id}: {rate:.4g} tokens/s")


def _shares(
    bench: Bench, id: str, engine: _Clocked, prompts: Tensor, new: int, rate: float, shape: dict[str, Any]
) -> None:
    least = bench.least(float(shape["moved"]), 0.0)
    bench.value(f"{id}.limit_share", rate / len(prompts) * least, "1", "higher", shape=shape)
    bench.value(f"{id}.host_share", engine.host_share(prompts, new), "1", "lower", shape=shape)


def _moved(model: Stack, b: int, context: int) -> int:
    """Bytes that a step must read at least: every weight but the embedding's other rows, and the state."""
    weights = sum(x.numel() * x.element_size() for name, x in model.named_parameters() if name != "embed.weight")
    if model.config.tied:
        weights += model.embed.weight.numel() * model.embed.weight.element_size()
    return weights + model.init_state(b, context, device="meta").nbytes


class _Clocked(Engine):
    """An engine that answers all its rows at once, and can tell how long its device was at work."""

    def answer(self, prompts: Tensor, new: int) -> tuple[float, list[list[int]]]:
        """Tokens a second of all rows together, from the first look to the last, and the answers."""
        first = self._ask(prompts, new)
        answers: list[list[int]] = [[] for _ in prompts]
        given, began = 0, 0.0
        while self.busy:
            pieces = self.step()
            for piece in pieces:
                answers[piece.row - first].append(piece.token)
            if not began and pieces:
                began, given = time.perf_counter(), -len(pieces)
            given += len(pieces)
        return given / (time.perf_counter() - began), answers

    def host_share(self, prompts: Tensor, new: int) -> float:
        """Share of the time from the first look to the last in which no round was on the device.

        Each round lies between two events of the device. What a round's own kernels wait for each other counts as work.
        """
        if self.model.device.type != "cuda":
            return 0.0
        events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        run = self._rounds.run

        def noted(n: int, k: int, *, asked: bool = False) -> bool:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            steady = run(n, k, asked=asked)
            end.record()
            events.append((start, end))
            return steady

        self._rounds.run = noted
        try:
            self._ask(prompts, new)
            began = 0.0
            while self.busy:
                pieces = self.step()
                if not began and pieces:
                    events.clear()
                    began = time.perf_counter()
            wall = time.perf_counter() - began
        finally:
            self._rounds.run = run
        torch.cuda.synchronize()
        return 1 - sum(start.elapsed_time(end) for start, end in events) / 1e3 / wall

    def _ask(self, prompts: Tensor, new: int) -> int:
        """Submit all prompts, which never end early, and return the first one's number."""
        limits = Limits(max_new_tokens=new, end_tokens=[])
        ids = [self.submit(Request(prompt, limits)) for prompt in prompts.tolist()]
        return ids[0]


class Reference:
    """The same weights in transformers' Llama, decoding greedily over one static cache that stays where it is.

    Args:
        model: attention in every layer; its weights are shared.
        rows, capacity: of the cache.
        compiled: compile the step by hand; generate() decides for itself, and compiles on a GPU.
    """

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
            # Nothing ends an answer, so generate() has nothing to watch for but its length.
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        with torch.device("meta"):
            self.llama = LlamaForCausalLM(own).eval()
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
        self.rows, self.capacity, self.device = rows, capacity, model.device
        forward: Callable[..., Any] = self.llama.forward
        self.step = torch.compile(forward, mode="reduce-overhead", fullgraph=True) if compiled else forward

    @property
    def compiles(self) -> bool:
        """Whether generate() has compiled its steps, which is its own choice."""
        return hasattr(self.llama, "_compiled_call")

    def generate(self, prompts_bt: Tensor, new: int) -> tuple[float, Tensor]:
        """Tokens a second of all rows behind the first token, by transformers' own generate(), and the answers.

        It compiles a static cache's steps by itself. The cache is handed to it, which is faster than to name one by
        ``cache_implementation="static"``: that is a new one at every call, for which graphs are recorded again. What a
        call with one token takes, which is all but the steps, is subtracted.
        """
        first, _ = self.call(prompts_bt, 1)
        seconds, tokens_bt = self.call(prompts_bt, new)
        return self.rows * (new - 1) / max(seconds - first, 1e-9), tokens_bt

    def call(self, prompts_bt: Tensor, new: int) -> tuple[float, Tensor]:
        """Seconds of one call of generate() from an empty cache, and the answers."""
        self.cache.reset()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        llama: Any = self.llama
        tokens_bt: Tensor = llama.generate(
            prompts_bt,
            attention_mask=torch.ones_like(prompts_bt),
            do_sample=False,
            max_new_tokens=new,
            **{self.named: self.cache},
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began, tokens_bt[:, prompts_bt.shape[1] :]

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

    def far(self, steps: int) -> float:
        """Seconds of each of the last steps, by hand, before the cache is full, whatever its tokens are.

        Raises:
            torch.OutOfMemoryError: no room for the cache.
        """
        token_b1 = torch.zeros(self.rows, 1, dtype=torch.int64, device=self.device)
        self.read(token_b1)
        at, began = torch.tensor([self.capacity - steps - FAR_WARM], device=self.device), 0.0
        for i in range(-FAR_WARM, steps):
            if i == 0:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                began = time.perf_counter()
            logits_b1v = self.step(token_b1.clone(), **self._where(at)).logits
            token_b1 = logits_b1v[:, -1].argmax(-1, keepdim=True)
            at = at + 1
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps

    def loop(self, prompts_bt: Tensor, new: int) -> float:
        """Tokens a second of all rows behind the first token, in a loop by hand that never waits for the device."""
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
