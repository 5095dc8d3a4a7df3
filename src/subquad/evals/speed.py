"""Bytes of state and tokens per second over the context, for any stack."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from subquad.core.errors import ConfigError
from subquad.engine.prefill import prefill
from subquad.mixers.attention import Attention
from subquad.models.stack import Stack


@dataclass(frozen=True)
class Speed:
    """What decoding costs at a context.

    Attributes:
        context: tokens in the state before the first step.
        batch: rows decoded at once.
        prefill_tokens_per_s: of one row, read in chunks.
        step_seconds: every step's wall time.
    """

    context: int
    batch: int
    prefill_tokens_per_s: float
    step_seconds: tuple[float, ...]

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens of all rows per second, from the median step."""
        return self.batch / statistics.median(self.step_seconds)


def state_bytes(model: Stack, contexts: Sequence[int], batch: int = 1) -> list[int]:
    """Bytes of the state of `batch` rows at each context, without allocating it."""
    return [model.init_state(batch, context, device="meta").nbytes for context in contexts]


def attention_kept(student: Stack, teacher: Stack, context: int = 8192) -> float:
    """Share of the teacher's full attention that a student keeps: bytes of keys and values, both in one dtype.

    Attention without a window counts, in parts of a layer too; windows and recurrent states do not.

    Args:
        student, teacher: the models.
        context: tokens in the caches.

    Raises:
        ConfigError: a teacher without full attention.
    """
    kept, whole = (_cache_bytes(model, context) for model in (student, teacher))
    if not whole:
        raise ConfigError("expected a teacher with full attention, got none; compare with the Transformer itself")
    return kept / whole


def _cache_bytes(model: Stack, context: int) -> int:
    full = [m for m in model.modules() if isinstance(m, Attention) and m.config.window is None]
    states = [m.init_state(1, context, device="meta", dtype=torch.float32) for m in full]
    return sum(t.nbytes for state in states for _, t in state.tensors() if t.is_floating_point())


@torch.no_grad()
def measure_speed(
    models: Mapping[str, Stack], context: int, *, batch: int = 8, steps: int = 20, chunk: int = 512
) -> dict[str, Speed]:
    """Decode with every model in turns, step by step, so that a drifting clock favours none.

    One row is read to `context` tokens and its state forked to `batch` rows; a step reads a token a row, takes the
    most likely next one and commits. Two steps warm up.

    Args:
        models: name to model, on one device.
        context: tokens in the state.
        batch: rows.
        steps: timed steps.
        chunk: tokens read at once before.
    """
    if context < 1 or batch < 1 or steps < 1:
        raise ConfigError(f"expected context, batch and steps of at least 1, got {context}, {batch} and {steps}")
    prompt = torch.randint(min(m.config.vocab_size for m in models.values()), (context,)).tolist()
    pools, tokens, rates = {}, {}, {}
    for name, model in models.items():
        pool = model.init_state(1, context + steps + 2)
        began = _now(model)
        hidden_bd = prefill(model, [prompt], pool, chunk)
        tokens[name] = model.head(hidden_bd).argmax(-1, keepdim=True).repeat(batch, 1)
        rates[name] = context / (_now(model) - began)
        pools[name] = pool.fork(batch)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(steps + 2):
        for name, model in models.items():
            began = _now(model)
            hidden_btd, update = model.read(tokens[name], pools[name])
            update.commit_(pools[name])
            tokens[name] = model.head(hidden_btd).argmax(-1)
            times[name].append(_now(model) - began)
    return {name: Speed(context, batch, rates[name], tuple(times[name][2:])) for name in models}


def _now(model: Stack) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
