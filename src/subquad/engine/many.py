"""Generation for throughput: many prompts through a fixed number of rows, without waiting for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from subquad.core.errors import ConfigError
from subquad.engine.generate import Generation, Limits, check_request, diverged, prefill, row_configs
from subquad.engine.sampler import History, Sampler, SamplingConfig
from subquad.models.stack import Stack

REFILL = 32
"""Most prompts read at once; it bounds what a read holds in memory beside the state."""


def generate_many(
    model: Stack,
    prompts: Sequence[Sequence[int]],
    *,
    rows: int,
    limits: Limits | None = None,
    sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
    steps: int | None = None,
) -> Iterator[tuple[int, Generation]]:
    """Continue many prompts with `rows` of them side by side, and give each, with its index, when it is done.

    For throughput: a row that ends makes room for the next prompt, which is looked for every few steps, and between
    two looks nothing waits for the device; on a GPU a step is one CUDA graph. A prompt gets what `stream` gives it:
    ``tokens`` and ``finish``, without text. Prompts begin in their order; those of like length cost least.

    Args:
        model: the model.
        prompts: token ids, each prompt at least one.
        rows: most prompts at a time; they bound the memory.
        limits: when to stop; stop strings can't be looked for on the device.
        sampling: as in `stream`; rows may differ in their seed only.
        steps: tokens between two looks; by default 16 on a GPU, and 1 on a CPU, where a look is free and a row is not.

    Raises:
        ConfigError: as in `stream`, and for stop strings and settings that differ in more than the seed.
        DataError, DivergenceError, UnsupportedError: as in `stream`.
    """
    limits = limits or Limits()
    steps = steps if steps is not None else 16 if model.device.type == "cuda" else 1
    if rows < 1 or steps < 1:
        raise ConfigError(f"generate_many: expected rows and steps of at least 1, got {rows} and {steps}; give more")
    if limits.stop:
        raise ConfigError("generate_many: expected no stop strings, got some; use stream(), or end_tokens")
    capacity = check_request(model, prompts, limits, None)
    configs = row_configs(sampling, len(prompts))
    if len({replace(config, seed=0) for config in configs}) > 1:
        raise ConfigError("generate_many: expected rows that differ in their seed only, got others; call it for each")
    waiting = deque(range(len(prompts)))
    lanes = Lanes(model, min(rows, len(prompts)), capacity, limits, configs[0])
    while waiting or lanes.busy:
        while waiting and lanes.free:
            some = [waiting.popleft() for _ in range(min(REFILL, len(waiting), len(lanes.free)))]
            lanes.put(some, [prompts[i] for i in some], [configs[i].seed for i in some])
        if not waiting and 2 * len(lanes.busy) <= len(lanes.held):
            lanes.shrink()
        lanes.advance(steps)
        yield from lanes.take()


class Lanes:
    """Rows that step together in fixed buffers; each holds a prompt until it ends. Only `take` waits for the device.

    Attributes:
        held: by row, the index of the prompt that it continues, or None.
    """

    @torch.no_grad()
    def __init__(self, model: Stack, rows: int, capacity: int, limits: Limits, config: SamplingConfig) -> None:
        """Allocate `rows` of `capacity` tokens; `config` is every row's but for the seed."""
        self.model, self.capacity, self.limits, self.config, device = model, capacity, limits, config, model.device
        ends = model.config.eos_tokens if limits.end_tokens is None else limits.end_tokens
        self.held: list[int | None] = [None] * rows
        self._ends_e = torch.tensor(sorted(ends), dtype=torch.int64, device=device)
        self._pool = model.init_state(rows, capacity)
        self._sampler = Sampler([config] * rows, device)
        self._history = self._start([[0]] * rows)
        self._hidden_bd = torch.zeros(rows, model.config.d_model, dtype=model.dtype, device=device)
        self._alive_b, self._count_b = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        self._drawn_bn = torch.zeros(rows, limits.max_new_tokens, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captures = device.type == "cuda"

    @property
    def busy(self) -> list[int]:
        """Rows that hold a prompt."""
        return [row for row, index in enumerate(self.held) if index is not None]

    @property
    def free(self) -> list[int]:
        """Rows that hold none."""
        return [row for row, index in enumerate(self.held) if index is None]

    @property
    def captured(self) -> bool:
        """Whether a step is one CUDA graph by now."""
        return self._graph is not None

    def _start(self, prompts: Sequence[Sequence[int]]) -> History:
        vocab_size = self.model.config.vocab_size if self.config.penalises else 0
        return History.start(prompts, vocab_size, self.model.device)

    @torch.no_grad()
    def put(self, indices: Sequence[int], prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
        """Read `prompts` into free rows."""
        rows = self.free[: len(indices)]
        rows_b = torch.tensor(rows, device=self.model.device)
        fresh = self.model.init_state(len(rows), self.capacity)
        self._hidden_bd[rows_b] = prefill(self.model, prompts, fresh, self.limits.chunk)
        self._pool.write_(rows_b, fresh)
        self._history.write_(rows_b, self._start(prompts))
        self._sampler.seed_b[rows_b] = torch.tensor(seeds, device=self.model.device)
        self._count_b[rows_b], self._alive_b[rows_b] = 0, 1
        for row, index in zip(rows, indices, strict=True):
            self.held[row] = index

    def advance(self, steps: int) -> None:
        """Draw and read so many tokens; rows that end on the way stand still."""
        if self._graph is None and self._captures:
            self._capture()
        for _ in range(steps):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()

    def _capture(self) -> None:
        # What is compiled at its first call, or asks the device then, must have done so before.
        for _ in range(2):
            self._step()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError:
            # A layer that asks the device at every step is launched piece by piece: slower, and the same.
            self._captures = False
        else:
            self._graph = graph

    @torch.no_grad()
    def _step(self) -> None:
        drawn_b = self._sampler.sample(self.model.head(self._hidden_bd), self._history)
        tokens_b, at_b1 = drawn_b.clamp(min=0), self._count_b.clamp(max=self._drawn_bn.shape[1] - 1)[:, None]
        kept_b1 = torch.where(self._alive_b[:, None] > 0, drawn_b[:, None], self._drawn_bn.gather(1, at_b1))
        self._drawn_bn.scatter_(1, at_b1, kept_b1)
        self._history.observe_(tokens_b, self._alive_b)
        self._count_b.add_(self._alive_b)
        ended_b = (drawn_b[:, None] == self._ends_e).any(1) | (self._count_b == self._drawn_bn.shape[1]) | (drawn_b < 0)
        self._alive_b.mul_(~ended_b)
        hidden_btd, update = self.model.read(tokens_b[:, None], self._pool)
        update.commit_(self._pool, None, self._alive_b)
        self._hidden_bd.copy_(hidden_btd[:, 0])

    def take(self) -> list[tuple[int, Generation]]:
        """What has ended since the last call, by prompt; its rows are free then.

        Raises:
            DivergenceError: a row's logits were not finite.
        """
        alive = self._alive_b.tolist()
        done = [(row, index) for row, index in enumerate(self.held) if index is not None and not alive[row]]
        if not done:
            return []
        rows_b = torch.tensor([row for row, _ in done], device=self.model.device)
        counts, drawn, ends = (
            self._count_b[rows_b].tolist(),
            self._drawn_bn[rows_b].tolist(),
            set(self._ends_e.tolist()),
        )
        out: list[tuple[int, Generation]] = []
        for (row, index), count, tokens in zip(done, counts, drawn, strict=True):
            self.held[row] = None
            tokens = tokens[:count]
            if tokens[-1] < 0:
                raise diverged(index, count - 1)
            out.append((index, Generation(tokens, finish="end" if tokens[-1] in ends else "length")))
        return out

    def shrink(self) -> None:
        """Give up the rows that are free."""
        rows = self.busy
        rows_b = torch.tensor(rows, device=self.model.device)
        seed_b = self._sampler.seed_b[rows_b]
        self._sampler = Sampler([self.config] * len(rows), self.model.device)
        self._sampler.seed_b.copy_(seed_b)
        self._pool, self._history = self._pool.select(rows_b), self._history.select(rows_b)
        self._hidden_bd, self._alive_b = self._hidden_bd[rows_b], self._alive_b[rows_b]
        self._count_b, self._drawn_bn = self._count_b[rows_b], self._drawn_bn[rows_b]
        self.held, self._graph = [self.held[row] for row in rows], None
